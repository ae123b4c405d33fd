"""Specification of what Python and compiled C agree about: a size, a place or a constant that differs is found."""

import ctypes
from types import ModuleType

import pytest

from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.kernels.native.layout import check_layout, layout_in_c, layout_of
from diffusers_pqcad.kernels.x86 import attention, library, structs

needs_x86 = pytest.mark.skipif(isinstance(library.library(), str), reason=str(library.library()))
FIELDS = [(name, ctypes.c_int64) for name in ("numbers", "is_per_image")]  # of the struct Addend, pointers as integers


def struct_of(name: str, fields: list[tuple[str, type]]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def check_addend(fields: list[tuple[str, type]]) -> None:
    """Compare `fields` with those of Addend in C, and all else with itself."""
    others = tuple(struct for struct in structs.STRUCTS if struct is not structs.Addend)
    known = layout_in_c(library.compiled())
    constants = {name: known[name] for name in ("DEPTH", "TILE_SIZE", "UNPACKED_WIDTHS", "MIN_SCALE")}
    check_layout(library.compiled(), (*others, struct_of("Addend", fields)), constants)


@needs_x86
def test_the_fields_that_c_has_pass() -> None:
    check_addend(FIELDS)


@needs_x86
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([*FIELDS, ("more", ctypes.c_int64)], "Addend size: 16 in C, 24 in Python; Addend.more end: nothing in C"),
        (FIELDS[:1], "Addend size: 16 in C, 8 in Python; Addend.is_per_image end: 16 in C, nothing in Python"),
        (FIELDS[::-1], "Addend.is_per_image end: 16 in C, 8 in Python"),
        ([FIELDS[0], ("is_per_image", ctypes.c_int32)], "Addend.is_per_image end: 16 in C, 12 in Python"),
        ([FIELDS[0], ("is_per_layer", ctypes.c_int64)], "Addend.is_per_layer end: nothing in C, 16 in Python"),
    ],
    ids=["one more", "one less", "in another order", "of another type", "of another name"],
)
def test_a_wrong_field_is_an_error(fields: list[tuple[str, type]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        check_addend(fields)


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (library, "STRUCTS", structs.STRUCTS[1:]),
        (library, "DEPTH", 8),
        (library, "TILE_SIZE", 6),
        (library, "MIN_SCALE", 1e-13),
        (library, "WEIGHT_BITS", (2, 3, 4, 8)),
        (attention, "Shape", struct_of("Shape", [("batch", ctypes.c_int64)])),
        (weights, "WEIGHT_BITS", (2, 3, 4, 8)),
        (weights, "MIN_SCALE", 1e-13),
        (weights, "block_shape", lambda bits: (8, bits)),
    ],
)
def test_a_library_is_compared_when_it_is_loaded(
    module: ModuleType, name: str, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(module.library(), str):
        pytest.skip(module.library())
    monkeypatch.setattr(module, name, wrong)
    module.library.cache_clear()
    with pytest.raises(RuntimeError, match="must agree"):
        module.library()
    monkeypatch.undo()
    assert not isinstance(module.library(), str)


def test_all_structs_of_a_kernel_are_compared() -> None:
    ours = "diffusers_pqcad.kernels.x86."  # all its files are imported with the kernel
    found = {each for each in ctypes.Structure.__subclasses__() if each.__module__.startswith(ours)}
    assert found == {*structs.STRUCTS, attention.Shape}  # each with the C file that it is for


def test_places_are_in_bytes() -> None:
    struct = struct_of("Two", [("first", ctypes.c_int8), ("second", ctypes.c_int32)])
    assert layout_of(struct) == {
        "Two size": 8, "Two.first start": 0, "Two.first end": 1, "Two.second start": 4, "Two.second end": 8,
    }  # fmt: skip
