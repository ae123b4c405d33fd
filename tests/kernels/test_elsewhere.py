"""On Windows and macOS the compiled kernels refuse, with the reason, and all else works.

Each in a process of its own that takes itself for one there: by the names that Python has for it, and without what
only Unix has.
"""

import json
import os
import subprocess
import sys

import pytest

from diffusers_pqcad.kernels import native

PROGRAM = """
import json, logging, os, sys
import torch, diffusers, transformers
from torch import nn
system, lacks = sys.argv[1], sys.argv[2:]
sys.platform = system
for name in lacks:
    delattr(os, name)
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels.native import crc32
from diffusers_pqcad.kernels.x86 import absence, attention, library

torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).eval(), torch.randn(3, 64)
with torch.no_grad():
    expected = model(x)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    error = ((model(x) - expected).norm() / expected.norm()).item()
    try:
        with kernels.use("x86"):
            model(x)
        refused = None
    except ValueError as problem:
        refused = str(problem)
    state = model.state_dict()
found = [module.library() for module in (library, attention, crc32)]
operations = [layer.operation() for layer in model]
print(json.dumps({"found": found, "refused": refused, "error": error, "absence": absence(),
                  "summary": kernels.summary(operations), "crc": crc32.crc32(torch.arange(100.0))}))
"""
UNIX = ("fork", "getuid", "register_at_fork")


@pytest.mark.parametrize(("system", "lacks"), [("win32", UNIX), ("darwin", ())])
def test_compiled_kernels_refuse_with_the_reason_and_the_rest_works(system: str, lacks: tuple[str, ...]) -> None:
    if not all(hasattr(os, name) for name in lacks):
        pytest.skip("this is such a system")
    done = subprocess.run([sys.executable, "-c", PROGRAM, system, *lacks], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["found"] == [native.NOT_HERE] * 3
    assert f"the kernel 'x86' was forced, but {native.NOT_HERE}" in found["refused"]
    assert found["error"] < 0.02
    assert found["absence"] is None  # no compiler would help
    assert "compiler" not in found["summary"] + done.stderr
