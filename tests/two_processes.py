"""What tests run in several processes at once, and how: real ones that know of each other, on CPUs (gloo).

They are forked from a server that has imported everything, so that the imports are paid for once.
"""

import copy
import multiprocessing
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import build_tiny_scheduler, build_tiny_unet
from diffusers import DDIMPipeline
from torch import Tensor, nn

from diffusers_pqcad import DistillConfig, PQCADConfig
from diffusers_pqcad.compression import distillation, processes, progressive, stopping
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.denoiser import StepPlan
from diffusers_pqcad.compression.distillation import distill
from diffusers_pqcad.compression.fake_quant import fake_quant_state, freeze_, prepare_
from diffusers_pqcad.compression.processes import Place
from diffusers_pqcad.compression.recording import collect_calibration_set
from diffusers_pqcad.loading.convert import match_modules
from diffusers_pqcad.publishing.compress import compress
from diffusers_pqcad.publishing.settings import PRESETS, settings_of

ROOT = Path(__file__).parents[1]
TIMEOUT = 500  # seconds; the computer may be busy
PATHS = (str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")]))
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}


class Running:
    """`function(*arguments)` in several processes; what each returns or raises, and prints, is kept in `folder`."""

    def __init__(self, folder: Path, function: Callable[..., Any], *arguments: Any, count: int = 2) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["two_processes"])
        begins = [(folder, Place(rank, count), port, function, arguments) for rank in range(count)]
        self.processes = [context.Process(target=enter, args=begin, daemon=True) for begin in begins]
        with patch.dict(os.environ, ENVIRONMENT):  # the server starts with the first process
            for process in self.processes:
                process.start()

    def codes(self, timeout: float = TIMEOUT) -> list[int]:
        """Return the exit codes, once all processes have ended."""
        for process in self.processes:
            process.join(timeout)
            assert process.exitcode is not None, "it still runs: " + self.printed(0) + self.printed(1)
        return [process.exitcode for process in self.processes]

    def printed(self, rank: int) -> str:
        """Return what a process wrote to its output and its errors."""
        return (self.folder / f"{rank}.log").read_text()

    def results(self) -> list[Any]:
        """Return what the processes return."""
        codes = self.codes()
        assert codes == [0] * len(codes), "".join(self.printed(rank) for rank in range(len(codes)))
        return [pickle.loads((self.folder / f"{rank}.pickle").read_bytes()) for rank in range(len(codes))]


def enter(folder: Path, place: Place, port: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Run `function` as one of several processes, as a launcher would."""
    rank, count = (str(number) for number in place)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    result = function(*arguments)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))


# What they run


class Unsendable(Exception):
    """An error that cannot be made again from what it says."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def caught(function: Callable[[], Any]) -> tuple[str, str, bool]:
    """Return the type and the text of the error of `function`, and whether it is another process's."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), processes.failed_elsewhere(error)
    raise AssertionError("it raises nothing")


def fail_in(rank: int, error: Exception) -> None:
    """Raise `error` in one process, in a block that all go through."""
    with processes.together():
        if processes.place().process_index == rank:
            raise error


def fail_while_main_works() -> None:
    """Raise an error in one process while the others wait for the main one."""
    with processes.together():
        if processes.place().process_index == 1:
            raise KeyError("lost")
        processes.on_main(int)


def fail_at(item: int) -> int:
    """Raise for one of the items."""
    if item == 3:
        raise ValueError("item 3 cannot be done")
    return item


def primitives() -> dict[str, Any]:
    """Return what each function of the module gives."""
    processes.accelerator_on("cpu")
    rank = processes.place().process_index
    made: list[int] = []

    def noted(item: int) -> tuple[int, int]:
        made.append(item)
        return item, rank

    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 3))]
    (parameters[rank].sum() * 4).backward()
    processes.add_gradients_(parameters, [0.25, 0.75][rank])
    model = nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(rank)
        model.running_mean.fill_(rank)
    processes.copy_from_main_(model)
    with processes.alone():
        alone = (processes.place(), processes.each(range(3), lambda item: (rank, item)))
    return {
        "place": processes.place(),
        "is_main": processes.is_main(),
        "each": processes.each(range(5), noted),
        "made": made,
        "tensors": processes.each(iter([torch.ones(2), torch.zeros(3)]), lambda item: item + 1),
        "divided": processes.divided(range(5), lambda mine: [10 * item for item in mine]),
        "turns": list(processes.in_turns(range(5))),
        "on_main": processes.on_main(lambda: (rank, processes.place())),
        "agreed": processes.agreed(rank),
        "everywhere": processes.everywhere(rank),
        "alone": alone,
        "gradients": [parameter.grad for parameter in parameters],
        "copied": [model.weight.detach(), model.running_mean],
        "read": processes.read_together(lambda: "text", lambda: rank == 0),
        "nothing to read": processes.read_together(lambda: "text", lambda: rank == 1),
        "one fails": caught(lambda: fail_in(1, ValueError("ill"))),
        "all fail": caught(lambda: fail_in(rank, ValueError(f"ill in {rank}"))),
        "an item fails": caught(lambda: processes.each(range(4), fail_at)),
        "main fails": caught(lambda: processes.on_main(fail_at, 3)),
        "an error cannot be sent": caught(lambda: fail_in(1, Unsendable(1, 2))),
        "one fails elsewhere": caught(fail_while_main_works),
        "and goes on": processes.everywhere(rank),
        "asked to stop": asked_in(1),
    }


def asked_in(rank: int) -> tuple[int | None, int | None, int]:
    """Return the signal before and after one process was sent SIGTERM, and the exit code that all are stopped with."""
    found = []
    try:
        with stopping.stopping_at_checkpoints():
            found.append(stopping.asked_to_stop())
            if processes.place().process_index == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            found.append(stopping.asked_to_stop())
    except stopping.Stopped as stopped:
        return found[0], found[1], stopped.exit_code
    raise AssertionError("it went on")


def of_two_calls(calibration: CalibrationSet) -> CalibrationSet:
    """Return `calibration` as of a pipeline that calls its model twice in a step, and takes the mean."""
    return calibration._with(plan=StepPlan("sample", (1, 1), (0.5, 0.5), ({}, {})))


def trained(images: int) -> dict[str, Any]:
    """Return the state of a student after a few updates of `images` in all, and their statistics."""
    pipeline = DDIMPipeline(build_tiny_unet(), build_tiny_scheduler())
    calibration = of_two_calls(
        collect_calibration_set(pipeline, num_trajectories=16, num_inference_steps=4, seed=1, progress=False)
    )
    student, config = pipeline.unet, PQCADConfig()
    prepare_(student, config, dict.fromkeys(match_modules(student, config), 4))
    teacher = freeze_(copy.deepcopy(student))
    settings = DistillConfig(
        max_train_steps=3,
        evaluation_steps=3,
        train_batch_size=images // processes.accelerator_on("cpu").num_processes,
    )
    stats = list(distill(student, teacher, calibration, settings))
    return {"state": fake_quant_state(student), "losses": [(entry.loss, entry.losses) for entry in stats]}


def smoke_settings(teacher: Path, output: Path, images: int) -> Any:
    """Return the settings of a smoke run of CAD's batches of `images`, at one thread."""
    own = {"pretrained_model_name_or_path": str(teacher), "output_dir": str(output), "num_threads": 1}
    return settings_of(PRESETS["smoke"] | own | {"train_batch_size": images, "sampling_batch_size": 2})


def whole_run(teacher: Path, output: Path, images: int) -> dict[str, Any]:
    """Return the metrics of a smoke run."""
    return compress(*smoke_settings(teacher, output, images))


def die_at(owner: Any, name: str, call: int, ranks: Sequence[int]) -> None:
    """Have processes `ranks` killed at the `call`-th call of a function, counted from 1."""
    original, calls = getattr(owner, name), 0

    def watched(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and int(os.environ["RANK"]) in ranks:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, watched)


def killed_in_pq(teacher: Path, output: Path, images: int) -> None:
    """Run until all processes die, after PQ has written its first resume file."""
    die_at(progressive.ProgressiveQuantizer, "correct_biases", 1, (0, 1))
    whole_run(teacher, output, images)


def killed_in_cad(teacher: Path, output: Path, images: int) -> None:
    """Go on until one process dies, after CAD has written its first resume file."""
    die_at(distillation.Distillation, "trajectory_error", 3, (1,))
    whole_run(teacher, output, images)


def not_known_to_each_other(output: Path) -> None:
    """Start a run on an accelerator that is not there."""
    settings = settings_of({"pretrained_model_name_or_path": "nowhere", "output_dir": str(output)})
    compress(replace(settings.run, train_device="cuda"), *settings[1:])


def bundled_run(name: str, output: Path) -> dict[str, Any]:
    """Return the metrics of the smoke run of a bundled teacher, by its command line."""
    sys.path.insert(0, str(ROOT / "examples"))
    import distill as script

    path = str(ROOT / "examples" / "models" / name)
    flags = ("--preset", "smoke", "--pretrained_model_name_or_path", path, "--num_threads", "1")
    return script.main([*flags, "--output_dir", str(output)])


def largest_difference(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Return the largest difference between two states' numbers in floating point, of the largest number."""
    assert wanted.keys() == found.keys()
    names = [name for name, tensor in wanted.items() if tensor.is_floating_point()]
    largest = max(wanted[name].abs().max().item() for name in names)
    return max((wanted[name] - found[name]).abs().max().item() for name in names) / largest
