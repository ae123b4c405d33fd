"""How fake-quantized models are trained: rates in rounding steps, averaged weights, and the best state kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from diffusers_pqcad.compression.checkpoint import clone_state, copy_state_
from diffusers_pqcad.compression.fake_quant import fake_quant_layers, latent_weight, weight_quantizer

MIN_RMS = 0.01  # of a tensor that starts at or near zero, as a bias may
WARMUP_STEPS = 10


def check_minimum(settings: Any, **minimum: float) -> None:
    """Raise ValueError, naming the field, where a setting is below its minimum."""
    for name, low in minimum.items():
        if not getattr(settings, name) >= low:
            raise ValueError(f"{name}: expected at least {low}, got {getattr(settings, name)}.")


def rounding_step(layer: nn.Module) -> float:
    """Return the distance between neighbouring levels of a fake-quantized layer, the mean over its scales."""
    quantizer = weight_quantizer(layer)
    return quantizer.scale.detach().mean().item() * quantizer.spec.level_step


def float_groups(module: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return Adam's groups for what stays in floating point: biases, norms, and the layers that are not quantized.

    Each tensor's rate is `rate` times the root of its mean square, at least MIN_RMS: Adam's updates are as long as its
    rate, and the weights of a norm are a hundred times as large as those of a wide convolution. Adafactor scales its
    updates so (Shazeer & Stern 2018, arXiv:1804.04235, section 8).
    """
    quantized = {
        id(parameter)
        for layer in fake_quant_layers(module).values()
        for parameter in (latent_weight(layer), weight_quantizer(layer).scale)
    }
    return [
        {"params": [parameter], "lr": rate * max(parameter.detach().square().mean().sqrt().item(), MIN_RMS)}
        for parameter in module.parameters()
        if id(parameter) not in quantized
    ]


def parameter_groups(module: nn.Module, step_rate: float, float_rate: float) -> list[dict[str, Any]]:
    """Return Adam's groups for a fake-quantized `module`, with rates in units of what each tensor can bear.

    An update of Adam moves a weight by about its rate, whatever its gradient. At one rate for all layers, a few
    updates take the latents of 8-bit layers over a whole step while those of 4-bit layers have hardly moved. So a
    layer's latent weight gets `step_rate` times its `rounding_step`, its scales a tenth of that, and everything else
    its rate in `float_groups`. EfficientDM (He et al. 2024, arXiv:2310.03270) has rates by a layer's scale as well.
    """
    groups: list[dict[str, Any]] = []
    for layer in fake_quant_layers(module).values():
        rate = step_rate * rounding_step(layer)
        groups += [
            {"params": [latent_weight(layer)], "lr": rate},
            {"params": [weight_quantizer(layer).scale], "lr": rate / 10},
        ]
    return [*groups, *float_groups(module, float_rate)]


def rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Return what a rate is multiplied by in update `step`, counted from 0: a linear warm-up, and a linear decay to 0.

    Adam's first updates are as long as its later ones, before it knows anything of the gradients.
    """
    return min(1.0, (step + 1) / (warmup_steps + 1)) * (1 - step / num_steps)


class AveragedAdam:
    """Adam with a warm-up and a linear decay of its rates, and a moving average of the weights it passes through.

    `groups` are Adam's, with the rates that the warm-up leads to. Short trainings at rates high enough to move
    quantized weights end in noise; the average takes it out.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        num_steps: int,
        ema_decay: float,
        warmup_steps: int = WARMUP_STEPS,
        max_grad_norm: float = 1.0,
        **adam: Any,
    ) -> None:
        self.optimizer = torch.optim.Adam(groups, **adam)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.rates = [group["lr"] for group in groups]
        self.num_steps, self.warmup_steps, self.max_grad_norm = num_steps, warmup_steps, max_grad_norm
        self.average = EMAModel(self.parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)

    def update(self, step: int) -> None:
        """Clip the gradients, apply them at the rates of `step`, clear them, and take the weights into the average."""
        factor = rate_factor(step, self.num_steps, self.warmup_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model inside the block."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's and the average's state, for a resume file."""
        # The rates, too: those of a model that is loaded half-way would be by other scales.
        return {
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "rates": list(self.rates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates = state["rates"]
        self.average.load_state_dict(state["average"])
        self.average.to(self.parameters[0].device)


class BestState:
    """The state with the smallest error so far; the start competes."""

    def __init__(self, model: nn.Module, error: float) -> None:
        self.step, self.error, self.state = 0, error, clone_state(model)

    def offer(self, model: nn.Module, step: int, error: float) -> None:
        """Keep the state of `model` if `error` is smaller than any before."""
        if error < self.error:
            self.step, self.error, self.state = step, error, clone_state(model)

    def restore_(self, model: nn.Module) -> None:
        """Copy the best state into `model`."""
        copy_state_(model, self.state)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a resume file."""
        return {"step": self.step, "error": self.error, "state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.step, self.error, self.state = state["step"], state["error"], state["state"]
