"""Which settings bring a run's memory below a limit: those first that change nothing, then those that change least."""

from collections.abc import Mapping
from typing import NamedTuple

from accelerate.utils import convert_file_size_to_int

from diffusers_pqcad.loading.saved import SavedModel
from diffusers_pqcad.publishing.footprint import Footprint, footprints
from diffusers_pqcad.publishing.outline import Outline
from diffusers_pqcad.publishing.settings import Settings, flat, settings_of
from diffusers_pqcad.publishing.stages import stages_of_run


class Chosen(NamedTuple):
    """Settings within a limit, and the flags that make them so."""

    settings: Settings
    flags: dict[str, object]


def bytes_of(size: str) -> int:
    """Return the bytes of a `size` such as 16GB (10^9 bytes each) or 16GiB; raises ValueError for anything else."""
    try:
        return convert_file_size_to_int(size.replace(" ", ""))
    except ValueError:
        raise ValueError(
            f"max_memory: expected a number with its unit, such as 16GB or 16GiB, got {size!r}."
        ) from None


def levers_of(settings: Settings) -> list[dict[str, object]]:
    """Return the flags that save memory and are not given yet, in the order in which they are tried."""
    run, _, _, distillation = settings
    levers: list[dict[str, object]] = []
    if not run.offload_to_disk:
        levers.append({"offload_to_disk": True})
    if not distillation.gradient_checkpointing:
        levers.append({"gradient_checkpointing": True})
    batch, parts = distillation.train_batch_size, distillation.gradient_accumulation_steps
    while batch % 2 == 0:  # as many images of an update
        batch, parts = batch // 2, parts * 2
        levers.append({"train_batch_size": batch, "gradient_accumulation_steps": parts})
    if run.sampling_batch_size != 1:
        levers.append({"sampling_batch_size": 1})
    if run.mixed_precision == "no":
        levers.append({"mixed_precision": "bf16"})
    if distillation.optimizer == "adam" and not distillation.use_8bit_adam:
        levers.append({"optimizer": "adafactor"})
    return levers


def with_flags(settings: Settings, flags: Mapping[str, object]) -> Settings:
    """Return `settings` with other values of some flags."""
    return settings_of({key: value for key, value in flat(settings).items() if value is not None} | dict(flags))


def peak(found: list[Footprint], device: str) -> int:
    """Return the most bytes of all stages on a device."""
    return max(item.total(device) for item in found)


def within(settings: Settings, outline: Outline, models: Mapping[str, SavedModel], limit: int) -> Chosen:
    """Return `settings` with as few levers as keep the device that trains below `limit` bytes.

    A lever that saves nothing where the peak is, is left out. Raises ValueError where all of them are not enough.
    """
    device = settings.run.train_device
    flags: dict[str, object] = {}
    found = footprints(settings, outline, models, stages_of_run(settings, outline))
    for lever in levers_of(settings):
        if peak(found, device) <= limit:
            break
        tried = with_flags(settings, flags | lever)
        smaller = footprints(tried, outline, models, stages_of_run(tried, outline))
        if peak(smaller, device) < peak(found, device):
            flags, found = flags | lever, smaller
    if peak(found, device) > limit:
        worst = max(found, key=lambda item: item.total(device))
        raise ValueError(
            f"max_memory: expected at least {peak(found, device) / 1e9:.2f} GB, which the stage {worst.key} takes "
            f"with all that saves memory, got {limit / 1e9:.2f} GB. Train a smaller part, such as --trainable lora, "
            "or smaller images."
        )
    return Chosen(with_flags(settings, flags) if flags else settings, flags)
