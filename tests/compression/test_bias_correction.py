"""Bias correction: after it, every layer's mean output is the full-precision one, for the samples it was given."""

import copy

import pytest
import torch

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.compression.fake_quant import fake_quant_layers, prepare_
from diffusers_pqcad.compression.reconstruction import channel_mean, correct_biases_, execution_order
from diffusers_pqcad.loading.convert import match_modules


@pytest.fixture
def pair(tiny_unet):
    """A full-precision UNet, its 3-bit copy, and some samples at mixed timesteps."""
    reference = tiny_unet.eval()
    model = copy.deepcopy(reference)
    config = PQCADConfig(weight_bits=3)
    prepare_(model, config, dict.fromkeys(match_modules(model, config), 3))
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(4, 1, 8, 8, generator=generator)
    return model, reference, sample, torch.tensor([3, 250, 600, 999])


def channel_means(model, names, sample, timestep):
    """The mean output of each named layer in one whole pass, (C_out,) each."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, output, name=name: seen.update({name: channel_mean(output, layer)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(sample, timestep)
    for hook in hooks:
        hook.remove()
    return seen


def test_channel_mean_by_hand():
    conv, linear = torch.nn.Conv2d(1, 2, 1), torch.nn.Linear(1, 2)
    image = torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]], [[[5.0, 7.0]], [[2.0, 4.0]]]])  # (2, 2, 1, 2)
    assert channel_mean(image, conv).tolist() == [4.0, 2.0]
    assert channel_mean(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]), linear).tolist() == [2.0, 4.0]


def test_the_means_agree_afterwards_and_did_not_before(pair):
    model, reference, sample, timestep = pair
    layers = fake_quant_layers(model)
    names = [name for name in layers if layers[name].bias is not None]
    wanted = channel_means(reference, names, sample, timestep)
    before = channel_means(model, names, sample, timestep)
    order = execution_order(layers, lambda: model(sample[:1], timestep[:1]))
    correct_biases_(model, reference, order, lambda network: network(sample, timestep))
    after = channel_means(model, names, sample, timestep)
    assert max((before[name] - wanted[name]).abs().max() for name in names) > 1e-2
    for name in names:
        torch.testing.assert_close(after[name], wanted[name], atol=2e-5, rtol=1e-4)


def test_only_biases_change_and_the_reference_does_not(pair):
    model, reference, sample, timestep = pair
    before, untouched = copy.deepcopy(model.state_dict()), copy.deepcopy(reference.state_dict())
    order = execution_order(fake_quant_layers(model), lambda: model(sample[:1], timestep[:1]))
    correct_biases_(model, reference, order, lambda network: network(sample, timestep))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.endswith(".bias") for name in changed)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in reference.state_dict().items())
