"""Calibration sets: full-precision trajectories, the only unbiased targets that a quantized model will see.

A set is a `datasets.Dataset` with a row for each trajectory: its states, the guided outputs of its steps, and the
conditions of the model's calls. On disk it is memory-mapped, and read where it is drawn from.
"""

import hashlib
import inspect
import json
import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value, load_dataset
from diffusers import DDIMScheduler
from huggingface_hub import HfApi, hf_hub_download
from torch import Tensor, nn

from diffusers_pqcad.compression.checkpoint import load_checkpoint, model_hash, save_checkpoint, tensors_hash
from diffusers_pqcad.compression.denoiser import Condition, Denoiser, StepPlan
from diffusers_pqcad.compression.grid import MAX_STEP_GAIN, Grid, ddim_grid, sigmas_for

HELD_OUT_FRACTION = 0.125
GAIN_LIMITS = (0.1, 10.0)
STREAMED_ROWS = 16
DATA, ABOUT = "data.arrow", "calibration.safetensors"  # the files of a set's folder
STATE, OUTPUT, INPUT = "state", "output", "input"  # columns of every set; others are conditions
# Columns of other dtypes are kept as one of these, and read in their own dtype.
STORED = {torch.bool: torch.uint8, torch.bfloat16: torch.float32}


class Calls(NamedTuple):
    """What a model is called with, and what it should give, for n images.

    `trajectory` and `step` (n,) say where they come from; `state` (n, *S), `timestep` (n,) as the model gets it,
    `output` (n, *S) guided and in full precision, `weight` (n,) the squared gain of the step.
    """

    trajectory: Tensor
    step: Tensor
    state: Tensor
    timestep: Tensor
    condition: Condition
    output: Tensor
    weight: Tensor

    def rows(self, rows: Any) -> "Calls":
        """Return the calls `rows`."""
        tensors = {name: getattr(self, name)[rows] for name in self._fields if name != "condition"}
        return Calls(condition={name: values[rows] for name, values in self.condition.items()}, **tensors)


@dataclass(frozen=True)
class ColumnShape:
    """How one trajectory's values of a column are stored: their shape and dtype, and whether each step has its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per_step: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch."), "per_step": self.per_step}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ColumnShape":
        """Return what `to_dict` wrote."""
        return cls(tuple(values["shape"]), getattr(torch, values["dtype"]), values["per_step"])


def features_of(columns: dict[str, ColumnShape]) -> Features:
    """Return the features of a data set with these columns: flat lists of fixed length, and the input as JSON."""
    numbers = {
        name: List(
            Value(str(STORED.get(column.dtype, column.dtype)).removeprefix("torch.")),
            length=int(np.prod(column.shape, dtype=int)),
        )
        for name, column in columns.items()
    }
    return Features(numbers | {INPUT: Value("string")})


def record_batch(columns: dict[str, ColumnShape], values: dict[str, Tensor], inputs: Sequence[str]) -> pa.RecordBatch:
    """Return the rows of some trajectories: `values` (n, *shape) of each column, and their inputs."""
    arrays = []
    for name, column in columns.items():
        flat = values[name].to(STORED.get(column.dtype, column.dtype)).contiguous().flatten().cpu().numpy()
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), int(np.prod(column.shape, dtype=int))))
    schema = features_of(columns).arrow_schema
    return pa.RecordBatch.from_arrays([*arrays, pa.array(list(inputs))], schema=schema)


def split_by_input(inputs: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the trajectories to train on and those to decide by, of the `inputs` of all; see `CalibrationSet.split`.

    Raises ValueError where there are too few of one of them.
    """
    count = len(inputs)
    num_held_out = max(2, round(HELD_OUT_FRACTION * count))
    if count < num_held_out + 2:
        raise ValueError(f"a calibration set needs at least 4 trajectories, 2 of them held out; got {count}.")
    rows_of: dict[str, list[int]] = {}
    for index, text in enumerate(inputs):
        rows_of.setdefault(text, []).append(index)
    if len(rows_of) == 1:
        rows_of = {str(index): [index] for index in range(count)}
    held_out: list[int] = []
    for rows in reversed(rows_of.values()):
        if len(held_out) < num_held_out:
            held_out = [*rows, *held_out]
    train = [index for index in range(count) if index not in set(held_out)]
    if len(train) < 2:
        raise ValueError(
            f"a calibration set needs at least 2 trajectories to train on beside those held out by their inputs; "
            f"{count} trajectories of {len(rows_of)} inputs leave {len(train)}. Record more inputs."
        )
    return train, sorted(held_out)


class CalibrationSet:
    """M whole full-precision trajectories on a grid of N steps.

    `dataset` has a row for each; `rows` are those of this set. `grid` are the recorded steps, `plan` says how each of
    them calls the model. `manifest`: hashes of the model and of the inputs, scheduler, seed, versions. What is drawn
    is on `device`. `stride`: how many recorded steps one of this set's steps is (`every`). `file` is what `dataset` is
    mapped from, if it is.
    """

    def __init__(
        self,
        dataset: Dataset,
        columns: dict[str, ColumnShape],
        grid: Grid,
        plan: StepPlan,
        manifest: dict[str, Any],
        *,
        rows: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        stride: int = 1,
        file: mmap.mmap | None = None,
    ) -> None:
        self.dataset, self.columns, self.plan, self.manifest, self._file = dataset, columns, plan, manifest, file
        self.rows = np.arange(len(dataset)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.device, self.stride = torch.device(device), stride
        self._recorded_grid = replace(grid, timestep=grid.timestep.to(device))
        self._grid = self._recorded_grid.every(stride)
        chunks = dataset.data[STATE].chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._views: dict[str, list[np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_inference_steps(self) -> int:
        """N, the number of steps of the trajectories."""
        return len(self._grid)

    @property
    def timestep(self) -> Tensor:
        """What the model is called with in each step, (N,)."""
        return self._grid.timestep

    def grid(self) -> Grid:
        """Return the steps; their timesteps are on the device of the set."""
        return self._grid

    def denoiser(self, model: nn.Module) -> Denoiser:
        """Return `model` as the recorded pipeline called it."""
        return Denoiser(model, self.plan)

    def _view(self, name: str) -> list[np.ndarray]:
        """Return the stored values of a column, (rows, *shape) of each chunk, without reading them."""
        if name not in self._views:
            shape = self.columns[name].shape
            self._views[name] = [
                chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, *shape)
                for chunk in self.dataset.data[name].chunks
            ]
        return self._views[name]

    def _read(self, name: str, trajectory: Tensor, step: Tensor | None) -> Tensor:
        """Return a column's values for the trajectories (n,) of this set, (n, ...); of one step each, if given."""
        rows = self.rows[trajectory.cpu().numpy()]
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        views, local = self._view(name), rows - self._starts[chunks]
        steps = [slice(None)] * len(rows) if step is None else step.cpu().numpy()
        values = np.stack([views[c][row, k] for c, row, k in zip(chunks, local, steps, strict=True)])
        # Pages that were read stay resident while they are mapped: a long training would hold the whole file.
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(values).to(self.device, self.columns[name].dtype)

    def states(self, trajectory: Tensor, step: Tensor) -> Tensor:
        """Return the states (n, *S) of the trajectories (n,) before the steps (n,); step N is the final state."""
        return self._read(STATE, trajectory, self.stride * step)

    def outputs(self, trajectory: Tensor, step: Tensor) -> Tensor:
        """Return the guided outputs (n, *S) of the trajectories (n,) in the steps (n,).

        Those of a set of every few steps are the outputs that land on its states.
        """
        if self.stride == 1:
            return self._read(OUTPUT, trajectory, step)
        return self._grid.output_to(step, self.states(trajectory, step), self.states(trajectory, step + 1))

    def condition(self, trajectory: Tensor, step: Tensor) -> Condition:
        """Return the condition of the trajectories (n,) in the steps (n,)."""
        return {
            name: self._read(name, trajectory, self.stride * step if column.per_step else None)
            for name, column in self.columns.items()
            if name not in (STATE, OUTPUT)
        }

    @property
    def varies(self) -> bool:
        """Whether conditions change from step to step: they belong to the recorded states then, and to no others."""
        return any(column.per_step for name, column in self.columns.items() if name not in (STATE, OUTPUT))

    def condition_at(self, stride: int = 1) -> Callable[[int], Condition]:
        """Return what gives all trajectories' condition in each `stride`-th step, as `states_of` asks for it."""
        rows = torch.arange(len(self))
        if self.varies:
            return lambda k: self.condition(rows, torch.full_like(rows, stride * k))
        condition = self.condition(rows, torch.zeros_like(rows))
        return lambda k: condition

    @property
    def trajectory(self) -> Tensor:
        """All states, (M, N + 1, *S): read whole into memory."""
        return self._read(STATE, torch.arange(len(self)), None)[:, :: self.stride]

    @property
    def model_output(self) -> Tensor:
        """All guided outputs, (M, N, *S): read whole into memory."""
        rows = torch.arange(len(self))
        if self.stride == 1:
            return self._read(OUTPUT, rows, None)
        return torch.stack([self.outputs(rows, torch.full_like(rows, k)) for k in range(len(self._grid))], dim=1)

    def draw(self, count: int, seed: int) -> Calls:
        """Return `count` random calls."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, len(self), (count,), generator=generator)
        steps = torch.randint(0, self.num_inference_steps, (count,), generator=generator)
        return self.calls(rows, steps)

    def calls(self, trajectory: Tensor, step: Tensor) -> Calls:
        """Return the calls of the trajectories (n,) in the steps (n,)."""
        return Calls(
            trajectory,
            step,
            self.states(trajectory, step),
            self.timestep[step.to(self.device)],
            self.condition(trajectory, step),
            self.outputs(trajectory, step),
            self.gains()[step.to(self.device)].square(),
        )

    def to(self, device: torch.device | str) -> "CalibrationSet":
        """Return the set as one that is drawn from on `device`: the model's, while it is trained."""
        return self._with(device=device)

    def select(self, rows: Any) -> "CalibrationSet":
        """Return the set of the trajectories `rows`: a slice, or indices."""
        return self._with(rows=self.rows[rows.cpu().numpy() if isinstance(rows, Tensor) else rows])

    def every(self, stride: int) -> "CalibrationSet":
        """Return a view of the set in every `stride`-th of its steps: the trajectories of a student's teacher."""
        return self._with(stride=stride * self.stride)

    def folded(self) -> "CalibrationSet":
        """Return a view of the set for a model that answers in one branch what was recorded in two.

        Its plan is `StepPlan.folded`; states and outputs are the guided ones. Raises ValueError where the recording is
        not guided so.
        """
        return self._with(plan=self.plan.folded())

    def _with(self, **changes: Any) -> "CalibrationSet":
        values = {name: getattr(self, name) for name in ("plan", "rows", "device", "stride")} | changes
        return CalibrationSet(
            self.dataset, self.columns, self._recorded_grid, manifest=self.manifest, file=self._file, **values
        )

    def split(self) -> tuple["CalibrationSet", "CalibrationSet"]:
        """Return the sets to train on and to decide by: the last 12.5 %, at least 2 trajectories, are held out.

        Held out by their inputs: all trajectories of a prompt are on the same side. Where all have the same input, as
        those of an unconditional model, they differ in their noise alone.
        """
        train, held_out = split_by_input(self.inputs())
        return self.select(train), self.select(held_out)

    def identity(self) -> dict[str, Any]:
        """Return what tells this set from others, as plain values: what a resume file must have been begun with."""
        rows = hashlib.sha256(self.rows.tobytes()).hexdigest()
        return self.manifest | {"num_trajectories": len(self), "rows_sha256": rows}

    def inputs(self) -> list[str]:
        """Return the input of each trajectory as JSON: what the pipeline was called with, images by their hash."""
        return self.dataset.data[INPUT].take(pa.array(self.rows)).to_pylist()

    def gains(self, num_inference_steps: int | None = None) -> Tensor:
        """Return how much an output error at each step of the grid moves the sample: (N,), mean 1, clipped.

        The weight of a step's error throughout PQ and CAD. `num_inference_steps` defaults to the recorded N, of which
        it is a divisor.
        """
        steps = num_inference_steps or self.num_inference_steps
        gain = self._grid.every(self.num_inference_steps // steps).gain()
        return (gain / gain.mean()).clamp(*GAIN_LIMITS).float().to(self.device)

    def check(self, model: nn.Module, scheduler: Any | None = None) -> None:
        """Raise ValueError unless the set was recorded with the weights of `model` and the settings of `scheduler`."""
        found = model_hash(model)
        if found != self.manifest["model_hash"]:
            raise ValueError(
                f"this calibration set was recorded with another model (hash {self.manifest['model_hash'][:12]}, this "
                f"one has {found[:12]}). Record it again with collect_calibration_set."
            )
        if scheduler is not None:
            self.check_scheduler(scheduler)

    def check_scheduler(self, scheduler: Any) -> None:
        """Raise ValueError unless `scheduler` has the settings of the recording."""
        recorded, found = self.manifest["scheduler"], scheduler_settings(scheduler)
        different = {key: (value, found.get(key)) for key, value in recorded.items() if found.get(key) != value}
        if different:
            raise ValueError(
                f"this calibration set was recorded with another scheduler; (recorded, found): {different}. Record it "
                "again with collect_calibration_set."
            )

    def check_student_steps(self, stride: int = 2) -> int:
        """Return N / `stride`, the steps of a student.

        Raises ValueError where that is no whole number, and where the student's first step would amplify an error
        without bound.
        """
        steps = self.num_inference_steps
        if steps % stride:
            raise ValueError(
                f"num_inference_steps={steps} is odd; a student takes half the steps, so record an even number."
                if stride == 2
                else f"num_inference_steps={steps}: a student takes one in {stride} steps, so record a multiple."
            )
        gain = self._grid.every(stride).gain()[0].item()
        if not gain <= MAX_STEP_GAIN:
            raise ValueError(
                f"the first step of a student, from timestep {self.timestep[0].item()}, multiplies an error of the "
                f"model by {gain:.0f} (limit {MAX_STEP_GAIN:.0f}): there is no signal left there. Record more steps, "
                "or use a model that predicts v or the sample."
            )
        return steps // stride

    @classmethod
    def _of(cls, dataset: Dataset, about: dict[str, Any], file: mmap.mmap | None = None) -> "CalibrationSet":
        columns = {name: ColumnShape.from_dict(values) for name, values in about["columns"].items()}
        plan, manifest = StepPlan.from_dict(about["plan"]), json.loads(about["manifest"])
        return cls(dataset, columns, Grid(**about["grid"]), plan, manifest, file=file)

    @property
    def takes_all_steps(self) -> bool:
        """Whether the pipeline took as many steps as it was asked for: image-to-image leaves out the first ones."""
        return self.asked_steps == len(self._recorded_grid)

    @property
    def asked_steps(self) -> int:
        """The number of steps that the recorded pipeline was called with; older sets took what was asked."""
        return self.manifest.get("num_inference_steps", len(self._recorded_grid))

    def student_arguments(self, pipeline: Any, stride: int = 2) -> dict[str, Any]:
        """Return what to call a student's `pipeline` with, so that it takes every `stride`-th of the recorded steps.

        The grids of DDIM nest. Those of flow matching do not, and the student's pipeline is handed its `sigmas`.
        Raises ValueError for a pipeline that does not take them.
        """
        asked = self.asked_steps
        arguments: dict[str, Any] = {"num_inference_steps": asked // stride}
        if isinstance(pipeline.scheduler, DDIMScheduler) or stride == 1:
            return arguments
        if not self.takes_all_steps:
            raise ValueError(
                f"{type(pipeline).__name__}: it took {self.num_inference_steps} of {asked} steps (strength), and "
                "would leave out some of the sigmas that it is handed, too: a student's steps cannot be told. "
                "Use PQ alone."
            )
        check_takes_sigmas(pipeline)
        sigma = self._recorded_grid.every(stride).sigma
        return arguments | {"sigmas": sigmas_for(pipeline.scheduler, sigma, mu=self.manifest["mu"])}

    def _about(self) -> dict[str, Any]:
        if self.stride != 1:
            raise ValueError(f"this is a view of one in {self.stride} steps of a set; save that set.")
        return about_of(self.columns, self._recorded_grid, self.plan, self.manifest)

    def _batches(self) -> Iterable[pa.RecordBatch]:
        """Give the rows of this set, a few at a time."""
        texts = self.inputs()
        for rows in torch.arange(len(self)).split(16):
            values = {name: self._read(name, rows, None) for name in self.columns}
            yield record_batch(self.columns, values, [texts[row] for row in rows])

    def save(self, folder: str | Path) -> None:
        """Write the set as a folder: `data.arrow`, for `datasets.Dataset.from_file`, and what belongs to it."""
        write_set(Path(folder), self._batches(), self._about)

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationSet":
        """Return the set of a folder that `save` wrote, memory-mapped, or of one file of an older version.

        Raises ValueError if it is damaged.
        """
        path = Path(path)
        if path.is_dir():
            about = load_checkpoint(path / ABOUT)
            try:
                dataset, file = mapped_dataset(path / DATA, about["sha256"])
            except (OSError, ValueError) as error:  # pyarrow's are ValueErrors, mmap's of an empty file too
                raise ValueError(f"{path / DATA}: this file is damaged ({error}). Record the set again.") from None
            if len(dataset) != about["num_rows"] or sha256_of(path / DATA) != about["sha256"]:
                raise ValueError(
                    f"{path / DATA}: this file is damaged, or not the one that was written with {path / ABOUT} (its "
                    "contents have another SHA-256). Record the set again."
                )
            return cls._of(dataset, about, file)
        state = load_checkpoint(path)
        if "trajectory" not in state:
            raise ValueError(f"{path}: not a calibration set; it holds {sorted(state)}.")
        return unconditional_set(state["trajectory"], state["model_output"], state["manifest"])

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> None:
        """Push the set as a data set of the Hub, which `datasets.load_dataset(repo_id)` reads or streams."""
        self.dataset.select(self.rows).push_to_hub(repo_id, private=private, token=token)
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder) / ABOUT, self._about() | {"num_rows": len(self)})
            HfApi(token=token).upload_file(
                path_or_fileobj=str(Path(folder) / ABOUT), path_in_repo=ABOUT, repo_id=repo_id, repo_type="dataset"
            )

    @classmethod
    def from_hub(
        cls, repo_id: str, *, num_trajectories: int | None = None, token: str | None = None
    ) -> "CalibrationSet":
        """Return the set that `push_to_hub` made; `num_trajectories` streams the first ones and no more."""
        about = load_checkpoint(hf_hub_download(repo_id, ABOUT, repo_type="dataset", token=token))
        if num_trajectories is None:
            return cls._of(load_dataset(repo_id, split="train", token=token), about)
        stream = load_dataset(repo_id, split="train", streaming=True, token=token).take(num_trajectories)
        tables = list(stream.with_format("arrow").iter(batch_size=STREAMED_ROWS))
        columns = {name: ColumnShape.from_dict(values) for name, values in about["columns"].items()}
        return cls._of(Dataset(pa.concat_tables(tables).cast(features_of(columns).arrow_schema)), about)


def check_takes_sigmas(pipeline: Any) -> None:
    """Raise ValueError for a flow-matching `pipeline` that cannot be told its steps."""
    if "sigmas" not in inspect.signature(type(pipeline).__call__).parameters:
        raise ValueError(
            f"{type(pipeline).__name__}: it does not take `sigmas`, so it cannot be told a student's steps, and those "
            "that it takes by itself are others. Quantize it by PQ alone."
        )


def about_of(columns: dict[str, ColumnShape], grid: Grid, plan: StepPlan, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return all of a set but its rows, for a checkpoint."""
    return {
        "grid": {field.name: getattr(grid, field.name).cpu() for field in fields(grid)},
        "plan": plan.to_dict(),
        "columns": {name: column.to_dict() for name, column in columns.items()},
        "manifest": json.dumps(manifest),
    }


def check_replaceable(folder: Path) -> None:
    """Raise ValueError where `folder` exists and is anything but a calibration set's: it would be deleted."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {DATA, ABOUT}):
        raise ValueError(f"{folder}: it exists and is no calibration set's folder. Name another, or delete it.")


def mapped_dataset(path: Path, fingerprint: str) -> tuple[Dataset, mmap.mmap]:
    """Return the data set of an Arrow file, memory-mapped, and the map.

    As `Dataset.from_file` does, which keeps the map to itself: the memory of pages that were read is given back by it.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Dataset(pa.ipc.open_stream(pa.py_buffer(mapped)).read_all(), fingerprint=fingerprint), mapped


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_set(folder: Path, batches: Iterable[pa.RecordBatch], about: Callable[[], dict[str, Any]]) -> None:
    """Write a set's folder from its rows, of which only one batch is in memory; a kill leaves no half of it.

    `about` is asked once all rows are written.
    """
    check_replaceable(folder)
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    batches = iter(batches)
    first = next(batches)
    count = 0
    with pa.OSFile(str(temporary / DATA), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)
            count += batch.num_rows
    save_checkpoint(temporary / ABOUT, about() | {"num_rows": count, "sha256": sha256_of(temporary / DATA)})
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def unconditional_set(trajectory: Tensor, model_output: Tensor, manifest: dict[str, Any]) -> CalibrationSet:
    """Return the set of trajectories (M, N + 1, *S) and outputs (M, N, *S) of an unconditional model, in memory.

    Its steps are those of the DDIM scheduler in `manifest`, as files of older versions have it.
    """
    grid = ddim_grid(DDIMScheduler(**manifest["scheduler"]), model_output.shape[1])
    columns = {
        name: ColumnShape(tuple(values.shape[1:]), torch.float32)
        for name, values in ((STATE, trajectory), (OUTPUT, model_output))
    }
    batch = record_batch(columns, {STATE: trajectory, OUTPUT: model_output}, ["{}"] * len(trajectory))
    return CalibrationSet(Dataset(pa.Table.from_batches([batch])), columns, grid, StepPlan(), manifest)


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Return the settings of `scheduler`, as plain values; names and versions of files are none."""
    settings = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return json.loads(json.dumps(settings, default=str))


def input_text(values: dict[str, Any]) -> str:
    """Return one image's arguments of a pipeline as JSON, with the SHA-256 of whatever is no number and no text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"sha256": tensors_hash({"": value})}
        if hasattr(value, "tobytes"):  # a PIL image, an array
            return {"sha256": hashlib.sha256(value.tobytes()).hexdigest()}
        raise TypeError(f"{type(value).__name__}: expected numbers, texts, images or tensors as a pipeline's inputs.")

    return json.dumps(values, sort_keys=True, default=plain)


def check_float32(model: nn.Module) -> None:
    """Raise ValueError for a model in half precision: its latents would be, too."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(
            f"expected a model in float32, got {sorted(map(str, dtypes))}. Load it with dtype=torch.float32."
        )
