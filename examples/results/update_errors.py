"""Write the table of all error messages, examples/guides/errors.md, from the source; a test compares.

    python examples/results/update_errors.py

What stands for a value in a message is shown as "…". A message says by itself what to do: after its first sentence, or
by what it expected. Those that need another word are in FIXES, by how they begin.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, GUIDE = ROOT / "diffusers_pqcad", ROOT / "examples" / "guides" / "errors.md"
ERRORS = (
    "ValueError",
    "TypeError",
    "RuntimeError",
    "OSError",
    "FileNotFoundError",
    "MemoryError",
    "MissingExtraError",
    "HubError",
)
VALUE = "…"
ROOMS = {
    "cli": "Commands",
    "publishing": "Runs of compress, and publishing",
    "evaluation": "Measuring",
    "compression": "Recording, PQ and CAD",
    "loading": "Configs, loading and saving",
    "runtime": "Blocks that are computed at once",
    "layers": "Layers and their files",
    "kernels": "Kernels",
    "numerics": "Integers",
}
HEAD = """# Every message

Written by `python examples/results/update_errors.py` from the source; "…" stands for a value. Search this page for
words of the message that you see. Where a message begins with a name and a colon, the rest of it may be in another
row. The common cases are in [troubleshooting](troubleshooting.md).
"""
WANTED = re.compile(r"expected (.+?)(?:[,;] got\b|, there is\b|, found\b|; expected|\.(?:\s|$))")
LISTED = re.compile(r"(?:one|some|widths out) of …(?:, …)?")  # a message shows what there is to choose from
NO_FIX = ("got ", "it holds ", "it takes ", "expected ", "not supported")  # what may follow a semicolon
EDITED = "download the file, or save the model, again"
FIXES = {
    "…: nothing was quantized": "leave out exclusions, or give search_all_modules",
    "dry_run: of a single file": "give --pipeline, or leave --dry_run out",
    "…: no such folder, and not to be had": "check the name and the spelling; log in, if it is private",
    "pretrained_model_name_or_path: …: …": "check the name and the spelling; log in, if it is private",
    "…: its SHA-256 is": "restore the file, or run examples/train_classifier.py again",
    "lora_weights: … cannot be loaded": "give a LoRA of this pipeline; what follows is the reason",
    "a calibration set needs at least 4": "record more trajectories",
    "…: not a calibration set": "name the folder or file of a calibration set",
    "…: … does not take it": "leave it out, or spell it as one of those that it takes",
    "…: a checkpoint holds": "leave out what is of another type",
    "timestep: the denoiser is called with several": "such a pipeline is not supported: quantize it on load",
    "PQCADConfig: unknown settings": "spell them as one of those expected, or leave them out",
    "….qweight: holds the code": EDITED,
    "….…: scales must be": EDITED,
    "….…: expected 0 to": EDITED,
    "….…: the tensors of this layer": EDITED,
    "extractor: …": "see the row of what follows the colon",
    "calibration_set: …: …": "see the row of what follows the colon",
    "validation_prompts: …": "see the row of what follows the colon",
    "…: no image was made of it": "what follows is why; leave memory out with --no_measure_memory",
    "evaluation: … is that of": "measure this pipeline, or give the folder of its own evaluation",
    "lora_weights: … holds an adapter of another": "give a LoRA",
    "prompts_file: there is no file": "give a file that is there",
    "prompts_file: … cannot be read": "save the file as UTF-8 text",
    "dataset_name: … cannot be loaded": "check the name; give dataset_config_name where it has several",
    "dataset_name: … has no prompt": "name another column with prompt_column",
    "fold_guidance: … Set": "set fold_guidance to False",
    "push_to_hub needs": "give --hub_model_id user/name",
    "…: unknown settings": "compare the names with --help",
    "--config: there is no file": "give a file that is there",
    "…: it ran without a": "call the pipeline by hand: it has to take steps",
    "reference: step … is all zero": "give another seed or input, whose states are not zero",
    "num_inference_steps=…: a student takes": "record a multiple of that number",
    "…: not a file of this package": "name a file that the package wrote",
    "teacher=… with calibration=…": "switch one of the terms on",
    "teacher=…, but teacher is": "pass a teacher, or set teacher='none'",
    "student: it was quantized from another": "record a calibration set with the student's own teacher",
    "teacher='fp': this is not": "pass the recorded model, or set teacher='quantized'",
    "…: the model never calls this layer, so": "name it in modules_to_not_convert",
    "… has nothing to quantize": "give a model with Linear or convolution layers that are not exempt",
    "… is nested differently": "record inputs of one kind, with the same arguments",
    "… has no batch axis, and differs": "record inputs of one size and with the same settings",
    "it returns no tensor with a batch axis": "name the unit's layers in modules_to_not_convert",
    "…: the pipeline hands it to its denoiser": "such a pipeline is not supported: quantize it on load",
    "the scheduler steps … states": "such a pipeline is not supported: quantize it on load",
    "…: it changes with the step for some": "record inputs of one kind, with the same arguments",
    "the calibration set must come from": "record with the pipeline in full precision",
    "weight_bits_by_module: method 'fixed'": "give all layers one width, or method='progressive'",
    "weight_bits_by_module lacks": "give the config that was saved with this model",
    "…: the weights hold a NaN": "train or download the weights again",
    "…: it is no … as … has it": "name the pipeline that the file belongs to",
    "…: its weights cannot be rounded": "load the adapter again",
    "…: an input of … cannot be added": "call the block with an input of its own size",
    "… was called without `timestep`": "pass `timestep`, as pipelines do",
    "… is damaged": "delete the cache folder; it is compiled again",
    "no C compiler was found": "install GCC, or name one with CC",
    "… is clang": "install GCC, or name it with CC",
    "this PyTorch has no OpenMP": "install a PyTorch from pytorch.org; or do with the slower kernels",
    "PyTorch's OpenMP is in no file": "install a PyTorch from pytorch.org; or do with the slower kernels",
    "attention: no memory": "take a smaller batch or picture",
    "…: an input of …, padded": "take a larger picture",
    "there is no layer to allocate": "give a model with layers that are not exempt",
    "MODEL: expected a pipeline in full precision": "give the pipeline that the quantized one was made from",
    "hub_model_id: expected user/name": "put your user name, or that of your organisation, and a slash before it",
    "folder: expected the folder of a pipeline, with": "give the folder that compress or quantize wrote",
    "…: expected the folder of a pipeline, with": "give the folder that holds model_index.json",
    "…: expected weights in .safetensors files": "save the model again, with safe_serialization=True",
    "calibration_set: expected a folder that": "run `pqcad calibrate` first, and give the folder that it wrote",
    "resume_from_checkpoint: expected": "give latest, or the name of a checkpoint of this output_dir",
    "…: expected a pipeline with a quantized model": "quantize it first; or push it with diffusers' own push_to_hub",
    "evaluation: expected the output folder": "let `pqcad evaluate` finish: the same command goes on",
    "only_ablations: expected some of": "give some of those that it lists",
    "quantization: expected settings of": "leave out those that it names",
    "…: …: expected a value, got null": "give a value, or leave the line out",
    "…: …: expected a list": "write it as a list: [a, b]",
    "…: labels: expected": "name a label for each of the logits in the extractor's config",
    "reference: expected varying values": "compare with samples that are not constant",
    "prompt_labels: expected an extractor": "leave prompt_labels out, or give an extractor with labels",
    "prompt_labels: expected an entry": "add the prompt's labels to the file",
    "reference_samples: expected": "make them with the call that it ends with",
    "expected at least 4 trajectories": "record more trajectories",
    "…: expected one component that denoises": "such a pipeline is not supported: quantize it on load",
    "stride=… must divide": "give a divisor of the number of steps",
    "mixed_precision: expected": "give bf16, or no",
    "…: expected … rows for … images": "such a pipeline is not supported: quantize it on load",
    "…: it calls its denoiser": "call it so that a picture takes as many calls alone as beside others",
    "a step makes … calls": "switch off guidance intervals and skipped layers",
    "expected … steps as in": "record all inputs with one number of steps",
    "format_version: expected": "install a newer diffusers-pqcad; a later version wrote the file",
    "weight_bits: an average of": "give an average that it names, or other bit_choices",
    "…: expected …, got …. The file was edited": EDITED,
    "…: expected a safetensors file": EDITED,
    "…: expected a dtype out of": "save the model in a dtype that it lists",
    "expected a model of diffusers or transformers": "install the newer library that has it",
    "…: expected shape …, by config.json": "give the weights and the config.json of one model",
    "…: expected a pipeline with one of": "give the pipeline whose denoiser the file holds",
    "…: group norm of its block": "the model was changed after loading: load it again",
    "…: attention of its block": "call the block with inputs of its own shapes",
    "attention: expected queries": "call it with inputs of these shapes",
    "…: expected (..., …), got an input": "call the layer with as many channels as it has",
    "…: expected (N, …, H, W), got an input": "call the layer with as many channels as it has",
    "group_size=… must divide": "give a divisor of the number of inputs, or None for one scale a row",
    "an average of … bits cannot": "take an average between the smallest and the largest of the widths",
}


class Message(NamedTuple):
    """An error of the package: the room that raises it, and what it says."""

    room: str
    text: str


def text_of(node: ast.expr) -> str | None:
    """Return the text of a string in the source, with VALUE for what is put in; None where it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        both = [text_of(side) for side in (node.left, node.right)]
        return "".join(side or VALUE for side in both)
    return None


def texts_of(node: ast.expr) -> list[str]:
    """Return the texts that an argument of an error may be: two of a choice."""
    if isinstance(node, ast.IfExp):
        return [*texts_of(node.body), *texts_of(node.orelse)]
    found = text_of(node)
    return [] if found is None else [found]


def raised_in(path: Path) -> list[ast.expr]:
    """Return what the errors of a module are made of, in order; of a name, what the module gives it."""
    tree = ast.parse(path.read_text())
    given = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    calls = [node.exc for node in sorted(raised, key=lambda item: item.lineno) if isinstance(node.exc, ast.Call)]
    made = [call.args[0] for call in calls if ast.unparse(call.func) in ERRORS and call.args]
    return [given.get(item.id, item) if isinstance(item, ast.Name) else item for item in made]


def messages(path: Path) -> Iterator[str]:
    """Yield what the errors of a module say, in order."""
    for item in raised_in(path):
        yield from texts_of(item)


def all_messages() -> list[Message]:
    """Return the messages of the package, each once, room by room."""
    found = [
        Message(room, text)
        for room in ROOMS
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for text in messages(path)
    ]
    return list(dict.fromkeys(message for message in found if re.search(r"\w{3}", message.text)))


def parted(text: str) -> tuple[str, str]:
    """Return what a message says is wrong, and what it says to do."""
    known = next((fix for begin, fix in FIXES.items() if text.startswith(begin)), None)
    if known is not None:
        return text, known
    sentences = re.split(r"(?<=[.?])\s+(?=[A-Z…])", text)
    if len(sentences) > 1 and sentences[1] != VALUE and not sentences[1].startswith("The file was edited"):
        return sentences[0], " ".join(sentences[1:])
    said, _, fix = text.partition("; ")
    if fix and not fix.startswith(NO_FIX):
        return f"{said}.", fix
    wanted = WANTED.search(text)
    return text, f"give {LISTED.sub('one of those that it lists', wanted[1])}" if wanted else ""


def cell(text: str) -> str:
    """Return a text as a cell of a Markdown table, as it is."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*\[\]|~$<>])", r"\\\1", text)


def page() -> str:
    """Return the page."""
    parts, found = [HEAD], all_messages()
    for room, title in ROOMS.items():
        rows = [parted(message.text) for message in found if message.room == room]
        lines = "\n".join(f"| {cell(said)} | {cell(fix)} |" for said, fix in rows)
        parts.append(f"\n## {title}\n\n| It says | Do this |\n|---|---|\n{lines}\n")
    return "".join(parts)


if __name__ == "__main__":
    GUIDE.write_text(page())
