"""The folder of a run of `compress`: whose it is, what its stages left there, and where they ran."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from diffusers_pqcad.compression.checkpoint import room_for, write_text
from diffusers_pqcad.compression.processes import on_main
from diffusers_pqcad.evaluation.speed import environment
from diffusers_pqcad.publishing.settings import Settings, flat, settings_of

# What may change between two runs in a folder: the rows there stay as they are.
NEUTRAL_SETTINGS = (
    "output_dir",
    "cache_dir",
    "num_threads",
    "train_device",
    "gradient_checkpointing",
    "offload_to_disk",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "ablations",
    "only_ablations",
    "float_steps",
    "measure_memory",
    "validation_prompts",
    "validation_steps",
    "report_to",
    "logging_dir",
    "tracker_project_name",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
)
# Paths of one computer.
LOCAL_SETTINGS = (
    "pretrained_model_name_or_path",
    "lora_weights",
    "output_dir",
    "cache_dir",
    "extractor",
    "calibration_set",
    "clip_model",
    "logging_dir",
    "resume_from_checkpoint",
)
# Where a run's prompts come from: its copy of them is what counts, and what a recipe is repeated with.
PROMPT_SETTINGS = ("prompts_file", "dataset_name", "dataset_config_name", "prompt_column")
PROMPTS_FILE, PROMPTS = (
    "prompts.txt",
    "prompts_sha256",
)  # the copy of a run's prompts, and what the folder knows them by

T = TypeVar("T")


class Site(NamedTuple):
    """Where a run works: the folder of what its stages leave, the device that trains, whether it tells how it goes.

    And how many processes there are: as many times `train_batch_size` are CAD's images. `offload_folder` is where
    trainings keep what waits; None: in memory.
    """

    state: Path
    device: str
    progress: bool
    num_processes: int = 1
    offload_folder: Path | None = None

    def say(self, text: str) -> None:
        """Print a heading between the progress bars."""
        if self.progress:
            print(f"\n== {text}", flush=True)


def claim_folder(folder: Path, settings: Settings, prompts: Sequence[str] = ()) -> None:
    """Take the folder for these settings, or refuse one that was begun with others, or holds something else.

    `prompts`, those of the run, are copied to the folder: they are what counts, not where they were.
    """
    begun, text = folder / "state" / "settings.yaml", "".join(f"{prompt}\n" for prompt in prompts)
    mine = flat(settings) | ({PROMPTS: hashlib.sha256(text.encode()).hexdigest()} if prompts else {})
    if (folder / "state" / "calibration.safetensors").exists():
        raise ValueError(f"{folder} was begun by an older version; give another output_dir, or delete the folder.")
    if begun.exists():
        # One that was begun when there were fewer settings has the defaults of the others.
        theirs = flat(settings_of({})) | yaml.safe_load(begun.read_text())
        if theirs.get(PROMPTS) != mine.get(PROMPTS):
            raise ValueError(
                f"prompts_file: {folder} was begun with {_prompts(folder, theirs)}, and these are "
                f"{'others' if prompts else 'none'}. Give those, or another output_dir, or delete the folder to start "
                "over."
            )
        changed = {key: (theirs.get(key), mine.get(key)) for key in theirs if theirs[key] != mine.get(key)}
        changed = {key: values for key, values in changed.items() if key not in (*NEUTRAL_SETTINGS, *PROMPT_SETTINGS)}
        if changed:
            raise ValueError(
                f"{folder} was begun with other settings; (there, now): {changed}. Give another output_dir, or delete "
                "the folder to start over."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no state/settings.yaml; give another output_dir.")
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_text(begun, yaml.safe_dump(mine, sort_keys=False))
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe_of(mine), sort_keys=False))
    if prompts:
        write_text(folder / PROMPTS_FILE, text)


def _prompts(folder: Path, begun: dict[str, Any]) -> str:
    return f"the prompts in {folder / PROMPTS_FILE}" if PROMPTS in begun else "no prompts"


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that repeat a run anywhere: nothing of this computer, or of whoever pushes it."""
    left_out = (*NEUTRAL_SETTINGS, *LOCAL_SETTINGS, *PROMPT_SETTINGS, PROMPTS)
    recipe = {key: value for key, value in values.items() if key not in left_out}
    path = values["pretrained_model_name_or_path"]
    if path is not None and not Path(path).exists():  # on the Hub
        recipe["pretrained_model_name_or_path"] = path
    return recipe


def cached(path: Path, make: Callable[[], T], save: Callable[[Path, T], None], load: Callable[[Path], T]) -> T:
    """Return what the file `path` holds; what `make` returns is saved there the first time, and read back, too.

    Of several processes, all make it, and the main one saves it.
    """
    if not on_main(path.exists):
        made = make()
        on_main(save_in_place, path, made, save)
    return load(path)


def save_in_place(path: Path, value: T, save: Callable[[Path, T], None]) -> None:
    """Write `value` by `save`, in a folder of the run's; NotWrittenError where the folder around that is gone."""
    with room_for(path.parent):
        path.parent.mkdir(exist_ok=True)  # not its parents: a disk that is gone would come back empty
    save(path, value)


def save_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def load_json(path: Path) -> Any:
    """Return the value of a JSON file."""
    return json.loads(path.read_text())


def note_training(site: Site, key: str) -> None:
    """Keep that the training `key` runs here: the table names its places, as the folder may go on elsewhere."""
    path = site.state / f"{key}-training.json"
    places = load_json(path) if path.exists() else []
    here = {"device": site.device, "num_processes": site.num_processes} | environment()
    # Older versions ran in one process.
    before = {"num_processes": 1} | places[-1] if places else {}
    if any(before.get(name, ...) != here[name] for name in ("device", "num_processes", "cpu", "gpu", "torch")):
        save_json(path, [*places, here])


def noted_trainings(site: Site) -> dict[str, Any]:
    """Return the places of each training of this folder, by key."""
    suffix = "-training.json"
    return {path.name.removesuffix(suffix): load_json(path) for path in sorted(site.state.glob(f"*{suffix}"))}
