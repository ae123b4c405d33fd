"""The card of a quantized pipeline without a run of `compress`: what its files say, and what was measured of it.

Bits, layers and bytes are those of the files' headers. `quantization.json` beside them says what they do not: which
pipeline was quantized, and what `pqcad evaluate` measured.
"""

import inspect
import json
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import diffusers
from torch import nn

from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.loading.coverage import percent
from diffusers_pqcad.loading.inspection import Inspection
from diffusers_pqcad.loading.plan import inspect_skeleton
from diffusers_pqcad.loading.saved import INDEX_FILE, SavedModel, saved_models, skeleton
from diffusers_pqcad.publishing.front_matter import Facts, base_model_of, front_matter, license_of, task_of
from diffusers_pqcad.publishing.hub import float_layers, plain, results_table, table_notes
from diffusers_pqcad.publishing.run_folder import load_json, save_json
from diffusers_pqcad.publishing.sizes import memory_table

SOURCE_FILE = "quantization.json"


class QuantizedPart(NamedTuple):
    """A quantized model of a saved pipeline: what its config and its headers say, and its number of parameters."""

    saved: SavedModel
    layers: Inspection
    num_parameters: int


def note_source(folder: Path, source: str, *, is_file: bool = False, made_by: str | None = None) -> None:
    """Write to a pipeline's `folder` which pipeline it was made of, a folder, a file or a repository, and how.

    Of a place on this computer its last name is kept, and the licence that its card names.
    """
    path = Path(source)
    kind = "file" if is_file else "folder" if path.exists() else "hub"
    save_json(
        folder / SOURCE_FILE,
        {
            "source": source if kind == "hub" else path.resolve().name,
            "source_from": kind,
            "made_by": made_by,
            "base_license": {} if is_file else license_of(source),
            "rows": None,
        },
    )


def source_of_folder(folder: Path) -> dict[str, Any]:
    """Return what `note_source` wrote to `folder`; of one without, that nothing is known."""
    names = ("source", "source_from", "made_by", "rows", "memory")
    nothing: dict[str, Any] = {"base_license": {}} | dict.fromkeys(names)
    path = folder / SOURCE_FILE
    return nothing | (load_json(path) if path.is_file() else {})


def quantized_parts(folder: Path) -> dict[str, QuantizedPart]:
    """Return the quantized models of a pipeline's folder by name, from headers alone."""
    found = {}
    for name, saved in saved_models(folder).items():
        if saved.quantization is not None:
            model = skeleton(saved)
            found[name] = QuantizedPart(saved, inspect_skeleton(model), num_parameters(model))
    return found


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters of the float model that the packed `model` stands for."""
    floats = sum(parameter.numel() for parameter in model.parameters())
    return floats + sum(layer.weight_shape.numel() for layer in packed_layers(model).values())


def quantized_card(folder: Path, *, repo: str, license_id: str | None = None) -> str:
    """Return the card of the quantized pipeline in `folder`, front matter included; see the module.

    Raises ValueError where nothing in it is quantized.
    """
    parts, source = quantized_parts(folder), source_of_folder(folder)
    if not parts:
        raise ValueError(f"{folder}: expected a pipeline with a quantized model, got one in floating point.")
    index = json.loads((folder / INDEX_FILE).read_text())
    kind = getattr(diffusers, str(index.get("_class_name")), None)  # None: a class of the pipeline's own
    rows = source["rows"]
    facts = Facts(
        repo=repo,
        task=None if kind is None else task_of(kind),
        base_model=base_model_of(source["source"] or "", is_on_hub=source["source_from"] == "hub"),
        license={"license": license_id} if license_id else source["base_license"],
        datasets=[],
        tags=["pqcad", "quantized", *sorted({tag_of(part) for part in parts.values()})],
    )
    row = None if rows is None else rows[-1]
    inputs = "" if row is None else f"{row['num_images']} images, noise of seed {row['seed']}"
    call = shown_call(kind, parts)
    return Template(files("diffusers_pqcad.publishing").joinpath("quantized_card.md").read_text()).substitute(
        front_matter=front_matter(facts, row, inputs),
        title=title(source["source"], parts),
        summary=summary(source, parts, sorted(set(saved_models(folder)) - set(parts))),
        table=parts_table(parts),
        notes="\n".join(f"- {note}" for note in parts_notes(parts)),
        quality=quality(rows, source["memory"]),
        repo=repo,
        imports="".join(f"{line}\n" for line in call.imports),
        call=call.text,
        result=call.result,
    )


def tag_of(part: QuantizedPart) -> str:
    """Return the short name of a model's bits, such as w4a8; widths that are no whole numbers have a point."""
    config = part.saved.quantization
    assert config is not None  # of a quantized part
    return f"w{config.weight_bits:g}a{config.activation_bits or 32}"


def title(source: str | None, parts: Mapping[str, QuantizedPart]) -> str:
    """Return the heading: which pipeline, and what of it has how many bits."""
    bits = ", ".join(f"{name} in {tag_of(part).upper()}" for name, part in parts.items())
    return f"{source or 'A pipeline'}, its {bits}"


def summary(source: Mapping[str, Any], parts: Mapping[str, QuantizedPart], others: list[str]) -> str:
    """Return what this is, from what is known of it."""
    base = "a pipeline that its files do not name" if source["source"] is None else f"`{source['source']}`"
    how = (
        "" if source["made_by"] is None else f" by `{source['made_by']}`, from its weights alone: nothing was trained"
    )
    names = ", ".join(f"`{name}`" for name in parts)
    rest = f" As in the original, in floating point: {', '.join(f'`{name}`' for name in others)}." if others else ""
    return f"A quantized version of {base}, made with diffusers-pqcad{how}. Quantized: {names}.{rest}"


def parts_table(parts: Mapping[str, QuantizedPart]) -> str:
    """Return a Markdown table with a row of each quantized model, from its headers."""
    lines = [
        "| model | layers packed | bits on average | of all weights | MB | in bfloat16 MB | in float32 MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, part in parts.items():
        covered = part.layers.coverage
        bits = covered.average_bits()
        assert bits is not None  # something is packed
        packed = sum(layer.kernel is not None for layer in part.layers)
        cells = [
            name,
            f"{packed} of {len(part.layers)}",
            f"{bits[0]:.2f}",
            percent(covered.share(covered.packed)),
            f"{part.saved.num_bytes / 1e6:.2f}",
            *(f"{size * part.num_parameters / 1e6:.2f}" for size in (2, 4)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_notes(parts: Mapping[str, QuantizedPart]) -> list[str]:
    """Return what a reader of the table must know, and the widths, activations and float layers of each model."""
    notes = [
        "MB: of the tensors, by the headers of the files. In bfloat16 and float32: 2 and 4 bytes of each of the float "
        "model's parameters. Bits: over the packed weights, scales not counted."
    ]
    for name, part in parts.items():
        packed = [layer for layer in part.layers if layer.kernel is not None]
        widths = Counter(layer.bits for layer in packed)
        listed = ", ".join(f"{bits} bits: {count}" for bits, count in sorted(widths.items(), reverse=True))
        activations = ", ".join(sorted({layer.activations for layer in packed}))
        floats = [layer.name for layer in part.layers if layer.kernel is None]
        notes.append(f"{name}: layers by the width of their weights: {listed}. Activations: {activations}.")
        notes.append(f"{name}: {float_layers(floats)}")
    return notes


def quality(rows: list[dict[str, Any]] | None, memory: list[dict[str, Any]] | None) -> str:
    """Return the tables of `pqcad evaluate` with their notes, or that nothing was measured."""
    if rows is None:
        return "Neither its images nor its times and its memory were measured."
    metrics = {"rows": rows}
    return f"{results_table(metrics)}\n\n{table_notes(metrics)}\n\n{memory_table(memory)}"


class Call(NamedTuple):
    """Code that makes an image: what it imports, the call, and the name of its result."""

    imports: list[str]
    text: str
    result: str


def shown_call(kind: type | None, parts: Mapping[str, QuantizedPart]) -> Call:
    """Return the call of a pipeline of the class `kind`: that of a student in its steps, and with its guidance.

    Other pipelines are called as they are by default.
    """
    names = {} if kind is None else inspect.signature(kind.__call__).parameters
    task = None if kind is None else task_of(kind)
    takes_image = task in ("image-to-image", "image-to-video") or "controlnet" in components_of(kind)
    arguments = ['"a photo of a cat"'] if "prompt" in names else []
    arguments += ["class_labels=[0]"] if "class_labels" in names else []
    arguments += ['image=load_image("picture.png")'] if takes_image else []
    configs = [part.saved.quantization for part in parts.values()]
    students = [config for config in configs if config is not None and config.num_inference_steps is not None]
    arguments += [f"num_inference_steps={config.num_inference_steps}" for config in students[:1]]
    arguments += ["guidance_scale=1"] if any(config.guidance_folded for config in students) else []
    is_video = (task or "").endswith("video")
    return Call(
        ["from diffusers.utils import load_image"] if takes_image else [],
        f"pipe({', '.join(arguments)}).{'frames' if is_video else 'images'}[0]",
        "video" if is_video else "image",
    )


def components_of(kind: type | None) -> set[str]:
    """Return the names of the parts of a class of pipelines."""
    return set() if kind is None else set(inspect.signature(kind).parameters)


def take_evaluation(folder: Path, evaluation: Path) -> None:
    """Keep what `pqcad evaluate` wrote to the folder `evaluation` beside the pipeline in `folder`.

    Raises ValueError for a folder without them, and where they are those of another pipeline, or of other files.
    """
    if not all((evaluation / name).is_file() for name in ("settings.json", "metrics.json")):
        raise ValueError(f"evaluation: expected the output folder of a finished `pqcad evaluate`, got {evaluation}.")
    measured = Path(load_json(evaluation / "settings.json")["pretrained_model_name_or_path"])
    metrics = load_json(evaluation / "metrics.json")
    rows = metrics["rows"]
    if measured.resolve() != folder.resolve():
        raise ValueError(f"evaluation: {evaluation} is that of {measured}, not of {folder}.")
    sizes = {name: sum(file.stat().st_size for file in (folder / name).iterdir()) for name in quantized_parts(folder)}
    if rows[-1]["size_bytes"] not in sizes.values():
        raise ValueError(
            f"evaluation: {evaluation} was made when the denoiser had {rows[-1]['size_bytes']} bytes, and now it has "
            f"{plain(', '.join(map(str, sizes.values())))}. Measure it again."
        )
    save_json(folder / SOURCE_FILE, source_of_folder(folder) | {"rows": rows, "memory": metrics.get("memory")})
