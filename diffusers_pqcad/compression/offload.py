"""Tensors that wait on disk, memory-mapped: they count as memory only while they are used.

A mapped tensor is an ordinary one with the same numbers: it is read from the disk where it is touched, and `release_`
gives its memory back, with what was written kept. Its file has no name, so nothing is left of it after a kill.
"""

import copy
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

ARENA_BYTES = 2**26  # of one file: small enough to be given back with its tensors, large enough for few open files


@dataclass(frozen=True)
class Pages:
    """The pages of a mapped file in which a tensor lies; no other tensor does."""

    file: mmap.mmap
    start: int
    length: int

    def release(self) -> None:
        """Give their memory back; the kernel keeps what was written, and reads it again when it is asked for."""
        if hasattr(mmap, "MADV_DONTNEED"):  # elsewhere, the system takes it back when it needs it
            self.file.madvise(mmap.MADV_DONTNEED, self.start, self.length)


class Store:
    """Space for tensors in files of `folder`, which is made; a file goes with the last tensor in it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file: mmap.mmap | None = None
        self._next = 0

    def _pages(self, nbytes: int) -> Pages:
        length = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._file is None or self._next + length > len(self._file):
            self._file, self._next = _mapped_file(self.folder, max(length, ARENA_BYTES)), 0
        pages = Pages(self._file, self._next, length)
        self._next += length
        return pages

    def like(self, tensor: Tensor) -> Tensor:
        """Return a mapped tensor of the shape, dtype and strides of a dense `tensor`, of zeros until it is written to.

        The strides, too: kernels take other paths for others, whose results differ in the last bit.
        """
        if not tensor.numel():
            return torch.empty_like(tensor, device="cpu")
        pages = self._pages(tensor.numel() * tensor.element_size())
        flat = torch.frombuffer(pages.file, dtype=tensor.dtype, count=tensor.numel(), offset=pages.start)
        mapped = flat.as_strided(tensor.shape, tensor.stride())
        vars(mapped)["pages"] = pages
        return mapped

    @torch.no_grad()
    def put(self, tensor: Tensor) -> Tensor:
        """Return a mapped copy of `tensor`, laid out as `tensor.clone()` is."""
        return release_(self.like(_outline(tensor)).copy_(tensor.detach()))

    def put_tree(self, tree: Any) -> Any:
        """Return `tree` with mapped copies in the place of its tensors."""
        return tree_map_only(Tensor, self.put, tree)

    def cat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return a mapped `torch.cat(tensors)`, made of one after the other."""
        joined = self.like(torch.cat(list(map(_outline, tensors))))
        first = 0
        for tensor in tensors:
            joined[first : first + len(tensor)] = tensor
            first += len(tensor)
            release_([joined, tensor])
        return joined

    def rows(self, tensor: Tensor, order: Tensor, batch_size: int = 64) -> Tensor:
        """Return a mapped `tensor[order]`, made of `batch_size` rows after the other."""
        taken = self.like(_outline(tensor)[_outline(order)])
        for first in range(0, len(order), batch_size):
            taken[first : first + batch_size] = tensor[order[first : first + batch_size]]
            release_([taken, tensor])
        return taken


def _outline(tensor: Tensor) -> Tensor:
    """Return what tells how a copy of `tensor` is laid out, without numbers."""
    return torch.empty_like(tensor, device="meta")


def _mapped_file(folder: Path, nbytes: int) -> mmap.mmap:
    """Return a new file of zeros in `folder`, mapped; OSError where the disk is full."""
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is full later would end the process without a word
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
        return mmap.mmap(file.fileno(), nbytes)


def store_in(folder: str | Path | None) -> Store | None:
    """Return a Store in `folder`; None, for which nothing is offloaded, without one."""
    return None if folder is None else Store(folder)


def release_(tree: Any) -> Any:
    """Give back the memory of all mapped tensors in `tree`, a tensor or a nest of them, and return it."""
    for leaf in tree_leaves(tree):
        pages = vars(leaf).get("pages") if isinstance(leaf, Tensor) else None
        if pages is not None:
            pages.release()
    return tree


def release_parameters(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: give back the memory of the module's own mapped parameters."""
    release_(list(module.parameters(recurse=False)))


def on_cpu(module: nn.Module) -> bool:
    """Return whether `module` computes on the CPU: what computes elsewhere stays there."""
    return next(module.parameters()).device.type == "cpu"


def _move_(parameters: Iterable[nn.Parameter], store: Store) -> None:
    for parameter in parameters:
        if "pages" not in vars(parameter):
            mapped = store.put(parameter)
            parameter.data = mapped
            vars(parameter)["pages"] = vars(mapped)["pages"]


def _hooked(module: nn.Module) -> list[Any]:
    """Let each part of `module` give back the memory of its parameters after each of its calls."""
    owners = (part for part in module.modules() if next(part.parameters(recurse=False), None) is not None)
    return [part.register_forward_hook(release_parameters) for part in owners]


def offload_(module: nn.Module, store: Store | None) -> nn.Module:
    """Move the parameters of `module` to `store`, in place, and return it; each part holds memory in its calls alone.

    They stay there. Nothing happens without a store, and to a module on another device than the CPU.
    """
    if store is not None and on_cpu(module):
        _move_(module.parameters(), store)
        _hooked(module)
    return module


@contextmanager
def offloaded(
    module: nn.Module, store: Store | None, parameters: Sequence[nn.Parameter] | None = None
) -> Iterator[None]:
    """Keep `parameters`, by default all of `module`, in `store` inside the block, and in memory again after it.

    As `offload_` otherwise.
    """
    moved = list(module.parameters() if parameters is None else parameters)
    if store is None or not moved or not on_cpu(module):
        yield
        return
    _move_(moved, store)
    hooks = _hooked(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in moved:
            if vars(parameter).pop("pages", None) is not None:
                parameter.data = parameter.data.clone()


def waiting_copy(module: nn.Module, store: Store | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a deep copy of an fp32 `module` that only infers: in `dtype`, and in `store`, as `offload_` has it.

    No more than one of its tensors is in memory meanwhile. It stays there without a store, and on another device than
    the CPU. Activation ranges are fp32 in any case.
    """
    memo: dict[int, Any] = {}
    waiting = store if on_cpu(module) else None
    for parameter in module.parameters():
        copied = nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        if waiting is not None:
            _move_([copied], waiting)
        memo[id(parameter)] = copied
    found = copy.deepcopy(module, memo).eval()
    for part in found.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.dtype == torch.float32 and not hasattr(part, "set_qparams_"):
                setattr(part, name, buffer.to(dtype))
    if waiting is not None:
        _hooked(found)
    return found


def sharing_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module` with parameters in the module's own memory, and without gradients."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo)
