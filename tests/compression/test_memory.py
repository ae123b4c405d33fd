"""Specification of the memory levers: each changes what is in memory, and no number beyond rounding."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from peak import Peak
from torch import Tensor, nn

from diffusers_pqcad import DistillConfig, PQCADConfig, ProgressiveConfig, distill, progressive_quantize
from diffusers_pqcad.compression import distillation as distillation_module
from diffusers_pqcad.compression import optimizers as optimizers_module
from diffusers_pqcad.compression import progressive as progressive_module
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.checkpoint import (
    check_request,
    clone_state,
    load_checkpoint,
    plain_settings,
    save_checkpoint,
)
from diffusers_pqcad.compression.denoiser import Denoiser
from diffusers_pqcad.compression.distillation import Distillation, StepStats, request_of
from diffusers_pqcad.compression.fake_quant import convert_, fake_quant_layers, freeze_, latent_weight
from diffusers_pqcad.compression.offload import Store, release_, waiting_copy
from diffusers_pqcad.compression.optimization import AveragedAdam
from diffusers_pqcad.compression.optimizers import MatrixAdafactor, optimizer_of
from diffusers_pqcad.compression.progressive import History, ProgressiveQuantizer
from diffusers_pqcad.compression.reconstruction import UnitIO, UnitResult, reconstruct
from diffusers_pqcad.layers.find import packed_layers

PQ = tuple[UNet2DModel, History]
QUICK = DistillConfig(max_train_steps=3, train_batch_size=4, step_rate=1e-2, evaluation_steps=2)


def train(
    student: nn.Module, recorded: CalibrationSet, offload_folder: Path | None = None, **changes: object
) -> tuple[dict[str, Tensor], list[StepStats], int]:
    """The state of a copy of `student` after CAD, the statistics, and the most that was in memory."""
    learner, teacher = copy.deepcopy(student), freeze_(copy.deepcopy(student))
    with Peak() as peak:
        entries = distill(
            learner, teacher, recorded, dataclasses.replace(QUICK, **changes), offload_folder=offload_folder
        )
        stats = list(entries)
    return learner.state_dict(), stats, peak.bytes


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def is_offloaded(model: nn.Module) -> bool:
    return all("pages" in vars(parameter) for parameter in model.parameters())


# Waiting on disk


def test_pq_from_disk_ends_in_the_same_bits(
    pq_run: PQ, tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = []

    def watched(unit: nn.Module, io: UnitIO, *args: object, **kwargs: object) -> UnitResult:
        leaves = [leaf for leaf in (*io.inputs, *io.float_inputs, io.target) if isinstance(leaf, Tensor)]
        seen.append((is_offloaded(tiny_unet), all("pages" in vars(leaf) for leaf in leaves)))
        return reconstruct(unit, io, *args, **kwargs)

    monkeypatch.setattr(progressive_module, "reconstruct", watched)
    history = progressive_quantize(
        tiny_unet, tiny_calibration_set, PQCADConfig(weight_bits=4), quick_progressive,
        offload_folder=tmp_path / "offload", checkpoint=tmp_path / "pq", progress=False,
    )  # fmt: skip
    assert same(tiny_unet.state_dict(), pq_run[0].state_dict())
    assert json.dumps(dataclasses.asdict(history)) == json.dumps(dataclasses.asdict(pq_run[1]))
    assert set(seen) == {(True, True)}
    assert not any("pages" in vars(parameter) for parameter in tiny_unet.parameters())
    assert not list((tmp_path / "offload").iterdir())


def test_the_copy_for_prices_has_rounded_weights_of_its_own_and_shares_the_rest(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig, tmp_path: Path
) -> None:
    config = PQCADConfig(weight_bits=4)
    run = ProgressiveQuantizer(tiny_unet, tiny_calibration_set, config, quick_progressive, Store(tmp_path))
    assert is_offloaded(run.reference)
    with Peak() as peak:
        frozen = run.frozen()
    assert peak.bytes < 0.7 * weights_bytes(tiny_unet)  # one layer at a time
    layers = fake_quant_layers(tiny_unet)
    for name, layer in layers.items():
        weight = frozen.get_parameter(f"{name}.weight")
        assert torch.equal(weight, layer.weight)
        assert "pages" in vars(weight)
    rest = dict(tiny_unet.named_parameters())
    for name, parameter in frozen.named_parameters():
        if name.rpartition(".")[0] not in layers:
            assert parameter.data_ptr() == rest[name].data_ptr()
    assert all(parameter.requires_grad for parameter in rest.values())


@pytest.mark.parametrize("trainable", ["all", "scales", "lora"])
def test_cad_from_disk_ends_in_the_same_bits(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path, trainable: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain, stats, peak = train(tiny_quantized, tiny_calibration_set, trainable=trainable, rank=2)
    averaged, waiting = AveragedAdam.averaged, []

    @contextmanager
    def watched(adam: AveragedAdam) -> Iterator[None]:
        with averaged(adam):
            waiting.append(all("pages" in vars(tensor) for tensor in adam.average.temp_stored_params))
            yield

    monkeypatch.setattr(AveragedAdam, "averaged", watched)
    found, other_stats, other_peak = train(
        tiny_quantized, tiny_calibration_set, tmp_path / "offload", trainable=trainable, rank=2
    )
    assert same(found, plain)
    assert [(entry.loss, entry.best_error) for entry in other_stats] == [(e.loss, e.best_error) for e in stats]
    assert not list((tmp_path / "offload").iterdir())
    # The weights that wait while their average is measured: the peak is in the backward pass, and does not show them.
    assert waiting == [True, True]
    if trainable == "all":  # the average and the best state
        assert other_peak < peak - 1.9 * weights_bytes(tiny_quantized)


def test_what_is_not_trained_lies_on_disk_meanwhile(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    config = dataclasses.replace(QUICK, trainable="scales")
    entries = distill(
        tiny_quantized, freeze_(copy.deepcopy(tiny_quantized)), tiny_calibration_set, config, offload_folder=tmp_path
    )
    next(entries)
    assert all("pages" in vars(latent_weight(layer)) for layer in fake_quant_layers(tiny_quantized).values())
    entries.close()
    assert not any("pages" in vars(parameter) for parameter in tiny_quantized.parameters())


def test_a_run_that_is_killed_goes_on_from_disk_or_without(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _, _ = train(tiny_quantized, tiny_calibration_set)
    teacher, path = freeze_(copy.deepcopy(tiny_quantized)), tmp_path / "cad"

    class Killed(BaseException):
        pass

    def save_and_die(*args: object) -> None:
        save_checkpoint(*args)
        raise Killed

    monkeypatch.setattr(distillation_module, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        list(distill(copy.deepcopy(tiny_quantized), teacher, tiny_calibration_set, QUICK, checkpoint=path))
    monkeypatch.undo()
    student = copy.deepcopy(tiny_quantized)
    config = dataclasses.replace(QUICK, gradient_checkpointing=True)
    list(distill(student, teacher, tiny_calibration_set, config, checkpoint=path, offload_folder=tmp_path / "offload"))
    assert same(student.state_dict(), plain)


def test_a_resume_file_is_written_from_the_tensors_themselves(tmp_path: Path) -> None:
    state = {str(index): torch.rand(1000) for index in range(5)}
    with Peak() as peak:
        save_checkpoint(tmp_path / "state", {**state, "view": state["0"][:10]})
    assert peak.bytes <= 40  # the view
    assert same({name: load_checkpoint(tmp_path / "state")[name] for name in state}, state)


# Gradients


def test_checkpointed_blocks_take_less_memory_and_give_the_same_bits(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    plain, _, peak = train(tiny_quantized, tiny_calibration_set, train_batch_size=16)
    found, _, other_peak = train(
        tiny_quantized, tiny_calibration_set, train_batch_size=16, gradient_checkpointing=True
    )
    assert same(found, plain)
    assert other_peak < 0.9 * peak
    assert not tiny_quantized.is_gradient_checkpointing


def test_accumulated_batches_are_those_of_a_larger_one_in_less_memory(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    plain, stats, peak = train(tiny_quantized, tiny_calibration_set, train_batch_size=32)
    found, other_stats, other_peak = train(
        tiny_quantized, tiny_calibration_set, train_batch_size=8, gradient_accumulation_steps=4
    )
    assert other_peak < 0.8 * peak
    for entry, other in zip(stats, other_stats, strict=True):
        assert other.loss == pytest.approx(entry.loss, rel=1e-3)
        assert other.losses == pytest.approx(entry.losses, rel=3e-3)  # codes flip
    # The same images: of others, the loss differs in the first digits. A code may flip with the size of the batch.
    assert stats[0].loss == pytest.approx(other_stats[0].loss, rel=1e-4)
    for name, value in plain.items():
        assert torch.allclose(found[name].float(), value.float(), rtol=1e-2, atol=1e-3), name


# Optimizers


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fitted(name: str, *, use_8bit_adam: bool = False, steps: int = 200) -> tuple[nn.Parameter, Tensor, int]:
    """A convolution's weight after it was pulled to a target, that target, and the bytes of the optimizer's state."""
    generator = torch.Generator().manual_seed(0)
    weight, wanted = (torch.randn(32, 32, 3, 3, generator=generator) * 0.02 for _ in range(2))
    parameter = nn.Parameter(weight)
    optimizer = optimizer_of([{"params": [parameter], "lr": 1e-3}], name, use_8bit_adam=use_8bit_adam)
    for _ in range(steps):
        (parameter - wanted).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parameter.grad is None
    return parameter, wanted, state_bytes(optimizer)


def test_adafactor_learns_with_a_row_and_a_column_of_state() -> None:
    parameter, wanted, nbytes = fitted("adafactor")
    assert (parameter - wanted).norm() < 0.1 * wanted.norm()
    assert nbytes <= 4 * (32 + 32 * 9 + 1)


def test_adafactors_updates_are_as_long_as_its_rate_whatever_the_weights() -> None:
    for size in (1e-4, 100.0):
        parameter = nn.Parameter(torch.full((8, 4, 3, 3), size))
        before = parameter.detach().clone()
        optimizer = MatrixAdafactor([{"params": [parameter], "lr": 1e-2}])
        parameter.square().sum().backward()
        optimizer.step()
        assert (parameter - before).square().mean().sqrt().item() == pytest.approx(1e-2, rel=2e-2)


def test_adam_in_8_bits_learns_with_a_quarter_of_the_state() -> None:
    pytest.importorskip("bitsandbytes")
    _, _, plain = fitted("adam", steps=1)
    parameter, wanted, nbytes = fitted("adam", use_8bit_adam=True)
    assert (parameter - wanted).norm() < 0.1 * wanted.norm()
    assert nbytes < 0.3 * plain


@pytest.mark.parametrize("name", ["adafactor", "adam"])
def test_cad_learns_with_every_optimizer_and_goes_on_from_its_state(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path, name: str
) -> None:
    if name == "adam":
        pytest.importorskip("bitsandbytes")
    changes = {"optimizer": name, "use_8bit_adam": name == "adam", "max_train_steps": 4}
    plain, stats, _ = train(tiny_quantized, tiny_calibration_set, **changes)
    assert not same(plain, tiny_quantized.state_dict()) or stats[-1].best_step == 0
    config, teacher = dataclasses.replace(QUICK, **changes), freeze_(copy.deepcopy(tiny_quantized))
    student = copy.deepcopy(tiny_quantized)
    losses = {}
    entries = distill(student, teacher, tiny_calibration_set, config, checkpoint=tmp_path / "cad")
    losses |= {entry.step: entry.loss for entry in (next(entries) for _ in range(3))}  # saved after the second
    del entries, student
    student = copy.deepcopy(tiny_quantized)
    entries = distill(student, teacher, tiny_calibration_set, config, checkpoint=tmp_path / "cad")
    losses |= {entry.step: entry.loss for entry in entries}
    assert losses == {entry.step: entry.loss for entry in stats}
    assert same(student.state_dict(), plain)


def test_8_bits_without_the_package_are_refused_with_what_to_do(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers_module, "find_spec", lambda name: None)
    before = {name: value.clone() for name, value in tiny_quantized.state_dict().items()}
    config = dataclasses.replace(QUICK, use_8bit_adam=True)
    with pytest.raises(ValueError, match="use_8bit_adam: .*pip install bitsandbytes"):
        next(distill(tiny_quantized, freeze_(copy.deepcopy(tiny_quantized)), tiny_calibration_set, config))
    assert same(tiny_quantized.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected 'adam' or 'adafactor', got 'sgd'"),
        ({"optimizer": "adafactor", "use_8bit_adam": True}, "use_8bit_adam: .*leave one of them out"),
        ({"mixed_precision": "fp16"}, "mixed_precision: expected 'no' or 'bf16', got 'fp16'"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected at least 1"),
    ],
)
def test_levers_out_of_range_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUICK, **change)


# Mixed precision


def test_a_waiting_model_in_bf16_is_called_with_bf16_and_answers_in_fp32(tiny_unet: UNet2DModel) -> None:
    half = waiting_copy(tiny_unet, None, torch.bfloat16)
    assert weights_bytes(half) == weights_bytes(tiny_unet) / 2
    state, timestep = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        found, wanted = (Denoiser(model)(state, timestep, {}) for model in (half, tiny_unet))
    assert found.dtype == torch.float32
    assert 1e-5 < (found - wanted).norm() / wanted.norm() < 2e-2


def test_a_student_in_bf16_keeps_less_and_is_packed_as_it_was_trained(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    def kept(mixed_precision: str) -> tuple[int, float]:
        """What the loss keeps for its backward pass, and the loss."""
        run = Distillation(
            tiny_quantized, None, tiny_calibration_set,
            dataclasses.replace(QUICK, teacher="none", train_batch_size=16, mixed_precision=mixed_precision),
        )  # fmt: skip
        sizes = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        run.place = run.place._replace(num_processes=1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = run.losses(tiny_quantized, 0, 0)
        return sum(sizes), loss.item()

    (whole, loss), (less, other_loss) = kept("no"), kept("bf16")
    assert less < 0.85 * whole
    assert other_loss == pytest.approx(loss, rel=0.05)

    teacher, config = freeze_(copy.deepcopy(tiny_quantized)), dataclasses.replace(QUICK, mixed_precision="bf16")
    first = clone_state(tiny_quantized)
    list(distill(tiny_quantized, teacher, tiny_calibration_set, config))
    after = tiny_quantized.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in first.items() if name.endswith(".original"))
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float32}
    trained = {name: layer.weight.detach() for name, layer in fake_quant_layers(tiny_quantized).items()}
    packed = packed_layers(convert_(tiny_quantized))
    assert trained.keys() == packed.keys()
    assert all(torch.equal(packed[name].dequantized_weight(), weight) for name, weight in trained.items())


def test_pq_in_bf16_meets_its_budget_and_keeps_fp32_latents(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig, tmp_path: Path
) -> None:
    settings = dataclasses.replace(quick_progressive, mixed_precision="bf16")
    history = progressive_quantize(
        tiny_unet, tiny_calibration_set, PQCADConfig(weight_bits=4), settings, offload_folder=tmp_path, progress=False
    )
    assert history.summary["average_bits"] <= 4
    assert {parameter.dtype for parameter in tiny_unet.parameters()} == {torch.float32}
    assert any(unit["accepted"] for unit in history.units)


# Resume files of older versions


def test_resume_files_of_before_there_were_levers_go_on(tmp_path: Path) -> None:
    older = {"config": {"max_train_steps": 3}}
    save_checkpoint(tmp_path / "cad", {"request": json.dumps(older)})
    saved = load_checkpoint(tmp_path / "cad")
    names = tuple(item.name for item in dataclasses.fields(QUICK) if item.name != "max_train_steps")
    defaults = DistillConfig(max_train_steps=3)
    check_request(tmp_path / "cad", saved, {"config": plain_settings(defaults, later=names)})
    other = dataclasses.replace(defaults, optimizer="adafactor")
    with pytest.raises(ValueError, match="other settings"):
        check_request(tmp_path / "cad", saved, {"config": plain_settings(other, later=names)})


def test_a_request_names_levers_that_change_a_result_and_no_others(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    def config_of(**changes: object) -> dict[str, object]:
        config = dataclasses.replace(QUICK, **changes)
        return request_of(tiny_quantized, None, tiny_calibration_set, config, None, 2)["config"]

    assert "optimizer" not in config_of()
    assert config_of(gradient_checkpointing=True) == config_of()
    assert config_of(gradient_accumulation_steps=2)["gradient_accumulation_steps"] == 2


def test_releasing_takes_anything() -> None:
    assert release_({"a": [1, None, torch.ones(1)]})["a"][0] == 1
