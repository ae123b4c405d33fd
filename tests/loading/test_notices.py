"""What other libraries say at their import, and our users do not read."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import diffusers_pqcad  # noqa: F401 (it quietens torchao)

ROOT = Path(__file__).parents[2]
TORCHAO = """
import logging
logger = logging.getLogger(__name__)
logger.warning("Failed to load /somewhere/_C_cutlass_90a.abi3.so: libcudart.so.13: cannot open shared object file")
logger.warning("Skipping import of cpp extensions due to incompatible torch version.")
logger.warning("something else")
"""


def test_torchaos_lines_about_its_libraries_are_left_out_and_others_stay(tmp_path):
    """A stand-in whose import says what that of torchao 0.18 says; diffusers may import it before or after ours."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text(TORCHAO)
    code = "from diffusers_pqcad.loading.notices import quieten_torchao_; quieten_torchao_(); import torchao"
    code = f"import sys; sys.orig_argv = ['python', 'pqcad', '--help']; {code}"  # without diffusers: it takes seconds
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "something else\n")


def test_importing_the_package_does_it():
    logger = logging.getLogger("torchao")
    record = logger.makeRecord("torchao", logging.WARNING, "", 0, "Failed to load %s: %s", ("x.so", "no"), None)
    assert not logger.filter(record)
