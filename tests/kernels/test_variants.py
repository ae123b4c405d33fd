"""Specification of the libraries that a wheel carries: the best one for a CPU, whole, of this source, and right."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels import cpu, native, onednn
from diffusers_pqcad.kernels.native import crc32, openmp, variants, weights
from diffusers_pqcad.kernels.x86 import attention, library
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.numerics.packing import pack_levels
from diffusers_pqcad.numerics.qparams import WeightSpec, min_max_weight_scale, quantize_weight

MODULES = (attention, crc32, library, weights)
FILES = [(file, name) for file, names in variants.LIBRARIES.items() for name in names]
needs_gcc = pytest.mark.skipif(
    sys.platform != "linux"
    or isinstance(library.library(), str)
    or hasattr(library.library(), "__kmpc_fork_call")
    or bool(os.environ.get(native.FLAGS_VARIABLE)),
    reason="needs Linux, AVX2 and GCC, and no CFLAGS, with which no shipped library is loaded",
)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a wheel's libraries, with nothing in it; all C files are loaded anew."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(variants, "SHIPPED", folder)
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)
    loaders = (native.library, *(module.library for module in MODULES))
    for loader in loaders:
        loader.cache_clear()
    yield folder
    for loader in loaders:
        loader.cache_clear()


def ship_(folder: Path, source: Path, name: str) -> Path:
    """Put the variant `name` of `source` into `folder`: built once, as its name says all that it depends on."""
    built = native.cache_folder() / "of-tests" / variants.file_name(source, name)
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        own = built.with_suffix(f".{os.getpid()}")  # another process may build the same
        variants.build_variant(str(native.compiler()), source, variants.VARIANTS[name], own)
        own.replace(built)
    (folder / built.name).write_bytes(built.read_bytes())
    return folder / built.name


def no_compiler_(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.parametrize(("file", "name"), FILES)
def test_flags_are_for_a_kind_of_cpu_and_for_no_single_one(file: str, name: str) -> None:
    assert (variants.CSRC / file).is_file()
    flags = (*variants.VARIANTS[name].flags, *variants.FLAGS)
    assert [flag for flag in flags if flag.startswith(("-march", "-mtune"))][0].startswith("-march=x86-64-v")
    assert not [flag for flag in flags if "native" in flag]


def test_every_c_file_that_is_loaded_is_shipped() -> None:
    assert {module.SOURCE.name for module in MODULES} == variants.LIBRARIES.keys()
    assert {path.name for path in variants.CSRC.glob("*.c")} == variants.LIBRARIES.keys()


CASES = {
    "AVX2": (variants.AVX2.cpu_flags, "layers.c", "avx2"),
    "a laptop": (variants.AVX_VNNI.cpu_flags | {"sse"}, "layers.c", "avxvnni"),
    "both kinds of VNNI": (variants.AVX512_VNNI.cpu_flags | {"avx_vnni"}, "layers.c", "avx512vnni"),
    "AVX-512 without VNNI": (variants.AVX512_VNNI.cpu_flags - {"avx512_vnni"}, "layers.c", "avx2"),
    "without AVX2": (variants.AVX2.cpu_flags - {"avx2"}, "layers.c", None),
    "unknown": (frozenset(), "layers.c", None),
    "bf16": (variants.AVX512_BF16.cpu_flags, "attention.c", "avx512bf16"),
    "no bf16": (variants.AVX512_VNNI.cpu_flags, "attention.c", "avx2"),
}


@pytest.mark.parametrize(("flags", "file", "name"), CASES.values(), ids=CASES)
def test_the_best_variant_for_the_cpu_is_taken(flags: frozenset, file: str, name: str | None, shipped: Path) -> None:
    source = variants.CSRC / file
    for each in variants.LIBRARIES[file]:
        (shipped / variants.file_name(source, each)).touch()
    expected = None if name is None else shipped / variants.file_name(source, name)
    assert variants.shipped_for(source, flags) == expected


def test_a_checkout_and_other_files_have_none(shipped: Path, tmp_path: Path) -> None:
    flags = variants.AVX512_BF16.cpu_flags
    assert variants.shipped_for(library.SOURCE, flags) is None
    (shipped / variants.file_name(library.SOURCE, "avx512vnni")).touch()
    other = tmp_path / library.SOURCE.name
    other.write_text("int answer(void) { return 42; }\n")
    assert variants.shipped_for(other, flags) is None


def change_text_(monkeypatch: pytest.MonkeyPatch) -> None:
    text = variants.text_beside(library.SOURCE)
    monkeypatch.setattr(variants, "text_beside", lambda source: text + b" ")


def change_flags_(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = variants.AVX2._replace(flags=(*variants.AVX2.flags, "-g"))
    monkeypatch.setitem(variants.VARIANTS, "avx2", changed)


def change_all_flags_(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "FLAGS", (*variants.FLAGS, "-g"))


@pytest.mark.parametrize("change_", [change_text_, change_flags_, change_all_flags_])
def test_a_library_of_another_source_or_other_flags_is_not_found(
    change_: Callable[[pytest.MonkeyPatch], None], shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shipped / variants.file_name(library.SOURCE, "avx2")
    path.touch()
    assert variants.shipped_for(library.SOURCE, variants.AVX2.cpu_flags) == path
    change_(monkeypatch)
    assert variants.shipped_for(library.SOURCE, variants.AVX2.cpu_flags) is None


def layers() -> list[tuple[QuantizedLayer, torch.Tensor]]:
    found = []
    for bits in (2, 4, 8):
        conv, wide = PQCADConv2d(52, 70, 3, padding=1), PQCADConv2d(20, 40, 3, stride=2)
        linear = PQCADLinear(100, 70)
        inputs = (torch.randn(2, 52, 9, 7), torch.randn(1, 20, 8, 8), torch.randn(3, 11, 100))
        for layer, x in zip((conv, wide, linear), inputs, strict=True):
            layer.pack_(WeightSpec(bits), activation_bits=8)
            found.append((layer.requires_grad_(False), x))
    return found


@needs_gcc
@pytest.mark.parametrize("name", variants.LIBRARIES["layers.c"])
@torch.no_grad()
def test_every_variant_computes_what_the_reference_does(
    name: str, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced, as on a CPU that has no more."""
    flags = variants.VARIANTS[name].cpu_flags
    if not flags <= cpu.flags():
        pytest.skip(f"this CPU is not one of {name}")
    path = ship_(shipped, library.SOURCE, name)
    monkeypatch.setattr(cpu, "flags", lambda: flags)
    monkeypatch.setattr(onednn, "saturates", lambda: name == "avx2")
    no_compiler_(monkeypatch)
    assert library.compiled()._name == str(path)
    assert bool(library.compiled().has_vnni()) == (name != "avx2")
    for layer, x in layers():
        with kernels.use("reference"):
            expected = layer(x)
        with kernels.use("x86"):
            actual = layer(x)
        rounds_once_more = layer.operation().spec.bits == 8 and layer.packed_for("x86").of_kind[False].is_winograd
        tolerance = 2e-2 if rounds_once_more else 1e-4
        assert (actual - expected).norm() < tolerance * expected.norm(), (layer, layer.operation().spec)


@needs_gcc
@pytest.mark.parametrize("name", variants.LIBRARIES["weights.c"])
def test_weights_are_packed_as_pytorch_packs_them(name: str, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = variants.VARIANTS[name].cpu_flags
    if not flags <= cpu.flags():
        pytest.skip(f"this CPU is not one of {name}")
    path = ship_(shipped, weights.SOURCE, name)
    monkeypatch.setattr(cpu, "flags", lambda: flags)
    no_compiler_(monkeypatch)
    weight = torch.randn(37, 101)
    for bits in (2, 3, 4, 6, 8):
        spec = WeightSpec(bits)
        packed, scale, _ = weights.quantize(weight, spec)
        assert torch.equal(scale, min_max_weight_scale(weight, spec))
        assert torch.equal(packed, pack_levels(quantize_weight(weight, scale, spec), spec))
    assert weights.library()._name == str(path)


@needs_gcc
@pytest.mark.parametrize("name", variants.LIBRARIES["attention.c"])
def test_attention_is_that_of_pytorch(name: str, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = variants.VARIANTS[name].cpu_flags
    if not flags <= cpu.flags():
        pytest.skip(f"this CPU is not one of {name}")
    ship_(shipped, attention.SOURCE, name)
    monkeypatch.setattr(cpu, "flags", lambda: flags)
    no_compiler_(monkeypatch)
    if name == "avx2":
        assert attention.library() == attention.NO_BF16
        return
    q, k, v = torch.randn(3, 1, 19, 32)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention.attention(q, k, v, 1), expected, rtol=2e-2, atol=2e-2)
    assert attention.available()


@needs_gcc
def test_flags_of_the_user_are_compiled(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ship_(shipped, crc32.SOURCE, "avx2")
    assert crc32.library()._name == str(path)
    crc32.library.cache_clear()
    native.library.cache_clear()
    monkeypatch.setenv(native.FLAGS_VARIABLE, "-O1")
    assert Path(crc32.library()._name).parent == native.cache_folder()


def cut_(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def strip_(path: Path) -> None:
    """As a tool that removes symbols would, and our digest with them."""
    path.write_bytes(path.read_bytes()[: -variants.DIGEST_BYTES])


@needs_gcc
@pytest.mark.parametrize("damage_", [cut_, flip_, strip_])
def test_a_damaged_one_is_named_and_compiled_here_or_refused(
    damage_: Callable[[Path], None], shipped: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    path = ship_(shipped, crc32.SOURCE, "avx2")
    damage_(path)
    assert Path(crc32.library()._name).parent == native.cache_folder()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{path} is damaged" in record.getMessage()
    crc32.library.cache_clear()
    native.library.cache_clear()
    no_compiler_(monkeypatch)
    assert crc32.library() == native.NO_COMPILER


@needs_gcc
def test_without_an_openmp_of_pytorch_none_is_loaded(shipped: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def none_there() -> str:
        raise OSError("this PyTorch has no OpenMP")

    monkeypatch.setattr(openmp, "share", none_there)
    ship_(shipped, crc32.SOURCE, "avx2")
    assert Path(crc32.library()._name).parent == native.cache_folder()
    assert "no OpenMP" in caplog.text


THREADS = """
import json, os, sys
from pathlib import Path
import torch
from diffusers_pqcad.kernels.native import openmp, variants, weights
from diffusers_pqcad.numerics.qparams import WeightSpec
variants.SHIPPED = Path(sys.argv[1])
torch.set_num_threads(2)
torch.randn(2**21).sin()
def threads(): return len(os.listdir("/proc/self/task"))
def runtimes(): return sorted({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1]})
before, had = threads(), runtimes()
weight = torch.randn(512, 512)
weights.quantize(weight, WeightSpec(4))
found = {"threads": [before, threads()], "runtimes": [had, runtimes()], "library": weights.library()._name}
found["asked"] = []
for number in (1, 2):
    torch.set_num_threads(number)
    found["asked"].append(weights.library().max_threads())
child = os.fork()
if not child:
    weights.quantize(weight, WeightSpec(4))
    os._exit(0)
print(json.dumps(found | {"shared": openmp.share(), "status": os.waitpid(child, 0)[1]}))
"""


@needs_gcc
def test_threads_are_those_of_pytorch_and_no_others(shipped: Path) -> None:
    """One OpenMP, its threads started by PyTorch and used by us, as many as PyTorch is told; and forks go on."""
    path = ship_(shipped, weights.SOURCE, weights_for_this_cpu())
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "CC")}
    environment |= {"PATH": "", native.CACHE_VARIABLE: "/proc/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(shipped)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["library"] == str(path)
    assert found["asked"] == [1, 2]
    assert found["threads"][0] == found["threads"][1]
    assert found["runtimes"][0] == found["runtimes"][1] == [found["shared"]]
    assert found["status"] == 0


def weights_for_this_cpu() -> str:
    names = variants.LIBRARIES[weights.SOURCE.name]
    return next(name for name in names if variants.VARIANTS[name].cpu_flags <= cpu.flags())
