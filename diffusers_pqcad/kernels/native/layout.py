"""What Python and compiled C must agree about: sizes of structs, places of their fields, and constants.

With one field too many, or in another place, C would read and write memory that is not its own: so each library is
asked when it is loaded (csrc/layout.h).
"""

import ctypes
from collections.abc import Mapping


class Entry(ctypes.Structure):
    """A name and its value: as `Entry` in csrc/layout.h."""

    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_double)]


def layout_in_c(library: ctypes.CDLL) -> dict[str, float]:
    """Return what `library` exports by EXPORT_LAYOUT."""
    entries = ctypes.POINTER(Entry)()
    library.layout.restype = ctypes.c_int64
    return {entry.name.decode(): entry.value for entry in entries[: library.layout(ctypes.byref(entries))]}


def layout_of(struct: type[ctypes.Structure]) -> dict[str, float]:
    """Return the size of `struct` and the places of its fields in bytes, by the names that C has for them."""
    places = {f"{struct.__name__} size": float(ctypes.sizeof(struct))}
    for name, *_ in struct._fields_:
        field = getattr(struct, name)
        places[f"{struct.__name__}.{name} start"] = field.offset
        places[f"{struct.__name__}.{name} end"] = field.offset + field.size
    return places


def check_layout(
    library: ctypes.CDLL,
    structs: tuple[type[ctypes.Structure], ...] = (),
    constants: Mapping[str, float] | None = None,
) -> None:
    """Raise RuntimeError where `library` has other structs or other constants than these: a defect of this package."""
    wanted = dict(constants or {})
    for struct in structs:
        wanted |= layout_of(struct)
    found = layout_in_c(library)
    differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if differing:
        listed = "; ".join(f"{name}: {shown(found, name)} in C, {shown(wanted, name)} in Python" for name in differing)
        raise RuntimeError(
            f"{library._name}: compiled C and Python must agree about structs and constants, but have {listed}. This "
            "is a defect of diffusers-pqcad; please report it."
        )


def shown(layout: Mapping[str, float], name: str) -> str:
    """Return the value of `name` as text."""
    return f"{layout[name]:g}" if name in layout else "nothing"
