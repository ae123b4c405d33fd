"""How fake-quantized models are trained: Adam with linear decay, averaged weights, and the best state kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from diffusers_pqcad.compression.checkpoint import clone_state, copy_state_
from diffusers_pqcad.compression.fake_quant import fake_quant_layers, weight_quantizer


def check_minimum(settings: Any, **minimum: float) -> None:
    """Raise ValueError, naming the field, where a setting is below its minimum."""
    for name, low in minimum.items():
        if not getattr(settings, name) >= low:
            raise ValueError(f"{name}: expected at least {low}, got {getattr(settings, name)}.")


def parameter_groups(module: nn.Module, learning_rate: float, scale_learning_rate: float) -> list[dict[str, Any]]:
    """Return Adam's groups: quantization scales at their own rate, every other parameter at `learning_rate`."""
    scales = [weight_quantizer(layer).scale for layer in fake_quant_layers(module).values()]
    ids = {id(scale) for scale in scales}
    others = [parameter for parameter in module.parameters() if id(parameter) not in ids]
    return [{"params": others, "lr": learning_rate}, {"params": scales, "lr": scale_learning_rate}]


class AveragedAdam:
    """Adam whose rates fall linearly to 0 over `num_steps`, and a moving average of the weights it passes through.

    Short trainings at rates high enough to move quantized weights end in noise; the average takes it out.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        scale_learning_rate: float,
        num_steps: int,
        ema_decay: float,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.Adam(parameter_groups(model, learning_rate, scale_learning_rate))
        self.rates = [learning_rate, scale_learning_rate]
        self.num_steps, self.max_grad_norm = num_steps, max_grad_norm
        self.average = EMAModel(self.parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)

    def learning_rate(self, step: int) -> float:
        """Return the latent weights' rate of update `step`, counted from 0."""
        return self.rates[0] * (1 - step / self.num_steps)

    def update(self, step: int) -> None:
        """Clip the gradients, apply them at the rate of `step`, clear them, and take the weights into the average."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - step / self.num_steps)
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
        return {"optimizer": self.optimizer.state_dict(), "average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
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
