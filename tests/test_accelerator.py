"""What trains on an accelerator: PQ and CAD are as good there as on the CPU, and resume."""

import copy

import pytest
import torch

from diffusers_pqcad import DistillConfig, PQCADConfig, convert_, distill, progressive_quantize
from diffusers_pqcad.compression.checkpoint import load_checkpoint, save_checkpoint
from diffusers_pqcad.compression.fake_quant import fake_quant_state, freeze_, load_fake_quant_state_
from diffusers_pqcad.compression.progressive import trajectory_error
from diffusers_pqcad.loading.coverage import average_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CAD = DistillConfig(max_train_steps=6, train_batch_size=4, evaluation_steps=2)


@pytest.fixture
def quantized(tiny_unet, tiny_calibration_set, quick_progressive):
    """The tiny UNet after PQ on the GPU."""
    model = copy.deepcopy(tiny_unet).to("cuda")
    progressive_quantize(model, tiny_calibration_set, PQCADConfig(), quick_progressive, progress=False)
    return model


def test_pq_there_is_as_good_as_on_the_cpu(tiny_unet, tiny_calibration_set, quantized, quick_progressive):
    on_cpu = copy.deepcopy(tiny_unet)
    progressive_quantize(on_cpu, tiny_calibration_set, PQCADConfig(), quick_progressive, progress=False)
    budget = PQCADConfig().weight_bits  # near ties, another rounding may decide for another layer
    convert_(copied := copy.deepcopy(quantized).to("cpu"))
    assert average_bits(copied)[0] <= budget
    steps = tiny_calibration_set.num_inference_steps
    found = trajectory_error(quantized.to("cpu"), tiny_calibration_set, steps)
    assert found == pytest.approx(trajectory_error(on_cpu, tiny_calibration_set, steps), rel=0.5)


def test_a_state_read_from_disk_lies_where_the_model_does(tiny_calibration_set, quantized, tmp_path):
    save_checkpoint(tmp_path / "state.safetensors", fake_quant_state(quantized))
    other = copy.deepcopy(quantized)
    load_fake_quant_state_(other, load_checkpoint(tmp_path / "state.safetensors"))
    assert {tensor.device.type for tensor in (*other.parameters(), *other.buffers())} == {"cuda"}
    data = tiny_calibration_set.to("cuda")
    sample, timestep = data.trajectory[0, :2], data.timestep[:2]  # two groups in one batch
    assert torch.equal(other(sample, timestep).sample, quantized(sample, timestep).sample)


@pytest.mark.parametrize("teacher", ["quantized", "fp"])
def test_a_stopped_cad_goes_on_there_and_its_student_is_packed_on_the_cpu(
    tiny_unet, tiny_calibration_set, quantized, tmp_path, teacher
):
    speaker = freeze_(copy.deepcopy(quantized)) if teacher == "quantized" else copy.deepcopy(tiny_unet).to("cuda")
    config = DistillConfig(**{**vars(CAD), "teacher": teacher})
    path = tmp_path / "resume.safetensors"
    stopped = copy.deepcopy(quantized)
    for entry in distill(stopped, speaker, tiny_calibration_set, config, checkpoint=path):
        if entry.step == 5:
            break
    student = copy.deepcopy(quantized)
    stats = list(distill(student, speaker, tiny_calibration_set, config, checkpoint=path))
    assert [entry.step for entry in stats] == [5, 6]
    packed = convert_(student.to("cpu"), num_inference_steps=2)
    assert {tensor.device.type for tensor in (*packed.parameters(), *packed.buffers())} == {"cpu"}
