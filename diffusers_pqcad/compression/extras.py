"""Packages that loading and sampling do without: measuring, plots, adapters and the examples ask for them first."""

from importlib.util import find_spec


class MissingExtraError(ModuleNotFoundError):
    """A package of an extra (`pip install "diffusers-pqcad[eval]"`) that is not installed."""


def missing(*modules: str) -> list[str]:
    """Return those of `modules` that are not installed; of "a.b", a is imported, and nothing else."""
    return [module for module in modules if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of "a.b", a
        return False


def require(extra: str, *modules: str) -> None:
    """Raise MissingExtraError, with the line that installs `extra` of setup.cfg, unless all `modules` are installed.

    To be called before the work at whose end they are imported.
    """
    absent = missing(*modules)
    if absent:
        raise MissingExtraError(
            f"{', '.join(absent)}: not installed, and needed later. Install the extra {extra!r}: "
            f'pip install "diffusers-pqcad[{extra}]" (in a clone: pip install -e ".[{extra}]").'
        )
