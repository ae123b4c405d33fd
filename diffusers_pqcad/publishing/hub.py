"""Results tables, model cards and pushing: every figure comes from a run's `metrics.json`."""

from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from diffusers_pqcad.loading.coverage import percent

# What a table says of layers by the kernel that computed them.
KERNELS = {"x86": "int8 kernels in C", "onednn": "int8 kernels of oneDNN", "reference": "floating point (reference)"}
START, END = "<!-- pqcad:start -->", "<!-- pqcad:end -->"
# What may be published: no resume files, no logs, no pickles.
PUBLISHED_FILES = (
    "README.md",
    "recipe.yaml",
    "metrics.json",
    "history.json",
    "model_index.json",
    "assets/*.png",
    "*/config.json",
    "*/scheduler_config.json",
    "*/*.safetensors",
)


def results_table(metrics: dict[str, Any]) -> str:
    """Return the Markdown table of a run: one row per model, each with what it costs and how close it comes."""
    distance_name = next((row["metric_name"] for row in metrics["rows"] if row["metric_name"]), None)
    header = ["model", "avg. bits", "steps", "size MB", "ms an image", "speed-up", "SQNR dB", "median dB", "distance"]
    lines = [header if distance_name else header[:-1]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for row in metrics["rows"]:
        exact = row["sqnr_db"] in ("inf", float("inf"))
        low, high = (0.0, 0.0) if exact else row["sqnr_interval_db"]
        cells = [
            row["name"],
            f"{row['average_bits']:.2f}",
            str(row["num_inference_steps"]),
            f"{row['size_bytes'] / 1e6:.2f}",
            f"{row['latency_ms']['median_ms']:.2f}",
            f"{row['reference_latency_ms']['median_ms'] / row['latency_ms']['median_ms']:.2f}",
            "(reference)" if exact else f"{row['sqnr_db']:.2f} [{low:.2f}, {high:.2f}]",
            "" if exact else f"{row['sqnr_median_db']:.2f}",
        ]
        lines.append(cells + ([f"{row['frechet_distance']:.2f}"] if distance_name else []))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _environment_of(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row["environment"].items() if not isinstance(value, (list, dict))}


def packed_shares(metrics: dict[str, Any]) -> str:
    """Return, for the table's notes, what share of all weights those are; nothing where it was not measured."""
    measured = [row.get("packed_share") for row in metrics["rows"]]
    shares = sorted({percent(share) for share in measured if share})
    return f"; they are {' or '.join(shares)} of all weights" if shares else ""


def kernel_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return which kernels computed the quantized layers while the rows' times were taken; names where rows differ."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.get("kernels") != {}:  # not in floating point
            names.setdefault(kernels_that_ran(row.get("kernels")), []).append(row["name"])
    if len(names) == 1:
        return [f"Kernels: {text}." for text in names]
    return [f"Kernels of {'; '.join(rows_alike)}: {text}." for text, rows_alike in names.items()]


def kernels_that_ran(kernels: dict[str, int] | None) -> str:
    """Return what computed a model's quantized layers, from their numbers by kernel; `None`: it was not recorded."""
    if kernels is None:
        return "not recorded"
    total = sum(kernels.values())
    parts = ", ".join(f"{KERNELS.get(name, name)}: {count} of {total} layers" for name, count in kernels.items())
    return parts if set(kernels) != {"reference"} else f"no int8 kernel ran, so times say nothing of int8; {parts}"


def table_notes(metrics: dict[str, Any]) -> str:
    """Return what a reader must know to read the table: n, seed, definitions, hardware, versions."""
    row = metrics["rows"][0]
    environment = _environment_of(row)
    name = next((row["metric_name"] for row in metrics["rows"] if row["metric_name"]), None)
    notes = [
        f"n = {row['num_images']} images, seed {row['seed']}. SQNR: of the final images to full precision at "
        f"{row['reference_num_inference_steps']} steps from the same noise, with a 95 % bootstrap interval "
        "over images; a few images that end somewhere else decide it. Median: that of the median image.",
        f"Average bits: over the quantized layers' weights, scales not counted{packed_shares(metrics)}. Size: the "
        "denoiser's files.",
        "ms an image: median of rounds that alternate with full precision at "
        f"{row['reference_num_inference_steps']} steps, batch {row['latency_batch_size']}. Speed-up: of these two.",
        *kernel_notes(metrics["rows"]),
        "Measured with " + ", ".join(f"{key} {value}" for key, value in environment.items()) + ".",
    ]
    # A run that is continued may find another computer, or be given other threads.
    names: dict[str, list[str]] = {}
    for other in metrics["rows"][1:]:
        changed = [f"{key} {value}" for key, value in _environment_of(other).items() if environment.get(key) != value]
        if changed:
            names.setdefault(", ".join(changed), []).append(other["name"])
    notes += [f"But with {changed}: {'; '.join(rows)}." for changed, rows in names.items()]
    names = {}
    for row in metrics["rows"]:
        places = metrics.get("training", {}).get(row["key"], [])
        if any(place["device"] != "cpu" for place in places):
            # A device like "cuda" is told by its name; the training went from place to place.
            parts = [f"{place['gpu'] or place['cpu']} (torch {place['torch']})" for place in places]
            names.setdefault(", then ".join(parts), []).append(row["name"])
    notes += [f"Trained on {place}, and measured as the others: {'; '.join(rows)}." for place, rows in names.items()]
    if name:
        notes.insert(1, f"distance: {name}, lower is better; comparable at equal n only.")
    return "\n".join(f"- {note}" for note in notes)


def model_card(metrics: dict[str, Any], *, repo: str, license_id: str | None) -> str:
    """Return the model card of a run, front matter included; a missing measurement leaves its row or column out."""
    settings, pq, cad = metrics["settings"], metrics["pq"], metrics["cad"]
    teacher, final = metrics["rows"][0], next(row for row in metrics["rows"] if row["key"] == "pq_cad")
    ratio = teacher["size_bytes"] / final["size_bytes"]
    tag = f"w{settings['weight_bits']:g}a{settings['activation_bits'] or 32}"
    steps = final["num_inference_steps"]
    outcome = (
        f"the state after {cad['best_step']} updates was the best on the held-out trajectories"
        if cad["best_step"]
        else "no trained state beat the undistilled start on the held-out trajectories, so the start was kept"
    )
    return Template(files("diffusers_pqcad.publishing").joinpath("model_card.md").read_text()).substitute(
        base_model_lines=base_model_lines(metrics["teacher_id"]),
        tag=tag,
        license_line=f"license: {license_id}\n" if license_id else "",
        title=f"{metrics['teacher_id']} in {tag.upper()}, {ratio:.1f} times smaller, {steps} steps",
        summary=(
            f"A compressed version of `{metrics['teacher_id']}`, made with diffusers-pqcad: "
            f"{pq['average_bits']:.2f} bits a weight on average, sampling in {steps} steps in "
            f"the place of {teacher['num_inference_steps']}."
        ),
        table=results_table(metrics),
        table_notes=table_notes(metrics),
        repo=repo,
        student_steps=steps,
        method=(
            f"1. Calibration set: {settings['num_trajectories']} full-precision trajectories of "
            f"{settings['num_inference_steps']} steps, seed {metrics['calibration_seed']}; an eighth held out.\n"
            f"2. PQ: {pq['num_rounds']} rounds in {pq['num_stages']} stages, {pq['num_roll_backs']} transitions "
            "rolled back.\n"
            f"3. CAD: {settings['max_train_steps']} updates, quantized teacher, full-precision calibration, gate; "
            f"{outcome}.\n"
            "4. First and last convolution, the time embedding and the shortcuts in the last up block stay in "
            "floating point."
        ),
        limits=(
            "It was compared with its teacher, not with other methods. The number of steps that it was distilled for "
            "is in its config (`num_inference_steps`); other numbers run, and were not measured unless the table says "
            "so."
        ),
    )


def base_model_lines(teacher_id: str) -> str:
    """Return the front matter's lines about a teacher from the Hub; none for a local one, which the Hub refuses."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(teacher_id)
    except HFValidationError:
        return ""
    return "" if Path(teacher_id).exists() else f"base_model: {teacher_id}\nbase_model_relation: quantized\n"


def write_card(folder: str | Path, card: str) -> Path:
    """Write `card` to the folder's README.md; text outside our markers in an existing one is kept.

    The front matter is ours too: its tags must say what the model is now.
    """
    path = Path(folder) / "README.md"
    if path.exists():
        before = path.read_text()
        if START in before and END in before:
            head, tail = before.split(START, 1)[0], before.split(END, 1)[1]
            note = head.split("---\n", 2)[-1]  # between the front matter and our text
            card = card.split(START, 1)[0] + note + START + card.split(START, 1)[1].split(END, 1)[0] + END + tail
    path.write_text(card)
    return path


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload what is publishable in `folder` to the model repository `repo_id`, creating it; return its URL."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(PUBLISHED_FILES),
        ignore_patterns=["state/*"],
        commit_message="Upload a PQCAD pipeline",
    )
    return str(url)


def check_access() -> None:
    """Raise ValueError, before hours of work, where a push at the end would fail for lack of a network or a token."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(
            f"--push_to_hub: the Hub does not answer or does not know you ({type(error).__name__}: {error}). Log in "
            "with `hf auth login`, or run without --push_to_hub."
        ) from None
