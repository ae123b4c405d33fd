"""How fake-quantized models are trained: rates in rounding steps, averaged weights, and the best state kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusers_pqcad.compression.checkpoint import copy_state_
from diffusers_pqcad.compression.fake_quant import fake_quant_layers, latent_weight, weight_quantizer, weights_at_rest
from diffusers_pqcad.compression.offload import Store, offloaded, release_
from diffusers_pqcad.compression.optimizers import OptimizerName, optimizer_of
from diffusers_pqcad.layers.find import is_of_adapter
from diffusers_pqcad.loading.coverage import float_weights

Trainable = Literal["all", "scales", "lora"]
# By diffusers' names: those that its training scripts take.
LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

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
    updates so (Shazeer & Stern 2018, arXiv:1804.04235, section 8). An adapter is not among them: it is trained alone.
    """
    quantized = {
        id(parameter)
        for layer in fake_quant_layers(module).values()
        for parameter in (latent_weight(layer), weight_quantizer(layer).scale)
    }
    return [
        {"params": [parameter], "lr": rate * max(parameter.detach().square().mean().sqrt().item(), MIN_RMS)}
        for name, parameter in module.named_parameters()
        if id(parameter) not in quantized and not is_of_adapter(name)
    ]


def scale_groups(module: nn.Module, step_rate: float, float_rate: float) -> list[dict[str, Any]]:
    """Return those groups of `parameter_groups` that leave every weight where it is: scales, biases and norms."""
    weights = {id(weight.parameter) for weight in float_weights(module)}  # latents, and of layers that are not rounded
    groups = parameter_groups(module, step_rate, float_rate)
    return [group for group in groups if id(group["params"][0]) not in weights]


def adapter_groups(module: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return Adam's one group for the LoRA of `module`: Adam's own `rate`, as half of its tensors begin at zero."""
    return [{"params": [p for name, p in module.named_parameters() if is_of_adapter(name)], "lr": rate}]


def trained_groups(
    module: nn.Module, trainable: Trainable, *, step_rate: float, float_rate: float, lora_rate: float
) -> list[dict[str, Any]]:
    """Return Adam's groups for what is `trainable` of a fake-quantized `module`."""
    if trainable == "lora":
        return adapter_groups(module, lora_rate)
    groups_of = {"all": parameter_groups, "scales": scale_groups}[trainable]
    return groups_of(module, step_rate, float_rate)


@contextmanager
def trained_alone(module: nn.Module, groups: list[dict[str, Any]], store: Store | None = None) -> Iterator[None]:
    """Let only the parameters in Adam's `groups` have gradients inside the block; weights at rest are rounded once.

    With a `store`, the other parameters lie there inside the block.
    """
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in trained)
    still = [parameter for parameter in before if not parameter.requires_grad]
    try:
        with offloaded(module, store, still), weights_at_rest(module):
            release_(still)
            yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


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


def rate_schedule(lr_scheduler: LrScheduler | None, num_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Return what rates are multiplied by in each update, counted from 0; None: by `rate_factor`.

    By diffusers' names the first update of a warm-up has a rate of 0, "linear" decays from the end of the warm-up on,
    and "constant" has none.
    """
    if lr_scheduler is None:
        return partial(rate_factor, num_steps=num_steps, warmup_steps=warmup_steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # a schedule is made for one; only its function is taken
    schedule = get_scheduler(lr_scheduler, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
    return schedule.lr_lambdas[0]


class AveragedAdam:
    """Adam with a schedule of its rates, and a moving average of the weights it passes through.

    `groups` are Adam's, with the rates that the warm-up leads to; `lr_scheduler` is as in `rate_schedule`. Short
    trainings at rates high enough to move quantized weights end in noise; the average takes it out. `optimizer` names
    one with less state in Adam's place. With a `store`, the average lies there.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        num_steps: int,
        ema_decay: float,
        warmup_steps: int = WARMUP_STEPS,
        max_grad_norm: float = 1.0,
        lr_scheduler: LrScheduler | None = None,
        optimizer: OptimizerName = "adam",
        use_8bit_adam: bool = False,
        store: Store | None = None,
        **adam: Any,
    ) -> None:
        self.optimizer = optimizer_of(groups, optimizer, use_8bit_adam=use_8bit_adam, **adam)
        self.store = store
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.max_grad_norm = max_grad_norm
        self.rate_factor = rate_schedule(lr_scheduler, num_steps, warmup_steps)
        # Without parameters: it would copy all of them before one lies elsewhere.
        self.average = EMAModel([], decay=ema_decay, use_ema_warmup=True, power=0.75)
        self.average.shadow_params = [self._kept(parameter) for parameter in self.parameters]

    def _kept(self, tensor: Tensor) -> Tensor:
        """Return a copy of a parameter, or of its average, where the average lies."""
        return tensor.detach().clone() if self.store is None else self.store.put(tensor)

    def update(self, step: int) -> None:
        """Clip the gradients, apply them at the rates of `step`, clear them, and take the weights into the average."""
        factor = self.rate_factor(step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.store is None:
            self.average.step(self.parameters)
            return
        self.average.step([parameter.to("cpu") for parameter in self.parameters])
        release_(self.average.shadow_params)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model inside the block."""
        if self.store is None:
            self.average.store(self.parameters)
        else:  # as `store` does, but for the place
            self.average.temp_stored_params = self.store.put_tree(self.parameters)
        self.average.copy_to(self.parameters)
        release_(self.average.shadow_params)
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
        if self.store is None:
            self.average.to(self.parameters[0].device)
        else:
            self.average.shadow_params = self.store.put_tree(self.average.shadow_params)


def moving_state(model: nn.Module, store: Store | None = None) -> dict[str, Tensor]:
    """Return a copy of what a training may change in `model`: parameters with gradients, and all buffers.

    It lies in the `store`, if there is one.
    """
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    moving = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in still}
    return {name: tensor.clone() if store is None else store.put(tensor) for name, tensor in moving.items()}


class BestState:
    """The state with the smallest error so far, of what moves; the start competes. With a `store`, it lies there."""

    def __init__(self, model: nn.Module, error: float, store: Store | None = None) -> None:
        self.store = store
        self.step, self.error, self.state = 0, error, moving_state(model, store)

    def offer(self, model: nn.Module, step: int, error: float) -> None:
        """Keep the state of `model` if `error` is smaller than any before."""
        if error < self.error:
            self.state = {}  # before there is another: two would be in memory
            self.step, self.error, self.state = step, error, moving_state(model, self.store)

    def restore_(self, model: nn.Module) -> None:
        """Copy the best state into `model`."""
        copy_state_(model, model.state_dict() | self.state)
        release_(self.state)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a resume file."""
        return {"step": self.step, "error": self.error, "state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.step, self.error = state["step"], state["error"]
        self.state = state["state"] if self.store is None else self.store.put_tree(state["state"])
