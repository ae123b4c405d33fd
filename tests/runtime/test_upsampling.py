"""Specification of fused upsampling: what its modules compute, or what hooks on them ask for."""

from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from fused_blocks import copy_of
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels.x86.library import compiled, library
from diffusers_pqcad.runtime.upsampling import FusedUpsample2D

pytestmark = pytest.mark.skipif(
    isinstance(library(), str) or not compiled().has_vnni(), reason="tiles of doubled images are for VNNI"
)


def block_of(*, bits: int = 4, **settings: Any) -> Upsample2D:
    torch.manual_seed(0)
    model = nn.ModuleList([Upsample2D(**{"channels": 16, "use_conv": True} | settings)]).eval().requires_grad_(False)
    return quantize_(model, PQCADConfig(method="fixed", weight_bits=bits))[0]


def image(*size: int) -> Tensor:
    return torch.randn(size or (2, 16, 5, 6))


def runs(block: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
    """The output of a call, and how many plans it ran."""
    from diffusers_pqcad.runtime import upsampling

    with mock.patch.object(upsampling, "run_call", wraps=upsampling.run_call) as run:
        return block(*args, **kwargs), run.call_count


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 16, 1, 1), (2, 16, 5, 6), (1, 16, 17, 8)])
def test_it_is_what_its_modules_compute(size: tuple[int, ...]) -> None:
    block, x = block_of(), image(*size)
    found, count = runs(block, x)
    with kernels.use("reference"):
        wanted, of_reference = runs(block, x)
    assert (count, of_reference) == (1, 0)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_sizes_than_the_double_are_left_to_diffusers() -> None:
    block, x = block_of(), image()
    found, count = runs(block, x, (9, 11))
    assert (found.shape, count) == ((2, 16, 9, 11), 0)
    assert runs(block, x, output_size=(9, 11))[0].equal(found)


@torch.no_grad()
def test_hooks_and_gradients_are_heard() -> None:
    block, seen = block_of(), []
    handle = block.conv.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    assert runs(block, image())[1] == 0
    assert seen == [(2, 16, 10, 12)]
    handle.remove()
    assert runs(block, image())[1] == 1
    with torch.enable_grad():
        output, count = runs(block, image().requires_grad_())
    assert count == 0
    assert output.requires_grad


@pytest.mark.parametrize(
    "settings", [{"use_conv": False}, {"name": "Conv2d_0"}, {"kernel_size": 1, "padding": 0}, {"channels": 12}]
)
def test_blocks_of_another_kind_keep_their_class(settings: dict[str, Any]) -> None:
    """Without a convolution, with one of another name or size, or with few channels."""
    assert type(block_of(**settings)) is Upsample2D


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"norm_type": "rms_norm", "eps": 1e-6, "elementwise_affine": True}])
def test_a_norm_before_it_is_computed(settings: dict[str, Any]) -> None:
    block = block_of(**settings)
    assert runs(block, image())[1] == 0


@torch.no_grad()
def test_a_compiled_block_is_one_operator() -> None:
    block, x = block_of(), image()
    compiled_block = torch.compile(copy_of(block), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled_block(x), block(x), rtol=0, atol=0)


@torch.no_grad()
def test_the_decoder_of_an_autoencoder_has_no_upsampled_image() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
    ).eval()  # fmt: skip
    latents = torch.randn(1, 4, 8, 8)
    expected = vae.decode(latents).sample
    quantize_(vae, PQCADConfig(method="fixed", weight_bits=8))
    assert [type(module) for module in vae.modules() if isinstance(module, Upsample2D)] == [FusedUpsample2D]
    with mock.patch("torch.nn.functional.interpolate") as interpolate:
        found = vae.decode(latents).sample
    assert not interpolate.called
    assert (found - expected).norm() < 5e-2 * expected.norm()
