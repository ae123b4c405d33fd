"""How much a layer's rounding is known to matter before anything is measured: by its place in a UNet."""

import re
from collections.abc import Iterable

LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.")
GAIN_PER_LEVEL = 16.0  # of the squared error: two bits


def gains_by_depth(names: Iterable[str], gain_per_level: float = GAIN_PER_LEVEL) -> dict[str, float]:
    """Return by how much the squared rounding error of each layer counts, 1 for the innermost, by its name.

    A UNet's blocks lie at levels, the outermost at the full resolution. What a block adds at an inner level is seen
    by the output through all that comes after it, and beside the skip connection that passes it by. So each level
    further out counts `gain_per_level` times as much. Layers outside of `down_blocks` and `up_blocks`, and those of
    models that do not have both (transformers, ControlNets, VAEs), have gain 1.
    """
    names = list(names)
    found = {name: match for name in names if (match := LEVEL.match(name))}
    levels = {
        kind: 1 + max((int(m[2]) for m in found.values() if m[1] == kind), default=-1) for kind in ("down", "up")
    }
    if not all(levels.values()):
        return dict.fromkeys(names, 1.0)
    gains = dict.fromkeys(names, 1.0)
    for name, match in found.items():
        index = int(match[2])
        depth = index if match[1] == "down" else levels["up"] - 1 - index
        gains[name] = gain_per_level ** (levels["up"] - 1 - depth)
    return gains


def shortcuts_at_the_output(names: Iterable[str]) -> list[str]:
    """Return those of `names` that are residual blocks' shortcuts in the last up block of a UNet.

    They hand the first layers' features on to the last ones past all norms, under a half per cent of the weights. In
    an epsilon model those features are the noise itself, and whatever they lose the sample loses: of the error that
    8-bit activations make in all layers, three quarters are theirs, and of the error of 4-bit weights 22 to 65 % (two
    epsilon models; 37 and 46 %, 11 and 16 % in two that predict v: examples/results/method.md).
    """
    names = list(names)
    last = max((int(m[2]) for name in names if (m := LEVEL.match(name)) and m[1] == "up"), default=None)
    return [name for name in names if name.startswith(f"up_blocks.{last}.") and name.endswith(".conv_shortcut")]
