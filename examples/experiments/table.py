"""Write examples/results/method.md from the rows of all experiments.

    python examples/experiments/table.py

Intervals are 95 % bootstrap intervals over seeds of paired differences; a single seed has none.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from subjects import NUM_STEPS, RESULTS, SUBJECTS

from diffusers_pqcad.loading.depth import gains_by_depth

Row = dict[str, Any]
NUM_RESAMPLES = 10_000


def rows_of(folder: Path) -> list[Row]:
    """Return the rows in `folder`, by the names of their files."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def mean(values: Iterable[float]) -> float:
    """Return the mean of `values`."""
    values = list(values)
    return sum(values) / len(values)


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of paired `differences`."""
    values = torch.tensor(differences, dtype=torch.float64)
    draws = torch.randint(0, len(values), (NUM_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(values[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def decibels(rows: list[Row]) -> str:
    """Return "mean / median" over the seeds of `rows`, in dB."""
    return f"{mean(row['mean'] for row in rows):.1f} / {mean(row['median'] for row in rows):.1f}" if rows else ""


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def grouped(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return `rows` by their values of `keys`, in the order met."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def present(rows: list[Row]) -> list[str]:
    """Return the subjects of `rows`, in the order of SUBJECTS."""
    return [subject for subject in SUBJECTS if any(row["subject"] == subject for row in rows)]


def widths_table(rows: list[Row]) -> str:
    """Return the fidelity of loading without data, by allocation and average bits."""
    keys = ("arm", "bits", "activation_bits", "shortcuts")
    subjects, groups = present(rows), grouped(rows, *keys, "subject")
    lines = [
        [arm, shortcuts, f"{bits:g}", str(activation_bits or "float")]
        + [decibels(groups.get((arm, bits, activation_bits, shortcuts, subject), [])) for subject in subjects]
        for arm, bits, activation_bits, shortcuts in sorted(
            {tuple(row[key] for key in keys) for row in rows}, key=lambda key: (key[1], key[3], key[0])
        )
    ]
    return markdown(["allocation", "shortcuts", "average bits", "activations", *subjects], lines)


def controller_table(rows: list[Row], base: str = "no momentum") -> str:
    """Return the fidelity of the controller's allocation, by arm and images a price.

    Beside the arm `base`: the differences to it at as many images, and at four times as many.
    """
    theirs = {
        (row["subject"], row["seed"], row["budget"], row["images_per_price"]): row
        for row in rows
        if row["arm"] == base
    }

    def differences(found: list[Row], times: int) -> list[str]:
        pairs = [
            (row, other)
            for row in found
            if (
                other := theirs.get(
                    (row["subject"], row["seed"], row["budget"], times * row["images_per_price"]),
                )
            )
            and other is not row
        ]
        if not pairs:
            return ["", ""]
        values = [[ours[key] - other[key] for ours, other in pairs] for key in ("mean", "median")]
        return [f"{mean(each):+.2f} ({low:+.2f} to {high:+.2f})" for each in values for low, high in [interval(each)]]

    lines = [
        [subject, f"{budget:g}", str(images), arm, str(len(found)), f"{mean(row['evaluations'] for row in found):.0f}"]
        + [decibels(found), *differences(found, 1), *differences(found, 4)]
        for (subject, budget, images, arm), found in sorted(
            grouped(rows, "subject", "budget", "images_per_price", "arm").items()
        )
    ]
    header = ["model", "bits", "images a price", "arm", "seeds", "evaluations", "mean / median dB"]
    others = [f"mean, against {base}", "median", f"mean, against {base} at 4 times the images", "median"]
    return markdown([*header, *others], lines)


def errors_of(rows: list[Row]) -> torch.Tensor:
    """Return the error of each image, as a share of the images' variance, (seeds, images), seeds in order."""
    images = torch.tensor([row["images"] for row in sorted(rows, key=lambda row: row["seed"])], dtype=torch.float64)
    return 10 ** (-images / 10)


def gains(rows: list[Row], base: list[Row]) -> tuple[str, str]:
    """Return by how much the mean and the median image of `rows` are closer than those of `base`, in dB.

    Each with its 95 % bootstrap interval over seeds, and over the images of each: both are drawn anew, in pairs. Rows
    of seeds that the other lacks do not count.
    """
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in base}
    if not seeds:
        return "", ""
    ours, theirs = (errors_of([row for row in side if row["seed"] in seeds]) for side in (rows, base))
    generator = torch.Generator().manual_seed(0)
    size = (NUM_RESAMPLES // 10, *ours.shape)
    of_seed = torch.randint(0, size[1], size[:2], generator=generator)[..., None]
    of_image = torch.randint(0, size[2], size, generator=generator)
    cells = []
    for centre in (lambda errors: errors.mean(-1), lambda errors: errors.median(-1).values):
        decibel = [
            10 * (centre(b) / centre(a)).log10().mean(-1)
            for a, b in ((ours, theirs), (ours[of_seed, of_image], theirs[of_seed, of_image]))
        ]
        low, high = torch.quantile(decibel[1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        cells.append(f"{decibel[0].item():+.1f} ({low:+.1f} to {high:+.1f})")
    return cells[0], cells[1]


def arms_table(rows: list[Row], base: str) -> str:
    """Return what each arm came to on each model: fidelity, gains over the arm `base`, error on fresh noise, time."""
    groups, lines = grouped(rows, "subject", "arm"), []
    for subject in present(rows):
        for name in {row["arm"]: None for row in sorted(rows, key=lambda row: row["arm"] != base)}:
            found = groups.get((subject, name))
            if not found:
                continue
            differences = ("", "") if name == base else gains(found, groups.get((subject, base), []))
            fresh = [row["fresh_after"] / row["fresh_before"] for row in found if row.get("fresh_before", 1.0) != 1.0]
            lines.append(
                [subject, name, str(len(found)), decibels(found), *differences]
                + [f"{100 * mean(row['below_15'] for row in found):.1f} %"]
                + [f"x{mean(fresh):.2f}" if fresh else ""]
                + [thousands([row["evaluations"] for row in found if "evaluations" in row])]
                + [f"{mean(row['seconds'] for row in found) / 60:.1f}"]
            )
    header = ["model", "arm", "seeds", "mean / median dB", f"mean, against {base!r}", "median", "below 15 dB"]
    return markdown([*header, "fresh error", "evaluations", "minutes"], lines)


def thousands(counts: list[int]) -> str:
    """Return the mean of `counts` in thousands; nothing where nobody counted."""
    return f"{mean(counts) / 1000:.0f} k" if counts else ""


def activations_table(rows: list[Row]) -> str:
    """Return what activations cost, by the kind of their ranges, on the arm for which they were measured."""
    rows = [row for row in rows if row["activations"]]
    lines = []
    for subject in present(rows):
        found = [row for row in rows if row["subject"] == subject]
        kinds = {kind: [row["activations"][kind] for row in found] for kind in found[0]["activations"]}
        lines.append([subject, str(len(found)), decibels(found), *map(decibels, kinds.values())])
    header = ["model", "seeds", "static, 8 groups (default)", *rows[0]["activations"]] if rows else []
    return markdown(header, lines)


def departures_table(rows: list[Row]) -> str:
    """Return in which steps images left that end in another picture, by quarters of all steps, where it was noted."""
    rows = [row for row in rows if row["activations"]]
    lines, quarter = [], NUM_STEPS // 4
    for subject in present(rows):
        found = [row for row in rows if row["subject"] == subject]
        images, steps = sum(len(row["images"]) for row in found), [k for row in found for k in row["departures"]]
        counts = [sum(start <= k < start + quarter for k in steps) for start in range(0, NUM_STEPS, quarter)]
        lines.append([subject, str(len(found)), str(images), str(len(steps)), *map(str, counts)])
    quarters = [f"steps {start + 1} to {start + quarter}" for start in range(0, NUM_STEPS, quarter)]
    return markdown(["model", "seeds", "images", "below 15 dB", *quarters], lines)


INTRODUCTION = """\
# What each part of the method is worth

Written by `examples/experiments/table.py` from the JSON rows in `examples/results/method`, which the scripts in
`examples/experiments` wrote; each row says by which commit, versions and computer. SQNR to the full-precision
images at 20 steps from the same noise, in dB: of all images / of the median image, means over seeds; 256 images, of
the bundled models in PQ and CAD 128. A few images end in another picture, and decide the first figure. Four models:
the two bundled ones, and digits (8x8, trained by `train_teacher.py`, one for each seed), each with v and with epsilon
prediction.

Evaluations: of the whole model, for an image; one with gradients counts three times; recording and the iterations of
the reconstruction, of a block each, are not counted. Rows from before they were counted have none: an arm of CAD takes
as many on every model, and one of PQ about as many.
"""
SENSITIVITY = """\
The error of the model's output where one layer alone is rounded: its weights to 4 or 8 bits, or its input to 8.
Shares of the sum over all layers, in one step, weighted by the squared gain of each step. Simulated; one seed.
"""
WIDTHS = """\
`PQCADConfig()` takes an average of 5 bits: the fewest at which the median image has 20 dB on all four models.
"Gain 16": a layer's error counts 16 times as much for each level further out in the UNet; "weight error": all
layers count the same. On the epsilon model of Fashion-MNIST the gain is worth 15 dB in the median image at 5 bits.
On its v model it is worth nothing at 4 and 6 bits, where the mean is behind; a gain of 4 is better there, and
fails on the epsilon model below 6 bits. "Shortcuts": those of the last up block, in floating point, as by default,
or rounded like any layer. At 8 bits floating point is worth 3.6 and 2.3 dB in the median image of the two epsilon
models, and more bits are never worse then; with rounded ones, 6 and 8 bits were behind 5. Packed layers, not
simulated; activation ranges of each call; one seed.
"""
CONTROLLER = """\
The momentum pays where prices are measured from few images. A price is the perturbation of the output by a known
change of a layer's weights; "sensitivity, momentum", the library's, averages their ratio, over all rounds and widths
of a layer. At 1 and 2 images it brings the median image 0.7 dB closer on the v models and 0.9 and 0.7 dB on the
epsilon models than no momentum (intervals exclude zero), and no further than no momentum at four times the images: a
quarter of the evaluations does, which was the target. In the mean that holds on the v models; on the epsilon models
no arm can be told apart. From 4 images a price on little is left: on the epsilon models 0.4 dB (0.2 to 0.7) at 8,
elsewhere nothing that excludes zero. PQ's default of 16 images a round is "8" here, as a round has two of these
prices.

"Momentum", the library's before, averages the prices of a layer at one width, and begins anew at the next: it reaches
the target on one kind of models, and not on the other. Its logarithms, a longer memory ("average of all rounds") and
a term of dispersion (a noisy layer waits) are no better. "Solver": each layer's error at each width is measured
alone, and an integer program shares out the bits; errors that add up are a worse guide than prices that are measured
again in each round. Weights are rounded to nearest, nothing is reconstructed, activations stay in floating point;
simulated. The last columns are paired with "no momentum" at as many images, and at four times as many, with a 95 %
bootstrap interval over seeds (of teacher and prices).
"""
PARTS = """\
Each arm is a whole run of PQ with the settings of `distill.py`, but for what its name says. "Momentum of prices" (of
a layer at one width, as the library had it): all further arms but "no momentum" and those of 4 images had it, too.
"One width": the same reconstruction without any transitions. "One stage": straight to the budget, in as many rounds.
"Weight signal": prices are changes of the weights, as the method's abstract words it, and not of the model's output.
"Roll-back beyond 1.5": as the library did before, a move that cost more than 1.5 times its prediction was undone, and
other layers moved instead; it brings nothing on three seeds, and left the code. "No trust region": a round may add
any error, so a stage takes two rounds at the most. "Reconstruction at 3e-4": one rate for all tensors, the default
before; other rates are in rounding steps of each layer. Intervals: 95 %, over seeds and images, both drawn anew in
pairs. Minutes of one core beside other jobs, on the bundled models several at once.

Adaptive widths are worth 4.0 and 4.6 dB in the median image of the bundled models, 14 dB on digits. After the
reconstruction neither kind of momentum, nor none, can be told apart in the median image; in the mean of
Fashion-MNIST's v model PQ is behind (8 of 384 images end elsewhere; 4 with the momentum of prices, 3 without any). Of
4 images a round PQ comes as close as of 16, but for 0.3 dB in the median image of digits. Two stages cannot be told
from one at an equal number of rounds, nor the trust region from none. The abstract's signal, changes of the weights,
costs 10.4 and 9.7 dB in the median image of digits. "Steps 11 to 15 double": an error there, where images leave for
another picture, counts twice. On the epsilon model of Fashion-MNIST 4 of 384 images end elsewhere then, with the
momentum of prices 13; on the other three models as many as before, and no figure is better. So it is no default.
Simulated.
"""
ACTIVATIONS = """\
The state that "momentum of prices" leaves, with the ranges of its 8-bit activations chosen in other ways, or none
rounded. Simulated.
"""
DEPARTURES = """\
Of the images that "momentum of prices" ends below 15 dB: in which of the 20 steps they left. An image has left in the
first step from which on its squared error stays above 10 times that of the median image. Simulated.
"""
CAD = """\
At 4 bits the quantized teacher with the calibration term brings 95 and 94 % of what a full-precision teacher brings,
in the median image of the two bundled models (mean of three seeds), and 0.8 and 1.1 dB more than calibration alone.
Its student is closer to full precision at 20 steps than full precision at 10 is: by 4.0 / 6.2 dB on the v model, by
0.4 / 3.7 dB on the epsilon model. Twice the updates change little. At 8 bits it is by 5.4 / 7.3 dB on the epsilon
model (one seed): what bounds the student there are PQ's 4 bits, and neither the data nor the training.

On digits, with v and with epsilon prediction, the quantized teacher with the calibration term brings 99 and 90 % of a
full-precision teacher's gain. With 16 trajectories it brings 1.5 dB (1.3 to 1.8) and 1.4 dB (0.8 to 1.7) more than
calibration alone; with 128 it brings 0.7 dB (0.5 to 1.0), and nothing on digits with epsilon prediction. There the
calibration term is what counts: without it the mean is 2.3 dB behind (1.5 to 2.9). A gate, which closed where the
student had overtaken the teacher by a momentum of their errors, is worth nothing that could be measured: without it
the median image is 0.0 dB (-0.1 to +0.1) and 0.1 dB (-0.2 to +0.3) away. So it left the code; all rows with a teacher
and the calibration term were trained with it, but for "gate off".

All arms train one PQ state to take half the steps, with the library's defaults but for what their name says: 320
updates of 32 images. The teacher is that PQ state at N steps, or the full-precision model; "calibration alone" has
none, and takes half the time. "16 trajectories": so many in the place of 128, 14 of them to train on. "Fresh error":
what is left of the trajectory error on noise that neither trained nor chose the state. Minutes of one core beside
several other jobs. Simulated.
"""
RECOVERY = """\
All arms train the whole network at N steps, from the PQ state that the library leaves. "Floats r": everything but
the quantized weights and their scales, Adam's rate being r times the size of each tensor; "all r": those as well,
at r times each layer's rounding step. 40 updates of 32 images unless said; the best state by the held-out
trajectory error. "Fresh error": what is left of the trajectory error on noise that neither trained nor chose the
state. A recovery of 20 updates ended each of PQ's stages before; what is left to gain after the reconstruction is
too little for it, and it left the code. Simulated.
"""
DISTILLATION = """\
All arms train one PQ state, with roll-backs, to take half the steps: 160 updates of 32 images at a rate of 3e-3
unless said (the library: 320 at 1e-3), warm-up over 10 updates, linear decay, averaged weights, the best state by
the held-out trajectory error. "1e-3": Adam's rate is 1e-3 times each layer's rounding step for quantized weights,
and 1e-3 times the size of each other tensor; the best on the epsilon model of Fashion-MNIST. "Floats at 1e-5":
everything that is not quantized at one rate, the others at 1e-3, as before. "Flat": one rate for all tensors.
"Fresh error": what is left of the trajectory error on noise that neither trained nor chose the state. "16
trajectories": so many in the place of 128, 14 of them to train on. Simulated.
"""

REPAIR = """\
A few-step LoRA, distilled in floating point (guidance folded into one branch), on the base that it was made for and on
packed ones. "Same LoRA": the base was quantized without it; "below": with it on; "merged": with it in the weights.
"Repaired": then the LoRA alone was trained, on the recording of the floating-point pipeline with it. SQNR of the final
latents to that pipeline's, in dB: of all images / of the median image; the gain is over "quantized base + same LoRA",
with a 95 % interval over seeds and images, and what is left of the squared error beside it. "Teacher": to the guided
floating-point pipeline in all its steps. Packed layers, by the kernels of one computer.
"""
TRAINABLE = """\
CAD to half the steps from one PQ state, by what it trains: SQNR to full precision in all steps, with the gain over
"all"; minutes of one core, and by how much the process's memory grew in the training. Packed layers.
"""

TITLES = {"cad": "CAD", "recovery": "Recovery", "distillation": "Settings of the distillation"}


def sensitivity_table(rows: list[Row]) -> str:
    """Return what share of all layers' errors each level of the UNet has, and the shortcuts of the outermost one."""
    lines = []
    for row in rows:
        gains = gains_by_depth([layer["name"] for layer in row["layers"]], 2.0)
        outermost = max(gains.values())
        places: dict[str, list[Row]] = defaultdict(list)
        for layer in row["layers"]:
            place = f"level {round(math.log2(outermost / gains[layer['name']]))}, from outside"
            places["outermost" if place.startswith("level 0") else place].append(layer)
            if place.startswith("level 0") and layer["name"].endswith("conv_shortcut"):
                places["outermost, shortcuts alone"].append(layer)
        for place in sorted(places, key=lambda name: (name[0] != "o", name)):
            shares = [
                sum(layer[key] for layer in places[place]) / sum(layer[key] for layer in row["layers"])
                for key in ("num_weights", "W4", "W8", "A8")
            ]
            lines.append([row["subject"], place, *(f"{100 * share:.1f} %" for share in shares)])
    return markdown(["model", "layers", "weights", "W4 error", "W8 error", "A8 error"], lines)


def cost_cells(rows: list[Row]) -> list[str]:
    """Return the minutes and the growth in memory of trainings; nothing where there was none."""
    if any("seconds" not in row for row in rows):
        return ["", ""]
    megabytes = mean(row["grown_bytes"] for row in rows) / 1e6
    return [f"{mean(row['seconds'] for row in rows) / 60:.1f}", f"{megabytes:.0f} MB"]


def repair_table(rows: list[Row], base: str = "quantized base + same LoRA") -> str:
    """Return how far the images of a few-step LoRA move when the base is packed, and what a training brings back."""
    lines = []
    for (subject, arm), found in grouped(rows, "subject", "arm").items():
        start = {row["seed"]: row for row in rows if row["subject"] == subject and row["arm"] == base}
        teacher = (
            f"{mean(row['teacher_mean'] for row in found):.1f} / {mean(row['teacher_median'] for row in found):.1f}"
        )
        cells = [subject, arm, str(len(found)), str(found[0]["num_steps"])]
        if "images" not in found[0]:
            cells += ["(reference)", "", ""]
        elif arm == base or not start:
            cells += [decibels(found), "", ""]
        else:
            gain = mean(row["mean"] - start[row["seed"]]["mean"] for row in found if row["seed"] in start)
            cells += [decibels(found), gains(found, list(start.values()))[0], f"{100 * 10 ** (-gain / 10):.0f} %"]
        lines.append([*cells, teacher, *cost_cells(found)])
    header = ["model", "arm", "seeds", "steps", "mean / median dB", "gain, mean", "error left", "teacher"]
    ordered = sorted(lines, key=lambda line: (line[0], line[4] != "(reference)", line[1]))
    return markdown([*header, "minutes", "memory"], ordered)


def trainable_table(rows: list[Row]) -> str:
    """Return what CAD comes to and takes, by what it trains."""
    lines = []
    for (subject, arm), found in grouped(rows, "subject", "arm").items():
        base = [row for row in rows if row["subject"] == subject and row["arm"] == "all"]
        differences = gains(found, base) if arm != "all" else ("", "")
        lines.append([subject, arm, str(len(found)), decibels(found), *differences, *cost_cells(found)])
    header = ["model", "trained", "seeds", "mean / median dB", "mean, against 'all'", "median", "minutes", "memory"]
    return markdown(header, sorted(lines, key=lambda line: line[0]))


def section(title: str, text: str, table: Callable[[list[Row]], str], rows: list[Row]) -> str:
    """Return one section, or nothing where nothing was measured."""
    return f"## {title}\n\n{text}\n{table(rows)}\n" if rows else ""


def document(results: Path) -> str:
    """Return the text of method.md."""
    rates, parts = rows_of(results / "rates"), rows_of(results / "parts")
    sections = [
        INTRODUCTION,
        section("Where rounding hurts", SENSITIVITY, sensitivity_table, rows_of(results / "sensitivity")),
        section("Loading without data", WIDTHS, widths_table, rows_of(results / "widths")),
        section("The controller", CONTROLLER, controller_table, rows_of(results / "controller")),
    ]
    for bits in sorted({row["bits"] for row in parts}, reverse=True):
        found = [row for row in parts if row["bits"] == bits]
        sections.append(section(f"PQ, {bits:g} bits", PARTS, partial(arms_table, base="PQ"), found))
        sections.append(section(f"Images that end elsewhere, {bits:g} bits", DEPARTURES, departures_table, found))
        sections.append(section(f"Activations, {bits:g} bits", ACTIVATIONS, activations_table, found))
    for task, text, base in (
        ("cad", CAD, "none"),
        ("recovery", RECOVERY, "none"),
        ("distillation", DISTILLATION, "3e-3"),
    ):
        for bits in sorted({row["bits"] for row in rates}):
            found = [row for row in rates if row["task"] == task and row["bits"] == bits]
            sections.append(section(f"{TITLES[task]}, {bits:g} bits", text, partial(arms_table, base=base), found))
    adapters = rows_of(results / "lora")
    for title, text, task, tabled in (
        ("A few-step LoRA on a quantized base", REPAIR, "repair", repair_table),
        ("What CAD trains", TRAINABLE, "trainable", trainable_table),
    ):
        for bits in sorted({row["bits"] for row in adapters}, reverse=True):
            found = [row for row in adapters if row["task"] == task and row["bits"] == bits]
            sections.append(section(f"{title}, {bits:g} bits", text, tabled, found))
    return "\n".join(part for part in sections if part)


def main() -> None:
    """Write the file."""
    (RESULTS.parent / "method.md").write_text(document(RESULTS))


if __name__ == "__main__":
    main()
