"""CRC-32 of tensors: zlib's number for their bytes, by C code and without."""

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_pqcad.kernels import native
from diffusers_pqcad.kernels.native import crc32

pytestmark = pytest.mark.fast


@given(size=st.integers(0, 400), start=st.integers(0, 2**32 - 1), seed=st.integers(0, 10))
def test_it_is_the_number_of_zlib_for_any_size_and_start(size: int, start: int, seed: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert crc32.crc32(data, start) == zlib.crc32(data.numpy().tobytes(), start)


@pytest.mark.parametrize("compiled", [True, False], ids=["C", "zlib"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(1_000_003, dtype=torch.int32),
        torch.linspace(-1, 1, 777).bfloat16().reshape(7, 111),
        torch.arange(600.0).reshape(20, 30).T,
        torch.tensor(5),
        torch.empty(0, 3),
    ],
    ids=["large", "bf16", "transposed", "0-dim", "empty"],
)
def test_it_is_over_bytes_in_row_major_order(
    tensor: torch.Tensor, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(crc32, "library", lambda: native.NO_COMPILER)
    elif isinstance(crc32.library(), str):
        pytest.skip(str(crc32.library()))
    expected = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    assert crc32.crc32(tensor) == zlib.crc32(expected)


def test_an_x86_cpu_folds() -> None:
    """Or the two tests above would compare zlib with itself."""
    loaded = crc32.library()
    if isinstance(loaded, str) or " pclmulqdq " not in open("/proc/cpuinfo").read():
        pytest.skip("no compiler, or no carry-less multiplication")
    data, folded = torch.zeros(128, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    assert loaded.fold(data.data_ptr(), 128, 0, folded.data_ptr()) == 1
