"""How long each stage of a run would take on this computer: a few calls of models of its shapes, times the counts.

The weights are random: time does not depend on their values. What is not called in hundreds is left out: loading,
copies, files, plots, text encoders.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from diffusers_pqcad.compression.fake_quant import prepare_
from diffusers_pqcad.compression.optimization import AveragedAdam, trained_groups
from diffusers_pqcad.compression.precision import computed_in
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig, UnitIO, reconstruct
from diffusers_pqcad.kernels.memory import available_bytes
from diffusers_pqcad.layers.find import layer_of
from diffusers_pqcad.loading.convert import quantize_, with_model_exemptions
from diffusers_pqcad.publishing.compress import fixed_bits
from diffusers_pqcad.publishing.footprint import decoder_shape
from diffusers_pqcad.publishing.outline import Outline, calls_of_parts
from diffusers_pqcad.publishing.settings import Settings
from diffusers_pqcad.publishing.stages import FLOAT, FROZEN, PACKED, ROUNDED, TRAINED, Passes, Stage, search_of
from diffusers_pqcad.publishing.weightless import remade

CPU = "cpu"
CALL_SECONDS = 2.0  # of a measured call: of more images, fewer are called, and their time is scaled
COPIES = 8  # sizes of the weights that measuring takes: models, gradients, the optimizer's state
UPDATES = 2  # of a unit that is timed, after a first one


def check_room(outline: Outline) -> None:
    """Raise ValueError where the models that are timed do not fit into the memory that is free."""
    wanted = COPIES * sum(4 * tensor.numel() for tensor in outline.model.state_dict().values())
    free = available_bytes()
    if free is not None and wanted > free:
        raise ValueError(
            f"measure_time: expected {wanted / 1e9:.1f} GB of free memory for models of these shapes, got "
            f"{free / 1e9:.1f} GB. Give --measure_time False: all else of a plan needs no weights."
        )


def random_model(model: nn.Module) -> nn.Module:
    """Return a copy of `model`, on meta, with random weights on the CPU; norms scale by 1."""
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))

    def weights(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2:
            return ones(tensor)
        values = noise.repeat(-(-tensor.numel() // len(noise)))[: tensor.numel()].view(tensor.shape)
        return (values / tensor[0].numel() ** 0.5).to(tensor.dtype)

    def ones(tensor: Tensor) -> Tensor:
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    return remade(model, weights, ones)


class Stopwatch:
    """Times calls of a run's models, each kind and size once, where the run makes them; `clock` gives seconds."""

    def __init__(self, settings: Settings, outline: Outline, clock: Callable[[], float] = time.perf_counter) -> None:
        check_room(outline)
        self.settings, self.outline, self.clock = settings, outline, clock
        quantization = settings.quantization
        model = random_model(outline.model)
        self.search = search_of(outline, quantization)
        config = with_model_exemptions(model, quantization)
        rounded = prepare_(copy.deepcopy(model), config, dict.fromkeys(self.search.num_weights, 4))
        bits = replace(quantization, method="fixed", weight_bits=fixed_bits(quantization))
        packed = quantize_(copy.deepcopy(model), bits)
        # By kind and device. Weights that were rounded before are as fast as any.
        self.models = {(FLOAT, CPU): model, (FROZEN, CPU): model, (ROUNDED, CPU): rounded, (PACKED, CPU): packed}
        self.known: dict[tuple[Any, ...], float] = {}
        self.shares: dict[str, float] = {}

    @property
    def device(self) -> str:
        """Where the run trains."""
        return self.settings.run.train_device

    def model_on(self, kind: str, device: str) -> nn.Module:
        """Return the model of a `kind` on a device."""
        if (kind, device) not in self.models:
            self.models[kind, device] = copy.deepcopy(self.models[kind, CPU]).to(device)
        return self.models[kind, device]

    def timed(self, run: Callable[[], Any]) -> float:
        """Return the seconds of a call."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = self.clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock() - started

    def scaled(self, key: tuple[Any, ...], images: int, run: Callable[[int], Any]) -> float:
        """Return the seconds of `run(images)`, known by `key`: of fewer images, scaled, where that takes long."""
        if (*key, images) not in self.known:
            if key not in self.known:
                run(1)  # first calls choose kernels, and make their copies
                self.known[key] = self.timed(lambda: run(1))
            count = max(1, min(images, int(CALL_SECONDS / max(self.known[key], 1e-9))))
            run(count)
            self.known[*key, images] = self.timed(lambda: run(count)) * images / count
        return self.known[*key, images]

    def of_passes(self, part: Passes, device: str) -> float:
        """Return the seconds of all calls of a part of a stage, on a device."""
        if part.model == TRAINED:
            return part.times * self.of_batch(part.images, part.branches)
        device = CPU if part.model == PACKED else device
        model = self.model_on(part.model, device)

        @torch.no_grad()
        def run(images: int) -> Any:
            return self.outline.call(model, images, branches=part.branches, device=device)

        seconds = self.scaled((part.model, device, part.branches), part.images, run)
        return part.times * seconds * (1.0 if part.until is None else self.share_of(part.until))

    def share_of(self, name: str) -> float:
        """Return the share of a pass that is over when the part `name` of the model is."""
        if not self.shares:
            model, ends = self.models[ROUNDED, CPU], {}

            def keep(name: str) -> Callable[..., None]:
                def hook(module: nn.Module, args: Any, output: Any) -> None:
                    ends[name] = self.clock()

                return hook

            names = dict.fromkeys([*self.search.units, *self.search.num_weights])
            hooks = [layer_of(model, each).register_forward_hook(keep(each)) for each in names]
            with torch.no_grad():
                started = self.clock()
                self.outline.call(model, 4)
                whole = self.clock() - started
            for hook in hooks:
                hook.remove()
            self.shares = {each: (end - started) / whole for each, end in ends.items()}
        return self.shares[name]

    def of_batch(self, num_images: int, branches: int) -> float:
        """Return the seconds of a batch of CAD with its backward pass."""
        model, precision = self.model_on(ROUNDED, self.device), self.settings.run.mixed_precision

        def run(images: int) -> None:
            with computed_in(precision, self.device):
                output = self.outline.call(model, images, branches=branches, device=self.device)
            output.square().mean().backward()
            model.zero_grad()

        return self.scaled((TRAINED, branches), num_images, run)

    def of_update(self) -> float:
        """Return the seconds in which the optimizer makes an update of CAD, and takes it into the average."""
        if ("update",) not in self.known:
            model, config = self.model_on(ROUNDED, self.device), self.settings.distillation
            trainable = "scales" if config.trainable == "lora" else config.trainable  # an adapter is as small
            groups = trained_groups(model, trainable, step_rate=0.0, float_rate=0.0, lora_rate=0.0)
            adam = AveragedAdam(groups, num_steps=3, ema_decay=0.9, optimizer=config.optimizer)

            def update(step: int) -> None:
                for parameter in adam.parameters:
                    parameter.grad = torch.zeros_like(parameter)
                adam.update(step)

            update(0)  # which makes the optimizer's state
            self.known["update",] = self.timed(lambda: update(1))
        return self.known["update",]

    def of_units(self) -> dict[str, float]:
        """Return the seconds of an update of each unit of PQ."""
        config, rows = self.settings.progressive.reconstruction, self.settings.progressive.reconstruction.batch_size
        whole = self.of_batch(1, self.outline.branches)
        count = max(1, min(rows, int(2 * CALL_SECONDS / max(whole, 1e-9))))
        config, model = replace(config, batch_size=count), self.model_on(ROUNDED, self.device)
        seen = calls_of_parts(self.outline, model, self.search.units, self.device)
        return {
            name: rows / count * self.of_unit(model.get_submodule(name), io_of(*seen[name], 2 * count), config)
            for name in self.search.units
        }

    def of_unit(self, unit: nn.Module, io: UnitIO, config: ReconstructionConfig) -> float:
        """Return the seconds of an update of a unit, without what comes before the first one and after the last."""
        precision = self.settings.run.mixed_precision

        def run(iterations: int) -> Callable[[], Any]:
            return lambda: reconstruct(unit, io, replace(config, iterations=iterations), mixed_precision=precision)

        first = self.timed(run(1))
        return max(self.timed(run(1 + UPDATES)) - first, 0.0) / UPDATES

    def of_picture(self) -> float:
        """Return the seconds in which a picture is made of its latents; 0 where they are the picture."""
        decoder = self.outline.teacher.pipeline.components.get("vae")
        if decoder is None:
            return 0.0
        if ("picture",) not in self.known:
            model: Any = random_model(decoder)
            latents = torch.zeros(1, *decoder_shape(self.outline))
            with torch.no_grad():
                self.known["picture",] = self.timed(lambda: model.decode(latents, return_dict=False))
        return self.known["picture",]

    def of_stage(self, stage: Stage) -> float:
        """Return the seconds of a stage."""
        device = CPU if stage.key in ("recording", "rows") else self.device
        seconds = sum(self.of_passes(part, device) for part in stage.passes)
        if stage.updates:
            seconds += stage.updates * self.of_update()
        if stage.pictures:
            seconds += stage.pictures * self.of_picture()
        if stage.reconstructions:
            of_units = self.of_units()
            seconds += sum(part.updates * of_units[part.unit] for part in stage.reconstructions)
        return seconds


def io_of(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, count: int) -> UnitIO:
    """Return what a unit that was called so would see and should give, in `count` rows."""
    first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    rows = len(first)

    def repeat(leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == rows
        return leaf.repeat_interleave(-(-count // rows), 0)[:count].contiguous() if is_batched else leaf

    inputs = tree_map(repeat, (*args, *kwargs.values()))
    leaves = tree_leaves(inputs)
    shared = [index for index, leaf in enumerate(leaves) if not (isinstance(leaf, Tensor) and len(leaf) == count)]
    weight = torch.ones(count, device=first.device)
    return UnitIO(inputs, inputs, tuple(kwargs), tree_map(repeat, output), weight, frozenset(shared))
