"""The guides: their snippets run, their commands exist, every link leads somewhere, every error is listed."""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml

from diffusers_pqcad.compression.reconstruction import ReconstructionConfig
from diffusers_pqcad.loading.coverage import average_bits

ROOT = Path(__file__).parents[1]
GUIDES = {path.stem: path.read_text() for path in sorted((ROOT / "examples" / "guides").glob("*.md"))}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The settings of the text, and those of its test.
SMALL = {
    "num_trajectories=128": "num_trajectories=4",
    "num_inference_steps=20": "num_inference_steps=4",
    "num_inference_steps=10": "num_inference_steps=2",
    "num_images=100": "num_images=4, num_latency_rounds=1",
    "ProgressiveConfig())": "ProgressiveConfig(rounds_per_stage=1, price_batch_size=2, price_share=0.2, "
    "reconstruction=ReconstructionConfig(iterations=0)))",
    "DistillConfig())": "DistillConfig(max_train_steps=2, train_batch_size=4, evaluation_steps=1))",
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language in a page; one that says why it is skipped is none of them."""
    return [code for name, code in FENCE.findall(text) if name == language]


@pytest.mark.parametrize("guide", [name for name, text in GUIDES.items() if blocks(text, "python")])
def test_the_snippets_of_a_guide_run_one_after_another(guide, monkeypatch, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {"ReconstructionConfig": ReconstructionConfig}
    for index, code in enumerate(blocks(GUIDES[guide], "python")):
        for setting, small in SMALL.items():
            code = code.replace(setting, small)
        exec(compile(code, f"{guide}.md, snippet {index + 1}", "exec"), names)
    if guide == "compress":
        student = names["DiffusionPipeline"].from_pretrained("student")
        assert average_bits(names["packed"])[0] <= 4
        assert student.unet.config.quantization_config.num_inference_steps == 2


def test_a_block_has_a_language_that_a_test_knows_or_says_why_it_is_skipped():
    kinds = {kind for text in GUIDES.values() for kind, _ in FENCE.findall(text)}
    assert all(kind in ("", "python") or " skip: " in kind for kind in kinds), kinds


# Commands


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each command line of the guides and the README, as words, with the page's name."""
    for guide, text in (GUIDES | {"README": (ROOT / "README.md").read_text()}).items():
        for block in blocks(text, ""):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                script = next((at for at, word in enumerate(words) if re.fullmatch(r"examples/.*\.py", word)), None)
                if script is not None:
                    words = ["python", *words[script:]]  # whatever starts it
                if words and words[0] in ("pqcad", "python"):
                    yield guide, words


@pytest.mark.parametrize(
    ("guide", "words"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_takes_its_flags(guide, words, monkeypatch, tmp_path):
    """As far as settings: what is not there, the reader's own, is seen when it is opened."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    if words[0] == "pqcad":
        from importlib import import_module

        from diffusers_pqcad.cli.flags import parse

        command = import_module(f"diffusers_pqcad.cli.{words[1]}").COMMAND
        command.settings(parse(command, words[2:]))
    elif words[1] == "examples/distill.py":
        import distill

        monkeypatch.chdir(ROOT)
        distill.job_of_command(words[2:])
    elif words[1] == "examples/demo.py":
        import demo
        from transformers import HfArgumentParser

        HfArgumentParser(demo.Settings).parse_args_into_dataclasses(words[2:])
    elif words[1].split("/")[1] in ("benchmarks", "experiments", "results"):
        assert (ROOT / words[1]).is_file()
        script = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in script for word in words[2:]), words  # a flag, or a choice of one
    else:
        pytest.fail(f"{guide}: no test knows {words}")


def test_the_flags_of_the_settings_guide_are_those_of_compress():
    help_text = (ROOT / "diffusers_pqcad" / "cli" / "texts" / "compress.txt").read_text()
    named = set(re.findall(r"`[^`]*?(--\w+)", GUIDES["settings"]))
    assert named - {"--reference", "--num_images", "--help", "--dry_run"} <= set(re.findall(r"--\w+", help_text))


# Links

PAGES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()
    if not name.startswith("tests/data/") and name != "diffusers_pqcad/publishing/model_card.md"
]  # fmt: skip


def links(text: str) -> list[str]:
    """Where the links and pictures of a page lead; code is none."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(path: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title).lower()).strip().replace(" ", "-")
        for title in titles
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in links(page.read_text()):
        parts = urlparse(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            assert "." in parts.netloc, link
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), link
        if parts.fragment:
            assert parts.fragment in anchors(target), f"{link}: no such heading; there are {sorted(anchors(target))}"


def test_every_guide_is_in_the_list_of_guides():
    listed = {Path(link).stem for link in links(GUIDES["README"]) if link.endswith(".md") and "/" not in link}
    assert listed == set(GUIDES) - {"README"}


# Errors


@pytest.fixture
def update_errors(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "results"))
    import update_errors

    return update_errors


def test_every_error_of_the_source_is_listed_with_what_to_do(update_errors):
    assert update_errors.page() == update_errors.GUIDE.read_text(), "run examples/results/update_errors.py"
    found = update_errors.all_messages()
    assert len(found) > 250
    for message in found:
        _, fix = update_errors.parted(message.text)
        assert fix, f"{message}: it does not say what to do, and FIXES has no line for it"
        assert fix != f"give {update_errors.VALUE}", f"{message}: FIXES has no line for it"
    unused = [begin for begin in update_errors.FIXES if not any(m.text.startswith(begin) for m in found)]
    assert unused == []


def test_no_error_escapes_the_list(update_errors):
    """What an error says is a text in the source, but for what another error or argparse said."""
    passed_on = {
        ast.unparse(node)
        for room in update_errors.ROOMS
        for path in (update_errors.PACKAGE / room).rglob("*.py")
        for node in update_errors.raised_in(path)
        if not update_errors.texts_of(node)
    }
    assert passed_on == set()


def test_what_troubleshooting_quotes_is_said_somewhere(update_errors):
    said = " ".join(
        text
        for path in update_errors.PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant | ast.JoinedStr) and (text := update_errors.text_of(node))
    ).casefold()
    headings = re.findall(r"^## (.*\".*)$", GUIDES["troubleshooting"], re.MULTILINE)
    quotes = [quote for heading in headings for quote in re.findall(r'"([^"]+)"', heading)]
    assert len(quotes) >= 8
    for part in (part.strip() for quote in quotes for part in quote.split("...")):
        assert part.casefold().replace("on cuda", "on") in said, part


def test_the_forms_of_issues_ask_for_what_a_report_needs():
    forms = {
        path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    }
    assert forms.pop("config") == {"blank_issues_enabled": False}
    assert set(forms) == {"bug", "idea", "model"}
    for form in forms.values():
        assert {"name", "description", "body"} <= set(form)
        fields = [item for item in form["body"] if item["type"] != "markdown"]
        assert len({item["id"] for item in fields}) == len(fields)
        assert all(item["attributes"]["label"] for item in fields)
    assert any("pqcad env" in item["attributes"].get("label", "") for item in forms["bug"]["body"])


def test_the_map_of_the_rooms_has_all_of_them_in_their_order():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text().split("## The rooms")[1], re.MULTILINE)
    layers = (ROOT / "setup.cfg").read_text().split("layers =\n")[1].split("\n\n")[0].split()
    assert rows[: len(layers)] == layers
