"""Specification of `pqcad` itself: help at once, flags over a recipe, exit codes, and who reads which stream."""

import configparser
import importlib
import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, answer

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.cli.command import Outcome
from diffusers_pqcad.cli.flags import parse, spelled_out
from diffusers_pqcad.cli.help import COMMANDS, help_for, is_asked_for, text_of
from diffusers_pqcad.cli.main import main
from diffusers_pqcad.cli.quantize import COMMAND as QUANTIZE
from diffusers_pqcad.cli.quantize import settings_of
from diffusers_pqcad.compression.stopping import stop_now

MAX_HELP_SECONDS = 2.0


def module_of(name: str) -> Any:
    return importlib.import_module(f"diffusers_pqcad.cli.{name}")


def run_child(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, run: Any) -> None:
    """Let the command `name` do `run`."""
    monkeypatch.setattr(module_of(name), "COMMAND", module_of(name).COMMAND._replace(run=run))


# Help


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "results"))
        import update_help
    return update_help.texts()


@pytest.mark.parametrize("name", ["pqcad", *COMMANDS])
def test_help_is_what_the_parsers_say(name, texts):
    if sys.version_info[:2] == (3, 11):  # argparse words its help otherwise from version to version
        assert texts[name] == text_of(name), "run examples/results/update_help.py"
    assert f"example:\n  pqcad {'' if name == 'pqcad' else name}" in text_of(name)
    assert max(map(len, text_of(name).splitlines())) <= 110


@pytest.mark.parametrize("name", ["pqcad", *COMMANDS])
def test_help_answers_in_two_seconds_of_a_cpu(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [] if name == "pqcad" else [name]
    result = run_child("-m", "diffusers_pqcad.cli", *words, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (result.returncode, result.stdout, result.stderr) == (0, text_of(name), "")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MAX_HELP_SECONDS


def test_help_in_a_running_process_is_the_same(capsys):
    assert answer(capsys, "--help") == (0, text_of("pqcad"), "")
    assert answer(capsys, "push", "folder", "-h") == (0, text_of("push"), "")


@pytest.mark.parametrize(
    ("process", "is_asked"),
    [
        (["python", "/usr/bin/pqcad", "--help"], True),
        (["python", "-X", "dev", "-m", "diffusers_pqcad.cli", "push", "-h"], True),
        (["python", r"C:\Scripts\pqcad.exe".replace("\\", "/"), "env", "--help"], True),
        (["python", "/usr/bin/pqcad", "env"], False),
        (["python", "/usr/bin/pqcad", "nonsense", "--help"], False),
        (["python", "train.py", "--help"], False),
        (["python", "-m", "pytest", "--help"], False),
        (["python", "-c", "import diffusers_pqcad"], False),
        (["python"], False),
    ],
)
def test_the_package_knows_a_process_that_only_asks_for_help(process, is_asked):
    """Only then does it import nothing, and registers nothing with diffusers."""
    assert is_asked_for(process) is is_asked


def test_no_arguments_are_wrong_use_and_get_the_help(capsys):
    assert answer(capsys) == (2, "", text_of("pqcad"))
    assert help_for([]) is None


# The entry point


def test_the_entry_point_is_main_and_texts_are_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].split() == ["pqcad", "=", "diffusers_pqcad.cli.main:main"]
    assert {"cli/texts/*.txt", "publishing/comparison.html"} <= set(
        setup["options.package_data"]["diffusers_pqcad"].split()
    )


def test_the_script_that_pip_writes_ends_with_the_exit_code(tmp_path):
    script = tmp_path / "pqcad"
    script.write_text("import sys\nfrom diffusers_pqcad.cli.main import main\nsys.exit(main())\n")
    assert run_child(str(script), "env", "--help").stdout == text_of("env")
    result = run_child(str(script), "nonsense")
    assert (result.returncode, result.stdout) == (2, "")
    assert "there is no command 'nonsense'; expected one of quantize, calibrate" in result.stderr


# Flags


def test_flags_are_above_the_recipe_which_is_above_the_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("weight_bits: 3\ngroup_size: 16\noutput_dir: there\npretrained_model_name_or_path: one\n")
    found = settings_of(parse(QUANTIZE, ["--config", str(recipe), "two", "--weight_bits", "6"]))
    assert found.quantization == PQCADConfig(weight_bits=6, group_size=16)
    assert (found.run.pretrained_model_name_or_path, found.run.output_dir) == ("two", "there")
    assert settings_of(parse(QUANTIZE, ["m", "-o", "x"])).quantization == PQCADConfig()


def test_a_model_may_come_before_or_after_switches():
    for line in ("--dry_run m -o x", "m -o x --dry-run", "m --dry_run True -o x", "-o x --dry_run m"):
        values = parse(QUANTIZE, line.split())
        assert (values["pretrained_model_name_or_path"], values["dry_run"]) == ("m", True), line
    assert spelled_out(["--json", "no", "--json", "m"], {"json": bool}) == ["--json", "no", "--json=True", "m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize"], "expected MODEL, got nothing in its place."),
        (["quantize", "m"], "output_dir: where shall the pipeline go? Give -o FOLDER."),
        (["quantize", "m", "-o", "x", "--weight_bit", "4"], "unrecognized arguments: --weight_bit 4."),
        (["quantize", "m", "-o", "x", "--weight_bits", "four"], "invalid float value: 'four'."),
        (["quantize", "m", "-o", "x", "--weight_bits", "9"], "an average of 9.0 cannot be met"),
        (["quantize", "m", "-o", "x", "--torch_dtype", "int8"], "invalid choice"),
        (["quantize", "m", "-o", "x", "--config", "nowhere.yaml"], "there is no file 'nowhere.yaml'."),
        (["quantize", "m", "--pretrained_model_name_or_path", "n", "-o", "x"], "MODEL is 'm'"),
        (["compress", "m", "--preset", "huge"], "invalid choice: 'huge'"),
        (["compress", "m", "--num_inference_steps", "5"], "is odd"),
        (["calibrate", "m", "--num_trajectories", "1"], "num_trajectories: expected at least 4, got 1."),
        (["evaluate", "m"], "reference: compared with what?"),
        (["evaluate", "m", "--reference", "r", "--steps", "0"], "steps: expected at least 1, got 0."),
        (["compare", "a"], "expected B, got nothing in its place."),
        (["compare", "a", "b", "-o", "report.pdf"], "output: expected a file that ends in .html"),
        (["compare", "a", "b", "--b_steps", "0"], "b_steps: expected at least 1, got 0."),
        (["push", "folder", "name"], "hub_model_id: expected user/name, got 'name'."),
        (["inspect", "m", "--bit_choices", "5"], "bit_choices: expected some of"),
        (["env", "more"], "unrecognized arguments: more."),
    ],
)
def test_wrong_use_ends_with_2_and_one_line_that_leads_to_the_help(capsys, arguments, message):
    code, out, err = answer(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.endswith(f"See pqcad {arguments[0]} --help.\n")
    assert err.count("\n") == 1


def test_an_unknown_setting_of_a_recipe_is_named(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("weight_bit: 3\n")
    found = answer(capsys, "quantize", "m", "-o", "x", "--config", tmp_path / "recipe.yaml")
    assert found.code == 2
    assert "recipe.yaml: unknown settings ['weight_bit']." in found.err


# Streams and exit codes


def test_results_are_on_stdout_and_everything_else_on_stderr(capsys, monkeypatch):
    def run(settings: Any) -> Outcome:
        print("a heading of the library")
        return Outcome({"answer": 42}, "forty-two")

    replaced(monkeypatch, "env", run)
    assert answer(capsys, "env") == (0, "forty-two\n", "a heading of the library\n")
    found = answer(capsys, "env", "--json")
    assert (found.document, found.err) == ({"answer": 42}, "a heading of the library\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("field: expected\n  this, got that"), "pqcad env: field: expected this, got that."),
        (OSError("no space left"), "pqcad env: no space left."),
        (KeyError("x"), "pqcad env: KeyError: 'x'. With --traceback it says where."),
        (RuntimeError(""), "pqcad env: RuntimeError. With --traceback it says where."),
    ],
)
def test_a_failure_ends_with_1_and_its_reason_on_one_line(capsys, monkeypatch, error, line):
    def run(settings: Any) -> Outcome:
        raise error

    replaced(monkeypatch, "env", run)
    assert answer(capsys, "env", "--json") == (1, "", f"{line}\n")
    found = answer(capsys, "env", "--traceback")
    assert (found.code, found.reason) == (1, line)
    assert "Traceback (most recent call last)" in found.err


@pytest.mark.parametrize("rank", ["RANK", "PMI_RANK"])
def test_of_several_processes_the_first_one_works_and_speaks(capsys, monkeypatch, rank):
    ran = []
    monkeypatch.setenv(rank, "1")
    replaced(monkeypatch, "env", lambda settings: ran.append("env") or Outcome({}, "text"))
    assert answer(capsys, "env") == (0, "", "")
    assert answer(capsys, "env", "more") == (2, "", "")
    replaced(monkeypatch, "compress", lambda settings: ran.append("compress") or Outcome({}, "text"))
    assert answer(capsys, "compress", "m") == (0, "", "")
    assert ran == ["compress"]  # which shares its work
    monkeypatch.setenv(rank, "0")
    assert answer(capsys, "env") == (0, "text\n", "")
    assert answer(capsys, "compress", "m") == (0, "text\n", "")


def failed_in(process: int) -> ValueError:
    """The error of a process, as `together` raises it in all of them."""
    error = ValueError("no")
    vars(error)["failed_process"] = process
    return error


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (ValueError("no"), False),  # the first one tells
        (RuntimeError("no"), True),  # no other may know
        (failed_in(0), True),  # this process is none of a group here, and so its 0
        (failed_in(1), False),
    ],
)
def test_a_failure_is_told_once(capsys, monkeypatch, error, is_told):
    def run(settings: Any) -> Outcome:
        raise error

    monkeypatch.setenv("RANK", "1")
    replaced(monkeypatch, "compress", run)
    found = answer(capsys, "compress", "m", "--traceback")
    assert (found.code, bool(found.err)) == (1, is_told)


def test_ctrl_c_ends_with_130_and_says_what_is_kept_and_how_to_go_on(capsys, monkeypatch):
    def run(settings: Any) -> Outcome:
        raise KeyboardInterrupt

    replaced(monkeypatch, "compress", run)
    found = answer(capsys, "compress", "my model", "-o", "out")
    assert (found.code, found.out) == (130, "")
    assert found.reason == (
        "pqcad compress: stopped. What is finished is kept in out. To go on: pqcad compress 'my model' -o out"
    )
    replaced(monkeypatch, "compress", lambda settings: stop_now(signal.SIGTERM))
    assert answer(capsys, "compress", "my model", "-o", "out") == (143, "", found.err)
    replaced(monkeypatch, "env", run)
    assert answer(capsys, "env").reason == "pqcad env: stopped. Nothing was written. To start over: pqcad env"


def test_ctrl_c_while_a_command_is_still_being_imported(capsys, monkeypatch):
    def stop(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["diffusers_pqcad.cli.main"], "import_module", stop)
    assert answer(capsys, "env") == (130, "", "pqcad env: stopped. Nothing was written.\n")


def test_a_reader_that_has_seen_enough_is_no_failure(monkeypatch, tmp_path, capsys):
    """As `| head` is."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return file.fileno()

    replaced(monkeypatch, "env", lambda settings: Outcome({}, "text"))
    with (tmp_path / "pipe").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["env"]) == 0
        monkeypatch.undo()
        os.write(file.fileno(), b"nobody reads this")
    assert (tmp_path / "pipe").read_bytes() == b""
    assert capsys.readouterr().err == ""


def test_no_arguments_of_main_are_those_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pqcad", "nonsense"])
    assert main() == 2
    assert Path(sys.argv[0]).name in capsys.readouterr().err
