"""What a computation has in memory at most, by its tensors: counted, and so the same on all computers."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages_of(tree: Any) -> dict[int, Any]:
    """The memory of all tensors in `tree`; of none that is meta."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type != "meta")
    return {storage._cdata: storage for storage in (leaf.untyped_storage() for leaf in leaves)}


class Peak(TorchDispatchMode):
    """Inside the block, counts the bytes of tensors that operators made and that are alive; `bytes` is the most.

    Tensors of before are not counted, nor those that lie in mapped files, which no operator makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.counted = 0  # at least what is alive
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = storages_of((args, kwargs))
        found = func(*args, **(kwargs or {}))
        for key, storage in storages_of(found).items():
            if key in given or (key in self.alive and not self.alive[key][0].expired()):
                continue
            self.alive[key] = (StorageWeakRef(storage), storage.nbytes())
            self.counted += storage.nbytes()
        if self.counted > self.bytes:  # only then it matters what is gone
            self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
            self.counted = sum(nbytes for _, nbytes in self.alive.values())
            self.bytes = max(self.bytes, self.counted)
        return found
