"""Specification of several processes: each does its share, and all end as one process would."""

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import two_processes
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from two_processes import ENVIRONMENT, ROOT, Place, Running, largest_difference

from diffusers_pqcad import DistillConfig
from diffusers_pqcad.compression import processes
from diffusers_pqcad.compression.distillation import Distillation
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.publishing.settings import parse_settings

CONFIGS = ROOT / "examples" / "accelerate_configs"
GUIDE = (ROOT / "examples" / "guides" / "scale.md").read_text()
A_MINUTE = 60
IMAGES = 8  # of an update of CAD, of all processes together
# Outputs change with the batch in the seventh digit, and a gradient that is small to that noise may change its sign:
# Adam moves by its full rate either way.
AFTER_ADAM = 1e-3  # of the largest weight
PACKED = Path("unet") / "diffusion_pytorch_model.safetensors"


# What is whose


@given(items=st.lists(st.integers()), count=st.integers(1, 9))
def test_every_item_is_one_process_s_and_they_come_back_in_order(items: list[int], count: int) -> None:
    shares = [list(processes.share(items, Place(index, count))) for index in range(count)]
    assert processes.in_order(shares) == items
    sizes = [len(share) for share in shares]
    assert sum(sizes) == len(items)
    assert max(sizes) - min(sizes) <= 1


def test_items_are_dealt_out_like_cards() -> None:
    assert [list(processes.share("abcde", Place(index, 2))) for index in (0, 1)] == [["a", "c", "e"], ["b", "d"]]


@given(size=st.integers(0, 40), count=st.integers(1, 9))
def test_rows_of_a_batch_are_one_process_s_each_and_consecutive(size: int, count: int) -> None:
    shares = [list(range(size))[processes.rows_of(size, Place(index, count))] for index in range(count)]
    assert [row for share in shares for row in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(size=st.integers(1, 8), count=st.integers(1, 9))
def test_as_many_images_for_each_process_are_one_batch_cut_up(size: int, count: int) -> None:
    """What makes a batch of 8 in one process the images of 4 in each of two."""
    assert [processes.rows_of(size * count, Place(index, count)) for index in range(count)] == [
        slice(size * index, size * (index + 1)) for index in range(count)
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_the_losses_of_all_processes_have_the_mean_of_one(tiny_quantized, tiny_calibration_set, count) -> None:
    teacher = copy.deepcopy(tiny_quantized)

    def losses(batch_size: int, num_processes: int) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        config = DistillConfig(train_batch_size=batch_size)
        run = Distillation(tiny_quantized, teacher, tiny_calibration_set, config)
        run.place = Place(0, num_processes)
        return [run.losses(tiny_quantized, 3, rank) for rank in range(num_processes)]

    ((whole, terms),) = losses(4, 1)
    shares = losses(4 // count, count)
    assert all(loss.requires_grad and found.keys() == terms.keys() for loss, found in shares)
    # Outputs change with the batch in the seventh digit, and a code with that, on some CPUs; the errors of a student
    # like its teacher are small to them.
    torch.testing.assert_close(torch.stack([loss for loss, _ in shares]).mean(), whole, rtol=2e-3, atol=0)
    for name, term in terms.items():
        mean = torch.stack([found[name] for _, found in shares]).mean()
        torch.testing.assert_close(mean, term, rtol=1e-2, atol=5e-6)


# How it comes together


@pytest.fixture(scope="module")
def primitives(tmp_path_factory) -> list[dict[str, Any]]:
    """What the functions of the module give in each of two processes."""
    return Running(tmp_path_factory.mktemp("primitives") / "run", two_processes.primitives).results()


def test_one_process_does_everything_itself() -> None:
    assert processes.place() == Place(0, 1)
    assert processes.each(range(3), lambda item: -item) == [0, -1, -2]
    assert list(processes.in_turns(range(3))) == [[0], [1], [2]]
    assert processes.on_main(max, 1, 2) == processes.agreed(2) == 2
    assert processes.everywhere("x") == ["x"]
    parameter = torch.nn.Parameter(torch.ones(1))
    processes.add_gradients_([parameter], 0.5)
    assert parameter.grad is None
    with pytest.raises(ValueError, match="as it is") as raised, processes.together():
        raise ValueError("as it is")
    assert not processes.failed_elsewhere(raised.value)


def test_each_process_makes_its_share_and_gets_all(primitives) -> None:
    assert [found["place"] for found in primitives] == [Place(0, 2), Place(1, 2)]
    assert [found["is_main"] for found in primitives] == [True, False]
    assert [found["made"] for found in primitives] == [[0, 2, 4], [1, 3]]
    for rank, found in enumerate(primitives):
        assert found["each"] == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
        assert found["divided"] == [0, 10, 20, 30, 40]
        assert [value.tolist() for value in found["tensors"]] == [[2, 2], [1, 1, 1]]
        assert found["turns"] == [[0, 1], [2, 3], [4]]
        assert found["everywhere"] == found["and goes on"] == [0, 1]
        assert found["alone"] == (Place(0, 1), [(rank, 0), (rank, 1), (rank, 2)])


def test_the_main_process_decides(primitives) -> None:
    for found in primitives:
        assert found["on_main"] == (0, Place(0, 1))  # alone: what it calls there is not dealt out
        assert found["agreed"] == 0
        assert found["read"] == "text"
        assert found["nothing to read"] is None
        assert [value.tolist() for value in found["copied"]] == [[0, 0], [0, 0]]


def test_a_signal_to_one_process_stops_all_at_the_same_checkpoint(primitives) -> None:
    assert [found["asked to stop"] for found in primitives] == [(None, signal.SIGTERM, 143)] * 2


def test_gradients_are_added_up_with_their_weights(primitives) -> None:
    for found in primitives:
        assert [gradient.tolist() for gradient in found["gradients"]] == [[1, 1], [[3, 3, 3]]]


@pytest.mark.parametrize(
    ("case", "kind", "message", "failed"),
    [
        ("one fails", "ValueError", "ill", 1),
        ("an item fails", "ValueError", "item 3 cannot be done", 1),
        ("main fails", "ValueError", "item 3 cannot be done", 0),
        ("one fails elsewhere", "KeyError", "'lost'", 1),
    ],
)
def test_an_error_of_one_process_is_raised_in_all(primitives, case, kind, message, failed) -> None:
    assert [found[case] for found in primitives] == [(kind, message, rank != failed) for rank in (0, 1)]


def test_where_all_fail_the_first_one_tells(primitives) -> None:
    assert [found["all fail"] for found in primitives] == [
        ("ValueError", "ill in 0", False),
        ("ValueError", "ill in 1", True),
    ]


def test_an_error_that_cannot_be_sent_says_the_same(primitives) -> None:
    assert primitives[0]["an error cannot be sent"] == ("RuntimeError", "Unsendable: 1 and 2", True)
    assert primitives[1]["an error cannot be sent"] == ("Unsendable", "1 and 2", False)


def test_a_student_learns_what_it_would_in_one_process(tmp_path) -> None:
    """Also one whose pipeline calls its model twice in a step."""
    one, two = Running(tmp_path / "two", two_processes.trained, IMAGES).results()
    alone = two_processes.trained(IMAGES)
    states = [found["state"]["tensors"] for found in (alone, one, two)]
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert largest_difference(states[0], states[1]) < AFTER_ADAM
    for (loss, terms), (wanted, wanted_terms) in zip(one["losses"], alone["losses"], strict=True):
        assert loss == pytest.approx(wanted, rel=1e-3)  # on CPUs without AVX-512 more codes flip
        assert terms == pytest.approx(wanted_terms, rel=1e-3)
    assert one["losses"] == two["losses"]


# Whole runs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher folder of the smallest useful kind, with attention."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    DDIMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def together(teacher, tmp_path_factory) -> tuple[Path, Running]:
    """The folder of a smoke run in two processes, and what they were."""
    folder = tmp_path_factory.mktemp("together")
    return folder / "out", Running(folder / "run", two_processes.whole_run, teacher, folder / "out", IMAGES // 2)


@pytest.fixture(scope="module")
def one_alone(teacher, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder of the same run in one process, and its metrics."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    return folder, two_processes.whole_run(teacher, folder, IMAGES)


def test_two_processes_record_and_decide_as_one(together, one_alone) -> None:
    folder, running = together
    running.results()
    data = [(path / "state" / "calibration" / "data.arrow").read_bytes() for path in (folder, one_alone[0])]
    assert data[0] == data[1]
    histories = [json.loads((path / "history.json").read_text()) for path in (folder, one_alone[0])]
    bits = [[entry["bits"] for entry in history["rounds"]] for history in histories]
    assert bits[0] == bits[1]
    prices = [history["rounds"][0]["price"] for history in histories]
    assert prices[0] == prices[1]  # of the first round, before any weight was trained


def test_two_processes_end_with_the_weights_of_one(together, one_alone) -> None:
    folder, running = together
    running.results()
    for key, tolerance in (("pq", 1e-4), ("pq_cad", AFTER_ADAM)):
        found, wanted = (load_file(path / "state" / f"{key}.safetensors") for path in (folder, one_alone[0]))
        assert largest_difference(wanted, found) < tolerance, key
    packed = [load_file(path / PACKED) for path in (folder, one_alone[0])]
    names = [name for name in packed[0] if name.endswith("qweight")]
    assert names
    assert sum((packed[0][name] != packed[1][name]).sum().item() for name in names) < 50


def test_all_processes_return_the_metrics_and_the_main_one_alone_prints(together, one_alone) -> None:
    folder, running = together
    first, second = running.results()
    assert first == second == json.loads((folder / "metrics.json").read_text())
    float_rows = [metrics["rows"][0] for metrics in (first, one_alone[1])]
    assert [row["key"] for row in first["rows"]] == [row["key"] for row in one_alone[1]["rows"]]
    assert float_rows[0]["trajectory_error"] == float_rows[1]["trajectory_error"]
    assert {name: [here["num_processes"] for here in found] for name, found in first["training"].items()} == {
        "pq": [2],
        "pq_cad": [2],
    }
    assert "== saving" in running.printed(0)
    ours = [line for line in running.printed(1).splitlines() if "reducer.cpp" not in line and "[Gloo]" not in line]
    assert ours == []


def test_after_a_kill_of_all_and_of_one_they_end_with_the_same_bits(teacher, together, tmp_path) -> None:
    output, wanted = tmp_path / "out", together[0]
    together[1].results()
    arguments = (teacher, output, IMAGES // 2)
    assert Running(tmp_path / "1", two_processes.killed_in_pq, *arguments).codes() == [-9, -9]
    assert (output / "state" / "pq.safetensors").exists()
    assert not (output / "state" / "pq_cad-resume.safetensors").exists()

    running = Running(tmp_path / "2", two_processes.killed_in_cad, *arguments)
    running.processes[1].join(two_processes.TIMEOUT)
    died = time.monotonic()
    assert running.codes(A_MINUTE) == [1, -9]
    assert time.monotonic() - died < A_MINUTE
    assert "peer" in running.printed(0)  # what gloo says of the other end
    assert (output / "state" / "pq_cad-resume.safetensors").exists()
    assert not (output / "state" / "pq_cad.safetensors").exists()

    Running(tmp_path / "3", two_processes.whole_run, *arguments).results()
    for name in ("state/pq.safetensors", "state/pq_cad.safetensors", PACKED):
        found, expected = load_file(output / name), load_file(wanted / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


def test_a_resume_file_of_another_number_of_processes_is_refused(
    tiny_quantized, tiny_calibration_set, tmp_path
) -> None:
    from diffusers_pqcad.compression.checkpoint import load_checkpoint, save_checkpoint
    from diffusers_pqcad.compression.distillation import distill

    config = DistillConfig(teacher="none", max_train_steps=2, evaluation_steps=1, train_batch_size=2)
    path = tmp_path / "resume.safetensors"
    stats: Any = distill(copy.deepcopy(tiny_quantized), None, tiny_calibration_set, config, checkpoint=path)
    next(stats)
    next(stats)
    stats.close()
    state = load_checkpoint(path)
    save_checkpoint(path, state | {"request": json.dumps(json.loads(state["request"]) | {"num_processes": 2})})
    with pytest.raises(ValueError, match=r"begun with other settings.*'num_processes': \(2, None\)"):
        next(distill(copy.deepcopy(tiny_quantized), None, tiny_calibration_set, config, checkpoint=path))


# How they are started


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path) -> None:
    """As `accelerate launch --multi_gpu --num_processes 2` starts them where there is no GPU."""
    running = Running(tmp_path / "run", two_processes.not_known_to_each_other, tmp_path / "out")
    assert running.codes() == [1, 1]
    for rank in (0, 1):
        printed = running.printed(rank)
        assert "2 processes were started, and each believes to be one of 1" in printed
        assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_models_in_pieces_are_refused(kind, monkeypatch) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "distributed_type", kind)
    with pytest.raises(ValueError, match=f"{kind.value}: expected processes that hold the whole model"):
        processes.check_whole(accelerator)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration_and_the_guide_says_whether_it_was_run(path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert f"[{path.name}](../accelerate_configs/{path.name}) |" in GUIDE
    assert ("Not run" in path.read_text()) == (f"{path.name}) | not run" in GUIDE)


def test_with_the_configuration_of_one_process_the_launcher_adds_nothing(tmp_path) -> None:
    """It lists the values that it was not given, else."""
    script = tmp_path / "script.py"
    script.write_text("print('hello')")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "one_process.yaml")]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "hello\n"
    assert "accelerate launch" not in done.stderr


def test_the_commands_of_the_guide_are_those_of_the_script() -> None:
    commands = [line.split("#")[0] for line in GUIDE.replace("\\\n", " ").splitlines() if "distill.py" in line]
    commands = [line for line in commands if line.startswith(("accelerate launch", "python examples/distill.py"))]
    assert len(commands) == 3
    for command in commands:
        settings = parse_settings(command.partition("examples/distill.py")[2].split())
        assert settings.run.train_device == ("cuda" if "cuda" in command else "cpu")


@pytest.mark.parametrize("name", ["emoji", "fashion-flow"])
def test_a_bundled_teacher_is_compressed_in_two_processes(name, tmp_path) -> None:
    first, second = Running(tmp_path / "run", two_processes.bundled_run, name, tmp_path / "out").results()
    assert first == second
    assert first["rows"][-1]["key"] == "pq_cad"
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert packed_layers(getattr(pipeline, first["component"]))


def test_accelerate_launch_compresses_the_bundled_teacher_in_two_processes(tmp_path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [str(CONFIGS / "two_cpu_processes.yaml"), str(ROOT / "examples" / "distill.py"), "--preset", "smoke"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out"), "--num_threads", "1"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=two_processes.TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("== saving") == done.stdout.count("| PQ + CAD |") == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["teacher_id"] == "fashion-mnist (bundled)"
    assert packed_layers(DiffusionPipeline.from_pretrained(tmp_path / "out").unet)
