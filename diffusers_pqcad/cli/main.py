"""`pqcad`: find the command, run it, and end with its exit code."""

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from json import dumps
from typing import TYPE_CHECKING, Any

from diffusers_pqcad.cli.help import COMMANDS, PROGRAM, help_for, text_of

if TYPE_CHECKING:
    from diffusers_pqcad.cli.command import Command

WORKED, FAILED, WRONG_USE, STOPPED = 0, 1, 2, 130
# Where launchers put the number of a process, as Accelerate reads them.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Their messages say all there is to say; others need the name of their class.
EXPECTED = (ValueError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of a command line: 0; 1, a failure; 2, wrong use; 130 after Ctrl-C, 143 after SIGTERM.

    Of several processes, the first one speaks for all; another one, of a failure that only it knows of.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    text = help_for(arguments)
    if text is not None:
        print(text, end="")
        return WORKED
    if not arguments:
        print(text_of(PROGRAM), end="", file=sys.stderr)
        return WRONG_USE
    name, *flags = arguments
    if name not in COMMANDS:
        say(f"{PROGRAM}: there is no command {name!r}; expected one of {', '.join(COMMANDS)}.")
        return WRONG_USE
    try:
        return run(import_module(f"diffusers_pqcad.cli.{name}").COMMAND, flags)
    except KeyboardInterrupt:  # before there was anything to keep
        say(f"{PROGRAM} {name}: stopped. Nothing was written.")
        return STOPPED


def run(command: "Command", flags: Sequence[str]) -> int:
    """Return the exit code of a `command`; what it finds is on stdout, everything else on stderr."""
    from diffusers_pqcad.cli.flags import parse

    title = f"{PROGRAM} {command.name}"
    try:
        values = parse(command, flags)
        settings = command.settings(values)
    except ValueError as error:
        if is_first():
            say(f"{title}: {one_line(error)} See {title} --help.")
        return WRONG_USE
    if not (is_first() or command.shares_work):
        return WORKED
    try:
        with redirect_stdout(sys.stderr):
            outcome = command.run(settings)
    except KeyboardInterrupt as stopped:
        again = shlex.join([PROGRAM, command.name, *flags])
        if is_first():
            say(f"\n{title}: stopped. {command.kept(settings)} {again}")
        return getattr(stopped, "exit_code", STOPPED)  # that of SIGTERM, where the command knows
    except Exception as error:
        if is_told_here(error):
            if values["traceback"]:
                traceback.print_exc()
            say(f"{title}: {reason(error)}")
        return FAILED
    if is_first():
        show(dumps(outcome.document, indent=1, allow_nan=False) if values["json"] else outcome.text)
    return WORKED


def is_first() -> bool:
    """Return whether this is the only process, or the first of those that a launcher has started."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def is_told_here(error: Exception) -> bool:
    """Return whether this process is to tell of `error`: of what each of several runs into, the first one does."""
    from diffusers_pqcad.compression.processes import failed_elsewhere

    if hasattr(error, "failed_process"):
        return not failed_elsewhere(error)
    return is_first() or not isinstance(error, EXPECTED)


def show(text: str) -> None:
    """Print to stdout; a reader that has seen enough (`| head`) is no failure."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would say so as it ends


def say(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: Any) -> str:
    """Return what an error says, on one line that ends as a sentence does."""
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def reason(error: Exception) -> str:
    """Return why a command failed, on one line."""
    if isinstance(error, EXPECTED) and str(error).strip():
        return one_line(error)
    text = f"{type(error).__name__}: {error}" if str(error).strip() else type(error).__name__
    return f"{one_line(text)} With --traceback it says where."
