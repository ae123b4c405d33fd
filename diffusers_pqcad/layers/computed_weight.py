"""What float code sees of a packed layer: a weight that is computed when its numbers are asked for, and read-only."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from diffusers_pqcad.numerics.packing import unpack_levels
from diffusers_pqcad.numerics.qparams import WeightSpec, dequantize_weight


class ComputedWeight(Tensor):
    """The float weight of a packed layer. Shape, dtype and device cost nothing; numbers are computed once, when asked.

    Many models read `layer.weight.dtype` in each call. What an operation computes from this tensor is a plain tensor;
    this one and its views (also `.data` and `detach()`) refuse to be written to, as the write would be lost: peft
    fuses an adapter by `weight.data += delta`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _is_hf_initialized = True  # transformers writes random numbers into weights that it takes for missing
    layer_name: str
    spec: WeightSpec
    packed: Mapping[str, Tensor | None] | None  # the buffers that it is computed from; `None` for a view
    _numbers: Tensor | None

    @classmethod
    def of_packed(
        cls,
        packed: Mapping[str, Tensor | None],
        spec: WeightSpec,
        *,
        shape: torch.Size,
        dtype: torch.dtype,
        layer_name: str,
    ) -> Self:
        """Return the weight (C_out, ...) that the buffers `packed` of the layer `layer_name` stand for."""
        device = packed["qweight"].device  # type: ignore[union-attr]
        weight = cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight.layer_name, weight.spec, weight.packed, weight._numbers = layer_name, spec, packed, None
        return weight

    def view_of(self, numbers: Tensor) -> "ComputedWeight":
        """Return the view `numbers` of this weight's, as read-only as this."""
        view = self._make_wrapper_subclass(
            type(self),
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=numbers.device,
        )
        view.layer_name, view.spec, view.packed, view._numbers = self.layer_name, self.spec, None, numbers
        return view

    def numbers(self) -> Tensor:
        """Return the weight as a plain tensor, computed in the first call."""
        if self._numbers is None:
            buffers: Any = self.packed
            levels = unpack_levels(buffers["qweight"], self.spec, self.shape)
            self._numbers = dequantize_weight(levels, buffers["weight_scale"]).to(self.dtype)
        return self._numbers

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ValueError."""
        raise ValueError(
            f"{self.layer_name}: the weight of a packed layer is computed from its integers and cannot be written to, "
            "so nothing can be merged into it here. Use the adapter unfused, or call dequantize() first; fuse_lora() "
            "of a diffusers model or its pipeline merges into layers of 8 bits."
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for written in written_tensors(func, args, kwargs):
            if isinstance(written, ComputedWeight):
                written.refuse()
        result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        viewed = args[0] if func.is_view and args else None
        if not isinstance(viewed, ComputedWeight):
            return result
        return tree_map(lambda part: viewed.view_of(part) if isinstance(part, Tensor) else part, result)

    # What no operation stands for, and so does not come to `__torch_dispatch__`.
    data = property(lambda self: self, refuse)
    _is_param = property(lambda self: False, refuse)  # what nn.Parameter sets on a tensor of another class
    apply_ = map_ = map2_ = share_memory_ = refuse

    def numpy(self, *, force: bool = False) -> Any:
        """Return the numbers as an array that cannot be written to."""
        array = self.numbers().numpy(force=force)
        array.setflags(write=False)
        return array

    def tolist(self) -> Any:
        """Return the numbers as nested lists."""
        return self.numbers().tolist()

    def data_ptr(self) -> int:
        """Return the address of the numbers, valid as long as this tensor lives."""
        return self.numbers().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the memory of the numbers."""
        return self.numbers().untyped_storage()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.numbers().clone().__dlpack__(**kwargs)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.numbers())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.numbers().clone()


def plain(value: Any) -> Any:
    """Return the numbers of a `ComputedWeight`, anything else as it is."""
    return value.numbers() if isinstance(value, ComputedWeight) else value


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments that the operator `func` writes to."""
    if func._schema.is_mutable:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name))


class PackedMetadata(dict[str, Any]):
    """The metadata of a packed layer in a state dict, which only a packed layer can read; pickled, it is plain.

    Torch asks it for each module that it loads. So a float layer, whose weight the state dict lacks, cannot keep its
    own in silence, as `load_state_dict(..., strict=False)` allows.
    """

    def get(self, key: str, default: Any = None) -> Any:
        """Raise ValueError."""
        raise ValueError(
            f"{self['name']}: the state dict holds the packed integers of a quantized model, and a float layer asks "
            "for a weight. Call dequantize() on that model, or on a deep copy of it, and take its state dict then."
        )

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)(self)

    def __reduce__(self) -> Any:  # what torch.load(weights_only=True) accepts
        return OrderedDict, (), None, None, iter({"version": self["version"]}.items())
