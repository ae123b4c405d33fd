"""Specification of Ctrl-C and SIGTERM: a training writes a checkpoint first, and goes on from it to the same bits."""

import copy
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny_unet
from diffusers import UNet2DModel

from diffusers_pqcad import CalibrationSet, DistillConfig, PQCADConfig
from diffusers_pqcad.compression import progressive
from diffusers_pqcad.compression.checkpoint import load_checkpoint, model_hash
from diffusers_pqcad.compression.distillation import distill
from diffusers_pqcad.compression.progressive import History, ProgressiveConfig, progressive_quantize
from diffusers_pqcad.compression.stopping import (
    SIGNALS,
    Stopped,
    asked_to_stop,
    stopping_at_checkpoints,
    stopping_at_once,
)


def send(number: int = signal.SIGTERM) -> None:
    """Send this process a signal, whose handler has run when this returns."""
    os.kill(os.getpid(), number)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


# The signals


@pytest.mark.fast
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_both_signals_end_a_block_as_ctrl_c_does_and_say_the_code_of_a_shell(number, code):
    before = handlers()
    with pytest.raises(KeyboardInterrupt) as stopped, stopping_at_once():
        send(number)
    assert (type(stopped.value), stopped.value.exit_code) == (Stopped, code)
    assert handlers() == before


@pytest.mark.fast
def test_a_training_sees_the_first_signal_and_the_second_stops_at_once(caplog):
    before = handlers()

    def train() -> None:
        assert asked_to_stop() is None
        send(signal.SIGTERM)
        assert asked_to_stop() == asked_to_stop() == signal.SIGTERM
        assert "SIGTERM: stopping after the next checkpoint; a second one stops at once" in caplog.text
        with pytest.raises(Stopped, match="SIGINT"):
            send(signal.SIGINT)

    with pytest.raises(Stopped, match="SIGTERM"), stopping_at_checkpoints():
        train()
    assert handlers() == before
    assert asked_to_stop() is None


@pytest.mark.fast
def test_a_training_that_ended_before_it_saw_the_signal_is_stopped_after_it():
    done = []

    def train() -> None:
        send()
        done.append("all of it")

    with pytest.raises(Stopped), stopping_at_checkpoints():
        train()
    assert done
    with stopping_at_checkpoints():  # it is over
        assert asked_to_stop() is None


@pytest.mark.fast
def test_another_thread_has_no_handlers_and_works_as_it_would():
    done, before = [], handlers()

    def work() -> None:
        with stopping_at_once(), stopping_at_checkpoints():
            done.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]


# The trainings


def test_cad_stopped_after_every_update_ends_in_the_same_bits(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    config = DistillConfig(max_train_steps=3, train_batch_size=4, evaluation_steps=2)
    teacher, straight, path = copy.deepcopy(tiny_quantized), copy.deepcopy(tiny_quantized), tmp_path / "cad"
    wanted = list(distill(straight, teacher, tiny_calibration_set, config))
    seen = []

    def train() -> None:
        for entry in distill(copy.deepcopy(tiny_quantized), teacher, tiny_calibration_set, config, checkpoint=path):
            seen.append(entry)
            send()

    for stops in (1, 2, 3):
        with pytest.raises(Stopped), stopping_at_checkpoints():
            train()
        assert load_checkpoint(path)["step"] == stops
    student = copy.deepcopy(tiny_quantized)
    assert list(distill(student, teacher, tiny_calibration_set, config, checkpoint=path)) == []
    assert model_hash(student) == model_hash(straight)
    assert [(entry.step, entry.loss, entry.best_error) for entry in seen] == [
        (entry.step, entry.loss, entry.best_error) for entry in wanted
    ]


def test_pq_stopped_within_its_rounds_ends_in_the_same_bits(
    pq_run: tuple[UNet2DModel, History], tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls, path, kinds = 0, tmp_path / "pq", []
    wanted, original = pq_run[1], progressive.reconstruct
    num_units = len([unit for unit in wanted.units if unit["name"] != "bias correction"])

    def reconstruct_and_send(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, num_units - 2):
            send()
        return original(*arguments, **keywords)

    monkeypatch.setattr(progressive, "reconstruct", reconstruct_and_send)
    for _ in range(3):
        model = build_tiny_unet()
        try:
            with stopping_at_checkpoints():
                history = progressive_quantize(
                    model, tiny_calibration_set, PQCADConfig(weight_bits=4), quick_progressive,
                    checkpoint=path, progress=False,
                )  # fmt: skip
            break
        except Stopped:
            kinds.append(load_checkpoint(path)["begun"]["kind"])
    assert kinds == ["round", "forced"]
    assert calls == num_units  # none twice
    assert model_hash(model) == model_hash(pq_run[0])
    assert (history.rounds, history.units, history.summary) == (wanted.rounds, wanted.units, wanted.summary)
