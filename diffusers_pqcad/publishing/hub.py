"""Results tables and model cards: every figure comes from a run's `metrics.json`."""

import logging
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from diffusers_pqcad.evaluation.perceptual import MIN_LPIPS_SIZE
from diffusers_pqcad.loading.coverage import percent
from diffusers_pqcad.publishing.front_matter import Facts, base_model_of, front_matter
from diffusers_pqcad.publishing.pushing import CARD, is_repo_id
from diffusers_pqcad.publishing.sizes import memory_table

logger = logging.getLogger(__name__)

# What a table says of layers by the kernel that computed them.
KERNELS = {"x86": "int8 kernels in C", "onednn": "int8 kernels of oneDNN", "reference": "floating point (reference)"}
START, END = "<!-- pqcad:start -->", "<!-- pqcad:end -->"
# How many of them are said so; the Hub has no task of its own for classes. Tasks are those of older runs.
KINDS = {"prompt": ("prompt", "prompts"), "class_labels": ("class", "classes")}
TASKS = {None: "unconditional-image-generation", "prompt": "text-to-image", "class_labels": None}


def results_table(metrics: dict[str, Any], *, times: bool = True) -> str:
    """Return the Markdown table of a run: one row per model, each with what it costs and how close it comes.

    Without `times`, where other work was in the way of them, none are shown.
    """
    distance_name = next((row["metric_name"] for row in metrics["rows"] if row["metric_name"]), None)
    has_pictures = any(row.get("image_ssim") is not None for row in metrics["rows"])
    has_evaluations = all("model_evaluations" in row for row in metrics["rows"])  # runs from before have none
    header = ["model", "avg. bits", "steps", *(["model evaluations"] if has_evaluations else [])]
    header += ["size MB", *(["ms an image", "speed-up"] if times else []), "SQNR dB", "median dB"]
    header += ["picture PSNR dB", "SSIM"] if has_pictures else []
    has_lpips = any(row.get("lpips") is not None for row in metrics["rows"])
    has_clip = any(row.get("clip_score") is not None for row in metrics["rows"])
    header += [*(["LPIPS"] if has_lpips else []), *(["CLIP score"] if has_clip else [])]
    has_accuracy = any(row.get("prompt_accuracy") is not None for row in metrics["rows"])
    header += (["distance"] if distance_name else []) + (["prompt accuracy"] if has_accuracy else [])
    lines = [header]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for row in metrics["rows"]:
        exact = row["sqnr_db"] in ("inf", float("inf"))
        low, high = (0.0, 0.0) if exact else map(float, row["sqnr_interval_db"])  # "inf" is JSON's
        cells = [
            row["name"],
            f"{row['average_bits']:.2f}",
            str(row["num_inference_steps"]),
            *([str(row["model_evaluations"])] if has_evaluations else []),
            f"{row['size_bytes'] / 1e6:.2f}",
            *(speed(row) if times else []),
            "(reference)" if exact else f"{float(row['sqnr_db']):.2f} [{low:.2f}, {high:.2f}]",
            "" if exact else f"{float(row['sqnr_median_db']):.2f}",
        ]
        if has_pictures:
            cells += ["", ""] if exact else [f"{float(row['image_psnr_db']):.2f}", f"{row['image_ssim']:.4f}"]
        cells += [figure(row, "lpips", ".4f", left_out=exact)] if has_lpips else []
        cells += [figure(row, "clip_score", ".2f")] if has_clip else []
        cells += [f"{row['frechet_distance']:.2f}"] if distance_name else []
        lines.append(cells + ([prompt_accuracy(row, exact=exact)] if has_accuracy else []))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figure(row: dict[str, Any], name: str, form: str, *, left_out: bool = False) -> str:
    """Return the cell of a figure, which is empty where it was not measured, or is `left_out`."""
    return "" if left_out or row.get(name) is None else format(row[name], form)


def speed(row: dict[str, Any]) -> list[str]:
    """Return the milliseconds an image of a row, and how often they fit into those of full precision."""
    mine, theirs = (row[name]["median_ms"] for name in ("latency_ms", "reference_latency_ms"))
    return [f"{mine:.2f}", f"{theirs / mine:.2f}"]


def prompt_accuracy(row: dict[str, Any], *, exact: bool) -> str:
    """Return the share of a row's images that show what their prompts say, and its change but for the reference."""
    text = f"{100 * row['prompt_accuracy']:.1f} %"
    if exact:
        return text
    low, high = (100 * end for end in row["prompt_accuracy_change_interval"])
    return f"{text} ({100 * row['prompt_accuracy_change']:+.1f} [{low:+.1f}, {high:+.1f}])"


def _environment_of(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row["environment"].items() if not isinstance(value, (list, dict))}


def packed_shares(metrics: dict[str, Any]) -> str:
    """Return, for the table's notes, what share of all weights those are; nothing where it was not measured."""
    measured = [row.get("packed_share") for row in metrics["rows"]]
    shares = sorted({percent(share) for share in measured if share})
    return f"; they are {' or '.join(shares)} of all weights" if shares else ""


def input_notes(metrics: dict[str, Any]) -> list[str]:
    """Return what the images were made from, where a pipeline has inputs."""
    inputs = metrics.get("inputs")
    if inputs is None:
        return []
    shared, measured = inputs["num_shared"], inputs["num_measured"]
    seen = "none" if shared == 0 else "all" if shared == measured else str(shared)
    arguments = [f"{name} {value}" for name, value in metrics["call_arguments"].items()]
    if inputs["negative_prompt"] is not None:
        arguments.append(f"negative prompt {plain(inputs['negative_prompt'])}")
    return [
        f"Inputs: {counted(inputs['kind'], measured)}, {seen} of which the calibration set was recorded with"
        f"{', and that with other noise' if shared else ''}{'; ' if arguments else ''}{', '.join(arguments)}."
    ]


def prompt_notes(metrics: dict[str, Any]) -> list[str]:
    """Return where the prompts come from, where there are some; runs from before do not know."""
    found = metrics.get("prompts_from")
    if found is None:
        return []
    if found["kind"] != "dataset":
        return ["Prompts: of a file." if found["kind"] == "file" else "Prompts: those in the teacher's folder."]
    name = "a data set in a folder" if found["dataset"] is None else f"the data set {plain(found['dataset'])}"
    configuration = "" if found["configuration"] is None else f" (configuration {plain(found['configuration'])})"
    return [f"Prompts: a sample of the column {plain(found['column'])} of {name}{configuration}."]


def counted(kind: str, count: int) -> str:
    """Return how many inputs of a kind there are, as "1 prompt"."""
    return f"{count} {KINDS[kind][count != 1]}"


def plain(text: str) -> str:
    """Return `text` in quotation marks, on one line, as Markdown that shows it as it is, and breaks nothing."""
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", " ".join(text.split()))
    return f'"{text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}"'


def own_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return how much faster the student is than the pipeline with its own scheduler, where that was replaced."""
    by_key = {row["key"]: row for row in rows}
    if "as_you_run_it" not in by_key or "pq_cad" not in by_key:
        return []

    def share(row: dict[str, Any]) -> float:  # of full precision in the recorded steps, measured in turns with it
        return row["latency_ms"]["median_ms"] / row["reference_latency_ms"]["median_ms"]

    own, student = by_key["as_you_run_it"], by_key["pq_cad"]
    return [
        f"Against {own['name']}, {own['num_inference_steps']} steps, the student is {share(own) / share(student):.2f} "
        "times faster. That row's images are those of another scheduler, so they are others than the reference's."
    ]


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


def time_notes(row: dict[str, Any], fidelity_of: str) -> list[str]:
    """Return what the times of a table are, where `row` is the first of it."""
    return [
        "ms an image: median of rounds that alternate with full precision at "
        f"{row['reference_num_inference_steps']} steps, batch {row['latency_batch_size']}"
        f"{', of the call without decoding' if fidelity_of == 'latents' else ''}. Speed-up: of these two."
    ]


def table_notes(metrics: dict[str, Any], *, times: bool = True) -> str:
    """Return what a reader must know to read the table: n, seed, definitions, hardware, versions.

    `times` as in `results_table`.
    """
    row = metrics["rows"][0]
    environment = _environment_of(row)
    name = next((row["metric_name"] for row in metrics["rows"] if row["metric_name"]), None)
    fidelity_of = row.get("fidelity_of", "images")  # of runs from before pipelines had latents
    is_decoded = any(other.get("image_ssim") is not None for other in metrics["rows"])
    notes = [
        f"n = {row['num_images']} images, seed {row['seed']}. SQNR: of the final {fidelity_of} to full precision at "
        f"{row['reference_num_inference_steps']} steps from the same noise, with a 95 % bootstrap interval "
        "over images; a few images that end somewhere else decide it. Median: that of the median image.",
        f"Average bits: over the quantized layers' weights, scales not counted{packed_shares(metrics)}. Size: the "
        f"denoiser's files{', its LoRA in floating point among them' if metrics.get('adapter') else ''}.",
        *(time_notes(row, fidelity_of) if times else []),
        *input_notes(metrics),
        *prompt_notes(metrics),
        *(own_notes(metrics["rows"]) if times else []),
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
    if "model_evaluations" in row:
        notes.insert(2, "Model evaluations: of the denoiser, for an image: steps times branches of guidance.")
    if is_decoded:
        kind = "decoded pictures" if fidelity_of == "latents" else "pictures in 8 bits"
        notes.insert(1, f"Picture PSNR and SSIM: of the {kind}, to those of full precision.")
    notes[1:1] = network_notes(metrics["rows"][0])
    if row.get("prompt_accuracy") is not None:
        notes.insert(
            1,
            "Prompt accuracy: share of the images in which a classifier finds what the prompt says; in brackets its "
            "change against the reference, in points, on the same prompts and noise, with a 95 % bootstrap interval.",
        )
    if name:
        notes.insert(1, f"distance: {name}, lower is better; comparable at equal n only.")
    return "\n".join(f"- {note}" for note in notes)


def network_notes(row: dict[str, Any]) -> list[str]:
    """Return by which networks the pictures of a table were judged, where they were; `row` is the first of it."""
    notes = []
    if row.get("lpips") is not None:
        notes.append(
            f"LPIPS: mean distance of the pictures to those of full precision by the network {row['lpips_network']}, "
            f"lower is better; pictures below {MIN_LPIPS_SIZE} pixels were enlarged to that."
        )
    if row.get("clip_score") is not None:
        notes.append(
            f"CLIP score: 100 times the mean cosine between pictures and prompts by {plain(row['clip_model'])}."
        )
    return notes


def model_card(metrics: dict[str, Any], *, repo: str, license_id: str | None) -> str:
    """Return the model card of a run, front matter included; a missing measurement leaves its row or column out."""
    settings, pq = metrics["settings"], metrics["pq"]
    teacher, final = metrics["rows"][0], next(row for row in metrics["rows"] if row["key"] == "pq_cad")
    ratio = teacher["size_bytes"] / final["size_bytes"]
    tag = f"w{settings['weight_bits']:g}a{settings['activation_bits'] or 32}"
    steps = final["num_inference_steps"]
    part = f"its {metrics['component']} " if metrics["other_models"] else ""
    return Template(files("diffusers_pqcad.publishing").joinpath("model_card.md").read_text()).substitute(
        front_matter=front_matter(facts_of(metrics, repo, license_id, tag), final, measured_inputs(metrics)),
        title=f"{metrics['teacher_id']} in {tag.upper()}, {part}{ratio:.1f} times smaller, {steps} steps",
        summary=(
            f"A compressed version of `{metrics['teacher_id']}`, made with diffusers-pqcad: "
            f"{pq['average_bits']:.2f} bits a weight of the quantized layers on average, sampling in {steps} steps in "
            f"the place of {teacher['num_inference_steps']}.{untouched_models(metrics)}"
        ),
        table=results_table(metrics),
        table_notes=table_notes(metrics),
        memory=f"\n{memory_table(metrics['memory'])}\n" if "memory" in metrics else "",
        repo=repo,
        load_adapter=f'pipe.load_lora_weights("{repo}")\n' if metrics.get("adapter") else "",
        student_call=student_call(metrics),
        shown_inputs=shown_inputs(metrics),
        method=method(metrics),
        reproduce=reproduce(metrics),
        limits=limits(metrics),
    )


def facts_of(metrics: dict[str, Any], repo: str, license_id: str | None, tag: str) -> Facts:
    """Return what the Hub is told of a run's student in `repo`; `license_id` comes before that of the base."""
    kind, data_set = input_kind(metrics), (metrics.get("prompts_from") or {}).get("dataset")
    return Facts(
        repo=repo,
        task=metrics.get("pipeline_tag", TASKS[kind]),
        base_model=base_model_of(metrics["teacher_id"], is_on_hub=metrics["teacher_from"] == "hub"),
        license={"license": license_id} if license_id else metrics.get("base_license", {}),
        datasets=[data_set] if data_set is not None and is_repo_id(data_set) else [],
        tags=["pqcad", "quantized", "distillation", *(["class-conditional"] if kind == "class_labels" else []), tag],
    )


def measured_inputs(metrics: dict[str, Any]) -> str:
    """Return what the images of a run's table were made from, in a few words."""
    inputs, row = metrics["inputs"], metrics["rows"][0]
    of_inputs = "" if inputs is None else f" of {counted(inputs['kind'], inputs['num_measured'])}"
    return f"{row['num_images']} images{of_inputs}, noise of seed {row['seed']}"


def limits(metrics: dict[str, Any]) -> str:
    """Return what the student was not measured for."""
    folded = (
        " Guidance is folded into it: it answers in one branch, as its teacher does with guidance in two, so it is "
        "called with `guidance_scale=1`, and takes no other scale and no negative prompt."
    )
    return (
        "It was compared with its teacher, not with other methods. The number of steps that it was distilled for "
        "is in its config (`num_inference_steps`); other numbers run, and were not measured unless the table says so."
        f"{folded if metrics.get('guidance_folded') else ''}"
    )


def input_kind(metrics: dict[str, Any]) -> str | None:
    """Return the name of the argument that the inputs of a run's pipelines are, None for unconditional ones."""
    return None if metrics["inputs"] is None else str(metrics["inputs"]["kind"])


def untouched_models(metrics: dict[str, Any]) -> str:
    """Return, after the summary, which models of the pipeline are as they were; nothing where there are no others."""
    names = ", ".join(f"`{name}`" for name in metrics["other_models"])
    return f" That is its `{metrics['component']}`; as in the original are {names}." if names else ""


def method(metrics: dict[str, Any]) -> str:
    """Return what was done, as a list of Markdown."""
    settings, pq, cad, inputs = metrics["settings"], metrics["pq"], metrics["cad"], metrics["inputs"]
    schedulers = metrics["schedulers"]
    replaced = f", by a {schedulers['recorded']} in the place of its {schedulers['own']}" if schedulers["own"] else ""
    of_inputs = "" if inputs is None else f" of {counted(inputs['kind'], inputs['num_recorded'])},"
    outcome = (
        f"the state after {cad['best_step']} updates was the best on the held-out trajectories"
        if cad["best_step"]
        else "no trained state beat the undistilled start on the held-out trajectories, so the start was kept"
    )
    trained = {key: places_of(metrics, key) for key in ("pq", "pq_cad")}
    return (
        f"1. Calibration set: {settings['num_trajectories']} full-precision trajectories{of_inputs} of "
        f"{settings['num_inference_steps']} steps, seed {metrics['calibration_seed']}; {metrics['num_held_out']} held "
        f"out{replaced}.\n"
        f"2. PQ: {pq['num_rounds']} rounds in {pq['num_stages']} stages{trained['pq']}.\n"
        f"3. CAD: {cad_updates(metrics)}, {cad_terms(settings)}; {outcome}{trained['pq_cad']}.\n"
        f"4. {float_layers(metrics['float_layers'])}"
    )


def places_of(metrics: dict[str, Any], key: str) -> str:
    """Return where a stage trained, after what it did: devices, torch and commit; nothing where it was not noted.

    The students of several halvings have keys that begin alike.
    """
    keys = [name for name in metrics.get("training", {}) if re.fullmatch(rf"{key}(_\d+)?", name)]
    places = []
    for place in (each for name in keys for each in metrics["training"][name]):
        count = place.get("num_processes", 1)
        device = place["cpu"] if place["device"] == "cpu" else place["gpu"] or place["device"]
        code = "" if place.get("commit") is None else f", commit {place['commit']}"
        places.append(f"{'' if count == 1 else f'{count} processes of '}{device} (torch {place['torch']}{code})")
    return f"; trained on {', then '.join(dict.fromkeys(places))}" if places else ""


def float_layers(names: Sequence[str]) -> str:
    """Return which Linear and convolution layers stay in floating point; those of repeated blocks are one name."""
    if not names:
        return "No Linear or convolution layer stays in floating point."
    alike = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    listed = ", ".join(f"`{name}`" for name in alike)
    return f"Linear and convolution layers that stay in floating point ({len(names)}): {listed}."


def reproduce(metrics: dict[str, Any]) -> str:
    """Return how to repeat the run, from what is beside the card."""
    flags, beside = "--config recipe.yaml", "the file is"
    if input_kind(metrics) == "prompt":
        flags, beside = f"{flags} --prompts_file prompts.txt", "the files are"
    others = ""
    if metrics["teacher_from"] == "folder":  # which is that of one computer
        others = ", with the folder of the teacher as `--pretrained_model_name_or_path`"
    if (metrics.get("adapter") or {}).get("is_given"):
        others += ", with the LoRA that it came with as `--lora_weights`"
    return f"Reproduce: `python examples/distill.py {flags}` ({beside} in this repository){others}."


def student_call(metrics: dict[str, Any]) -> str:
    """Return the arguments of the student's call, as Python: those that it was measured with, and its first input."""
    inputs, mine = metrics["inputs"], metrics["student_arguments"]
    arguments = mine | metrics["call_arguments"] | mine
    is_guided = not metrics.get("guidance_folded", False)
    given = []
    if input_kind(metrics) == "prompt":
        given = [quoted(metrics["shown_inputs"][0])]
        if inputs["negative_prompt"] is not None and is_guided:
            given.append(f"negative_prompt={quoted(inputs['negative_prompt'])}")
    elif inputs is not None:
        given = [f"class_labels=[{metrics['shown_inputs'][0]}]"]
    if "sigmas" in arguments:
        arguments["sigmas"] = [shortest(sigma) for sigma in arguments["sigmas"]]
    return ", ".join([*given, *(f"{name}={value!r}" for name, value in arguments.items())])


def quoted(text: str) -> str:
    """Return `text` as a Python literal, without what begins a comment of Markdown."""
    return repr(text).replace("<!--", "\\x3c!--")


def shortest(sigma: float) -> float:
    """Return the number of fewest digits that is `sigma` in float32, in which schedulers keep it: the same step."""
    return float(str(np.float32(sigma)))


def shown_inputs(metrics: dict[str, Any]) -> str:
    """Return what the columns of the picture were made from, a line; nothing for an unconditional pipeline."""
    kind = input_kind(metrics)
    if kind is None:
        return ""
    texts = [plain(item) if kind == "prompt" else str(item) for item in metrics["shown_inputs"]]
    return f"\nFrom left to right, {KINDS[kind][len(texts) != 1]} {'; '.join(texts)}.\n"


def cad_updates(metrics: dict[str, Any]) -> str:
    """Return how often CAD updated its students, how often it halved the steps, and whether guidance is folded in."""
    settings = metrics["settings"]
    halvings = settings.get("num_halvings", 1)
    times = {0: ", in as many steps", 1: ""}.get(halvings, f" in each of {halvings} halvings")
    folded = ", guidance folded into one branch" if metrics.get("guidance_folded") else ""
    return f"{settings['max_train_steps']} updates{trained_part(metrics)}{times}{folded}"


def trained_part(metrics: dict[str, Any]) -> str:
    """Return what CAD trained, after its number of updates; nothing where that was all."""
    adapter = metrics.get("adapter")
    return {
        "all": "",
        "scales": " of scales, biases and norms",
        "lora": f" of a LoRA of rank {adapter['rank']} on {adapter['num_layers']} layers" if adapter else "",
    }[metrics["settings"].get("trainable", "all")]


def cad_terms(settings: dict[str, Any]) -> str:
    """Return what a student learned from; runs from before these were settings had all of it."""
    teacher = settings.get("teacher", "quantized")
    terms = [{"quantized": "quantized teacher", "fp": "full-precision teacher", "none": "no teacher"}[teacher]]
    terms.append("full-precision calibration" if settings.get("calibration", True) else "no calibration")
    return ", ".join(terms)


def write_card(folder: str | Path, card: str, *, on_hub: str | None = None) -> Path:
    """Write `card` to the folder's README.md; text outside our markers in an existing one is kept.

    Where there is none, that in the card `on_hub` is. The front matter is ours: its tags must say what the model is
    now.
    """
    path = Path(folder) / CARD
    note, tail = words_of(path.read_text(encoding="utf-8") if path.exists() else "")
    there = words_of(on_hub or "")
    if not (note + tail).strip():
        note, tail = there
    elif "".join(there).strip() not in ("", (note + tail).strip()):
        logger.warning("%s: what you wrote in the card on the Hub is replaced by what you wrote in this one.", path)
    if (note + tail).strip():
        before, ours = card.split(START, 1)
        card = before + note + START + ours.split(END, 1)[0] + END + tail
    path.write_text(card, encoding="utf-8")
    return path


def words_of(card: str) -> tuple[str, str]:
    """Return what others wrote in a card, before and after our text; of one without it, all but its front matter."""
    if START in card and END in card:
        head, tail = card.split(START, 1)[0], card.split(END, 1)[1]
    else:
        head, tail = card, ""
    note = head.split("---\n", 2)[-1] if head.startswith("---\n") else head  # after the front matter
    return (note, tail) if START in card and END in card else ("", f"\n\n{note.strip()}\n" if note.strip() else "")
