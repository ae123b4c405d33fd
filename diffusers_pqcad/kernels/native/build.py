"""Commands of setuptools that put the compiled libraries into a wheel (`cmdclass` in setup.cfg).

A build imports this file alone, by its path, and neither the package nor PyTorch. Where the libraries cannot be built,
the wheel is a pure one for any platform, and a warning says so.
"""

import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

COMPILERS = ("gcc", "cc")
FOLDER = Path("diffusers_pqcad", "kernels", "shipped")

logger = logging.getLogger(__name__)


def module_beside(name: str) -> ModuleType:
    """Return the module `name` of this folder, without its package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_for_this_platform() -> bool:
    """Return whether the libraries are for this platform at all: x86-64 Linux."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 2**32


def gcc() -> str:
    """Return GCC: what CC names, else the first on the path. Raises OSError where there is none.

    Clang calls an OpenMP of its own, and PyTorch's has no such functions.
    """
    names = (os.environ["CC"],) if os.environ.get("CC") else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise OSError(f"no C compiler was found ({' or '.join(names)})")
    macros = subprocess.run([found, "-dM", "-E", "-xc", os.devnull], capture_output=True, check=True).stdout
    if b"__clang__" in macros:
        raise OSError(f"{found} is clang, and the libraries need GCC")
    return found


def build_into(folder: Path) -> bool:
    """Build the libraries, and nothing else, in `folder`; return whether they could be, after a warning if not."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
    if not is_for_this_platform():
        return False
    try:
        compiler = gcc()
        folder.mkdir(parents=True)
        for path in module_beside("variants").build(compiler, folder):
            logger.info("built %s", path)
        return True
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()[-500:]
    except OSError as error:
        reason = str(error)
    shutil.rmtree(folder, ignore_errors=True)
    logger.warning(
        "This wheel of diffusers-pqcad carries no compiled kernels: %s. It works; they are compiled on first use "
        "where there is a compiler then, and else models are slower.",
        reason,
    )
    return False


class BuildPy(build_py):
    """Python files, and beside them the libraries, except in a checkout that is installed as editable."""

    def run(self) -> None:
        """Copy and compile."""
        super().run()
        if not self.editable_mode:
            build_into(Path(self.build_lib) / FOLDER)


class BdistWheel(bdist_wheel):
    """A wheel for all versions of Python: of this platform where it carries libraries, else of any."""

    def run(self) -> None:
        """Build first, for what was built decides what kind of wheel it is."""
        self.run_command("build")
        has_libraries = (Path(self.get_finalized_command("build").build_lib) / FOLDER).is_dir()
        self.distribution.has_ext_modules = lambda: has_libraries
        self.root_is_pure = not has_libraries
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags: the libraries know nothing of Python."""
        *_, platform_tag = super().get_tag()
        return "py3", "none", platform_tag
