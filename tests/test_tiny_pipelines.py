"""What the tiny pipelines promise to the tests that use them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines import PIPELINES, PIXELS, together
from torch import Tensor, nn

STEPS = 2
WITHOUT_LATENTS = ("ddim", "ddpm", "dit")
# The denoiser's calls in 2 steps, and the states in each: twice as many as images where guidance doubles them.
CALLS = dict.fromkeys(PIPELINES, (2, 4)) | {
    "ddim": (2, 2),
    "ddpm": (2, 2),
    "sd_img2img": (1, 4),  # strength 0.5
    "flux": (2, 2),
    "wan": (4, 2),
}


def sample(pipeline: Any, kind: str, indices: list[int], seeds: list[int], **arguments: Any) -> Tensor:
    """Return the latents, or the images where the pipeline does not give latents, for some of the kind's inputs."""
    output = pipeline(
        **together([PIPELINES[kind].inputs[index] for index in indices]) | PIPELINES[kind].arguments | arguments,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np" if kind in WITHOUT_LATENTS else "latent",
        return_dict=False,
    )[0]
    return torch.as_tensor(output)


def first_outputs(pipeline: Any, kind: str, index: int, seed: int, **arguments: Any) -> Tensor:
    """Return what the denoiser answers in its first call for one image."""
    outputs = []
    hook = getattr(pipeline, PIPELINES[kind].denoiser).register_forward_hook(
        lambda module, inputs, output: outputs.append(output[0])
    )
    sample(pipeline, kind, [index], [seed], **arguments)
    hook.remove()
    return outputs[0]


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", PIPELINES)
def test_outputs_are_finite_differ_between_inputs_and_repeat(kind: str) -> None:
    pipeline = PIPELINES[kind].build()
    seeds = [0, 0] if any(PIPELINES[kind].inputs) else [0, 1]  # inputs, or noises where there are none
    outputs = sample(pipeline, kind, [0, 1], seeds)
    assert outputs.isfinite().all()
    assert difference(outputs[0], outputs[1]) > 1e-2
    torch.testing.assert_close(sample(pipeline, kind, [0, 1], seeds), outputs, rtol=0, atol=0)
    torch.testing.assert_close(sample(PIPELINES[kind].build(), kind, [0, 1], seeds), outputs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", PIPELINES)
def test_saved_pipeline_gives_the_same(kind: str, tmp_path: Path) -> None:
    pipeline = PIPELINES[kind].build()
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipeline)
    expected = sample(pipeline, kind, [0, 1], [0, 1])
    torch.testing.assert_close(sample(loaded, kind, [0, 1], [0, 1]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in PIPELINES if any(PIPELINES[kind].inputs)])
def test_denoiser_tells_all_inputs_apart(kind: str) -> None:
    pipeline = PIPELINES[kind].build()
    outputs = [first_outputs(pipeline, kind, index, 0) for index in range(8)]
    for index in range(8):
        for other in range(index):
            assert difference(outputs[index], outputs[other]) > 1e-2, (index, other)


@pytest.mark.parametrize("kind", PIPELINES)
def test_no_weight_is_zero(kind: str) -> None:
    models = [part for part in PIPELINES[kind].build().components.values() if isinstance(part, nn.Module)]
    for model in models:
        assert not model.training
        for name, parameter in model.named_parameters():
            assert parameter.dim() == 1 or parameter.any(), name


@pytest.mark.parametrize("kind", PIPELINES)
def test_calls_of_the_denoiser(kind: str) -> None:
    pipeline = PIPELINES[kind].build()
    sizes = []
    getattr(pipeline, PIPELINES[kind].denoiser).register_forward_hook(
        lambda module, inputs, output: sizes.append(len(output[0]))
    )
    sample(pipeline, kind, [0, 1], [0, 1])
    calls, states = CALLS[kind]
    assert sizes == [states] * calls


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("sd_controlnet", {"controlnet_conditioning_scale": 0.0}),
        ("sd_controlnet", {"image": [Image.new("RGB", (PIXELS, PIXELS), "red")]}),
        ("sd_controlnet", {"prompt": ["blue dog"]}),
        ("sd_img2img", {"image": [Image.new("RGB", (PIXELS, PIXELS), "red")]}),
        ("sd", {"prompt": ["blue dog"]}),
        ("sd", {"negative_prompt": ["blue dog"]}),
        ("flux", {"guidance_scale": 7.0}),
    ],
)
def test_each_condition_matters(kind: str, arguments: dict[str, Any]) -> None:
    pipeline = PIPELINES[kind].build()
    assert difference(first_outputs(pipeline, kind, 0, 0, **arguments), first_outputs(pipeline, kind, 0, 0)) > 1e-2


def test_labels_survive_saving(tmp_path: Path) -> None:
    pipeline = PIPELINES["dit"].build()
    pipeline.save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path).get_label_ids(["class 7"]) == [7]
