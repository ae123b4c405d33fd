"""A new user with the README alone: from a clone to a published model, its report and its demo, command by command."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from stub_hub import StubHub

ROOT = Path(__file__).parents[1]
# What makes the commands short enough for a test, and the name of the stub's only user.
SHORTER = {
    "examples/distill.py": ["--preset", "smoke"],
    "compare": ["--num_images", "2"],
    "examples/demo.py": ["--num_threads", "1"],
}


def commands_of_readme() -> list[list[str]]:
    """The command lines of the README's section on compressing, as words."""
    section = (ROOT / "README.md").read_text().partition("## Compress yours\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def served_page(command: list[str], **options: object) -> str:
    """The page that a demo serves; it is ended then."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **options)  # type: ignore[call-overload]
    try:
        said = next((line for line in process.stdout if line.startswith("Open ")), "")
        with urlopen(said.split()[1]) as answer:  # noqa: S310 (on this computer)
            return str(answer.read().decode())
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # most of it PQ, of six rounds
def test_the_readmes_commands_lead_to_a_published_model_its_report_and_its_demo(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs, done = Path(sys.executable).parent, []
    with StubHub() as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",  # the demo's address is waited for
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        options: dict = {"cwd": tmp_path, "env": others | settings}
        for words in commands_of_readme():
            what = next((word for word in words if word in SHORTER), " ".join(words[:2]))
            command = [str(programs / words[0]), *words[1:], *SHORTER.get(what, [])]
            command = [word.replace("you/", "me/") for word in command]
            done.append(what)
            if what == "hf auth":
                continue  # it asks; HF_TOKEN answers
            if what == "examples/demo.py":
                assert "gradio" in served_page(command, **options)
                continue
            result = subprocess.run(command, capture_output=True, text=True, **options)
            assert result.returncode == 0, (command, result.stderr[-3000:])
        assert done == ["examples/distill.py", "compare", "examples/demo.py", "hf auth", "pqcad push"]
        assert {"README.md", "model_index.json", "unet/config.json"} <= set(hub.files("me/name"))
        assert hub.unexpected == []
    assert "<html" in (tmp_path / "report.html").read_text()[:200]
