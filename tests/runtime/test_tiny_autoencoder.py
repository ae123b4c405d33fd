"""Specification of fused blocks of small autoencoders: what their modules compute, or what hooks on them ask for."""

from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from fused_blocks import copy_of
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels.x86.library import compiled, library
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.runtime import tiny_autoencoder
from diffusers_pqcad.runtime.tiny_autoencoder import FusedAutoencoderTinyBlock, FusedDecoderTiny

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))
needs_vnni = pytest.mark.skipif(
    isinstance(library(), str) or not compiled().has_vnni(), reason="tiles of doubled images are for VNNI"
)


def block_of(in_channels: int = 16, out_channels: int = 16, activation: str = "relu") -> AutoencoderTinyBlock:
    torch.manual_seed(0)
    model = nn.ModuleList([AutoencoderTinyBlock(in_channels, out_channels, activation)]).eval().requires_grad_(False)
    block = quantize_(model, PQCADConfig(method="fixed", weight_bits=4))[0]
    if {layer.kernel_name() for layer in packed_layers(model).values()} != {"x86"}:
        pytest.skip("no kernel takes blocks on this computer")
    return block


def autoencoder(**settings: Any) -> AutoencoderTiny:
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), **settings,
    ).eval().requires_grad_(False)  # fmt: skip
    return quantize_(vae, PQCADConfig(method="fixed", weight_bits=4))


def runs(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The output of a call, and how many calls of the kernel its blocks made by themselves."""
    with mock.patch.object(tiny_autoencoder, "run_call", wraps=tiny_autoencoder.run_call) as run:
        return module(x), run.call_count


@torch.no_grad()
@pytest.mark.parametrize(("channels", "calls"), [((16, 16), 3), ((16, 24), 4), ((5, 7), 4), ((24, 16), 4)])
def test_a_block_is_what_its_modules_compute(channels: tuple[int, int], calls: int) -> None:
    block, x = block_of(*channels), torch.randn(2, channels[0], 7, 9)
    found, count = runs(block, x)
    assert count == calls
    with kernels.use("reference"):
        wanted, of_reference = runs(block, x)
    assert of_reference == 0
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found.min() == 0


@torch.no_grad()
def test_a_number_that_is_none_stays() -> None:
    block, x = block_of(), torch.randn(1, 16, 6, 6)
    x[0, 0, 0, 0] = torch.nan
    assert runs(block, x)[0].isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv", "conv.1", "conv.2", "skip", "fuse"])
def test_hooks_are_heard(name: str) -> None:
    block, x = block_of(), torch.randn(1, 16, 6, 6)
    wanted = runs(block, x)[0]
    seen: list[nn.Module] = []
    handle = block.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(module))
    found, count = runs(block, x)
    assert count == 0
    assert seen
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert runs(block, x)[1] == 3


@torch.no_grad()
def test_other_activations_are_left_to_their_modules() -> None:
    block, x = block_of(activation="gelu"), torch.randn(1, 16, 6, 6)
    assert runs(block, x)[1] == 0


@torch.no_grad()
def test_a_skip_of_another_size_is_refused_with_the_layer() -> None:
    block = block_of(16, 24)
    block.skip = nn.Identity()
    with pytest.raises(ValueError, match="expected a skip of"):
        block(torch.randn(1, 16, 6, 6))


@torch.no_grad()
def test_a_compiled_block_is_one_operator() -> None:
    block, x = block_of(), torch.randn(2, 16, 5, 6)
    compiled_block = torch.compile(copy_of(block), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled_block(x), block(x), rtol=0, atol=0)


@needs_vnni
@torch.no_grad()
def test_a_decoder_has_no_upsampled_image() -> None:
    vae, latents = autoencoder(), torch.randn(2, 4, 6, 7)
    assert isinstance(vae.decoder, FusedDecoderTiny)
    assert sum(isinstance(module, FusedAutoencoderTinyBlock) for module in vae.modules()) == 4
    with kernels.use("reference"):
        wanted = vae.decode(latents).sample
    with mock.patch("torch.nn.functional.interpolate") as interpolate:
        found = vae.decode(latents).sample
    assert not interpolate.called
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@needs_vnni
@torch.no_grad()
def test_hooks_on_what_the_decoder_passes_by_are_heard() -> None:
    vae, latents = autoencoder(), torch.randn(1, 4, 6, 6)
    wanted, count = runs(vae.decoder, latents)
    upsample = next(module for module in vae.decoder.modules() if isinstance(module, nn.Upsample))
    for module in (upsample, vae.decoder.layers, FusedDecoderTiny.first_layer(vae.decoder)):
        seen: list[nn.Module] = []
        handle = module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(module))
        found, fewer = runs(vae.decoder, latents)
        handle.remove()
        assert seen == [module]
        assert fewer == count - 1
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@needs_vnni
@torch.no_grad()
@pytest.mark.parametrize("settings", [{"upsampling_scaling_factor": 3}, {"upsample_fn": "bilinear"}])
def test_other_upsampling_is_left_to_its_module(settings: dict[str, Any]) -> None:
    vae, latents = autoencoder(**settings), torch.randn(1, 4, 6, 6)
    with kernels.use("reference"):
        wanted = vae.decoder(latents)
    found, count = runs(vae.decoder, latents)
    assert count == 2 * 3  # both blocks
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@needs_vnni
@torch.no_grad()
def test_a_compiled_decoder_is_one_graph() -> None:
    vae, latents = autoencoder(), torch.randn(1, 4, 6, 6)
    graph = torch.compile(vae.decoder.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(latents), DecoderTiny.forward(vae.decoder, latents), rtol=1e-5, atol=1e-5)
