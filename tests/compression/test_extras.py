"""Packages of extras that are missing are named before any work, and the lists of names follow the imports."""

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PIPELINES

from diffusers_pqcad import evaluate
from diffusers_pqcad.compression.extras import MissingExtraError, missing, require
from diffusers_pqcad.evaluation.metrics import bootstrap_interval, kernel_distance, structural_similarity
from diffusers_pqcad.publishing import compress
from diffusers_pqcad.publishing.plots import plot_bits, plot_curves, plot_samples

ROOT = Path(__file__).parents[2]
LIBRARY = sorted((ROOT / "diffusers_pqcad").rglob("*.py"))
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
BELOW = [path for path in LIBRARY if path.parent.name != "cli"]  # it imports no command: their names are short
OURS = {"diffusers_pqcad", *(path.stem for path in SCRIPTS)}

pytestmark = pytest.mark.fast


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # as Python has it for what cannot be imported


def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch):
    hide(monkeypatch, "scipy", "matplotlib")
    assert missing("scipy", "json", "nonsense.part", "matplotlib") == ["scipy", "nonsense.part", "matplotlib"]
    require("eval", "json", "torch")
    with pytest.raises(MissingExtraError, match=r'^scipy, matplotlib: .*pip install "diffusers-pqcad\[train\]"'):
        require("train", "scipy", "json", "matplotlib")


# What the code imports


def requirements(extra: str | None) -> set[str]:
    """The distributions, in lower case, that diffusers-pqcad asks for: always, or for `extra`."""
    found = set()
    for line in requires("diffusers-pqcad") or []:
        name = re.match(r"[\w.-]+", line)[0].lower()
        condition = re.search(r"extra == [\"'](\w+)[\"']", line)
        if (condition and condition[1]) == extra:
            found |= requirements(re.search(r"\[(\w+)\]", line)[1]) if name == "diffusers-pqcad" else {name}
    return found


def brought_along() -> set[str]:
    """The distributions that are there wherever ours is installed: its requirements, and theirs."""
    found, waiting = set(), requirements(None)
    while waiting:
        name = waiting.pop()
        found.add(name)
        needed = {re.match(r"[\w.-]+", line)[0].lower() for line in requires(name) or [] if "extra ==" not in line}
        waiting |= {each for each in needed if each in DISTRIBUTIONS} - found
    return found


MODULES = {module: {name.lower() for name in names} for module, names in packages_distributions().items()}
DISTRIBUTIONS = set().union(*MODULES.values())
ALWAYS_THERE = brought_along()


def optional_imports(node: ast.AST) -> set[str]:
    """The top-level names that `node` imports, of packages that only an extra brings."""
    names = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in each.names}
        elif isinstance(each, ast.ImportFrom) and each.level == 0:
            names.add(each.module.partition(".")[0])
    others = names - sys.stdlib_module_names - OURS
    return {name for name in others if not MODULES.get(name, {name}) & ALWAYS_THERE}


def required(node: ast.AST) -> set[str]:
    """The modules that the calls of `require` in `node` name."""
    calls = [each for each in ast.walk(node) if isinstance(each, ast.Call) and ast.unparse(each.func) == "require"]
    return {ast.literal_eval(argument) for call in calls for argument in call.args[1:]}


def functions(paths: list[Path]) -> Iterator[tuple[str, ast.AST]]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name, node


def reachable_imports(start: ast.AST) -> set[str]:
    """The optional packages that `start`, or a function that it mentions, and so on, imports."""
    defined: dict[str, list[ast.AST]] = {}
    for name, node in functions(BELOW + SCRIPTS):
        defined.setdefault(name, []).append(node)
    seen, waiting, found = set(), [start], set()
    while waiting:
        node = waiting.pop()
        found |= optional_imports(node)
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        for name in (names & defined.keys()) - seen:
            seen.add(name)
            waiting += defined[name]
    return found


def function(path: str, name: str) -> ast.AST:
    return dict(functions([ROOT / path]))[name]


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_optional_package_is_imported_in_a_function_that_asks_for_it(path):
    outside = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.FunctionDef)]
    assert not set().union(*map(optional_imports, outside))
    for name, node in functions([path]):
        if path.parent != ROOT / "examples":
            assert optional_imports(node) <= required(node), name


@pytest.mark.parametrize(
    ("path", "name", "packages"),
    [
        (
            "diffusers_pqcad/publishing/compress.py",
            "compress",
            {"matplotlib", "peft", "scipy", "torchmetrics", "trackio"},
        ),
        ("examples/train_classifier.py", "main", {"torchmetrics"}),
        ("examples/train_text_to_image.py", "train", {"torchmetrics"}),
        ("diffusers_pqcad/evaluation/report.py", "evaluate", {"scipy", "torchmetrics"}),
    ],
)
def test_long_work_starts_by_asking_for_all_that_it_imports_later(path, name, packages):
    assert required(function(path, name)) == packages
    assert reachable_imports(function(path, name)) == packages


def test_the_packages_of_each_peer_are_those_that_it_imports(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import contestants

    named, imported = {}, {}
    recipes = dict(functions([ROOT / "examples" / "benchmarks" / "openvino_recipes.py"]))

    def imports_of(builder: Any, node: ast.AST) -> set[str]:
        calls = {ast.unparse(each).partition("openvino_recipes.")[2] for each in ast.walk(node)}
        calls |= {getattr(value, "__name__", "") for value in getattr(builder, "keywords", {}).values()}
        return optional_imports(node).union(*(optional_imports(recipes[name]) for name in calls & recipes.keys()))

    for name, builder in contestants.CONTESTANTS.items():
        function_name = getattr(builder, "func", builder).__name__
        patterns = [pattern for pattern in contestants.PACKAGES if fnmatchcase(name, pattern)]
        packages = {each.partition(".")[0] for pattern in patterns for each in contestants.PACKAGES[pattern]}
        named[function_name] = named.get(function_name, set()) | packages
        nodes = dict(functions([ROOT / "examples" / "benchmarks" / "contestants.py"]))
        found = imports_of(builder, nodes[function_name]) if function_name in nodes else set()
        imported[function_name] = imported.get(function_name, set()) | found
    imported["onnxruntime_int8"] |= {"onnx", "onnxscript"}  # by torch.onnx.export
    assert named == imported
    assert set().union(*named.values()) == {
        "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "optimum", "sdnq", "torchao",
    }  # fmt: skip


def test_peers_that_are_not_installed_are_skipped_at_the_start(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import harness

    hide(monkeypatch, "openvino", "nncf")
    skipped = harness.without_packages(["W8A8", "OpenVINO fp32", "OpenVINO + NNCF int8"])
    assert skipped == {
        "OpenVINO fp32": "not installed: openvino",
        "OpenVINO + NNCF int8": "not installed: openvino, nncf",
    }
    assert capsys.readouterr().out.count('pip install -e ".[bench]"') == 2

    def build(*arguments: object) -> None:
        raise ValueError("the model was built")

    monkeypatch.setattr(harness.models, "build", build)
    with pytest.raises(ValueError, match="the model was built"):
        harness.prepare(harness.FieldSettings(contestants=["OpenVINO fp32"]), batch_size=1)
    assert capsys.readouterr().out.startswith("skipped: OpenVINO fp32: not installed: openvino")


@pytest.mark.parametrize(
    ("extras", "scripts"),
    [(("eval", "lora", "track"), LIBRARY), (("experiments", "demo", "track"), LIBRARY + SCRIPTS)],
    ids=["library", "all"],
)
def test_an_extra_holds_what_is_imported(extras, scripts):
    names = set().union(*(optional_imports(ast.parse(path.read_text())) for path in scripts))
    assert names
    held = set().union(*map(requirements, extras))
    assert names <= {module for module, found in MODULES.items() if found & held}


# What a user sees


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("matplotlib", lambda: plot_samples("x.png", {"a": torch.zeros(1, 1, 2, 2, dtype=torch.uint8)})),
        ("matplotlib", lambda: plot_bits("x.png", [{"bits": {"a": 8}, "average_bits": 8}])),
        ("matplotlib", lambda: plot_curves("x.png", {})),
        ("torchmetrics", lambda: kernel_distance(torch.zeros(4, 2), torch.zeros(4, 2), subset_size=2)),
        ("torchmetrics", lambda: structural_similarity(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))),
        ("scipy", lambda: bootstrap_interval(torch.ones(4), 1.0)),
    ],
)
def test_pictures_and_measures_name_the_extra(module, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hide(monkeypatch, module)
    with pytest.raises(MissingExtraError, match=rf"{module}: .*diffusers-pqcad\[eval\]"):
        call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "extractor"), [("scipy", None), ("torchmetrics", object())])
def test_an_evaluation_asks_before_the_first_sample(module, extractor, monkeypatch):
    hide(monkeypatch, module)
    with pytest.raises(MissingExtraError, match=rf"{module}: "):  # not even the pipelines are looked at
        evaluate(None, None, num_images=2, num_inference_steps=2, seed=0, extractor=extractor)


def test_an_evaluation_of_pictures_asks_before_the_first_step(monkeypatch):
    pipeline = PIPELINES["sd"].build()
    monkeypatch.setattr(pipeline.unet, "forward", lambda *_, **__: pytest.fail("it ran"))
    hide(monkeypatch, "torchmetrics")
    with pytest.raises(MissingExtraError, match="torchmetrics: "):
        evaluate(pipeline, pipeline, ["red cat"], num_images=2, num_inference_steps=2, seed=0)


@pytest.mark.parametrize("module", ["matplotlib", "scipy", "torchmetrics"])
def test_the_main_script_asks_before_it_loads_or_writes(module, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import distill

    monkeypatch.setattr(compress, "load_teacher", lambda path: pytest.fail("the teacher was loaded"))
    hide(monkeypatch, module)
    with pytest.raises(MissingExtraError, match=rf"{module}: .*diffusers-pqcad\[train\]"):
        distill.main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_classifier_asks_before_it_trains(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_classifier

    hide(monkeypatch, "torchmetrics")
    with pytest.raises(MissingExtraError, match=r"torchmetrics: "):
        train_classifier.main(train_classifier.Settings(output_dir=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []
