"""Help from texts, in a blink: to build a parser takes the dataclasses of its flags, and these take torch.

The texts are written by `examples/results/update_help.py` from the parsers, and a test compares. Only the standard
library is imported here, as the package itself asks before it imports more.
"""

from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("quantize", "calibrate", "compress", "evaluate", "compare", "inspect", "push", "env")
FLAGS = ("-h", "--help")
PROGRAM, MODULE = "pqcad", "diffusers_pqcad.cli"
TEXTS = Path(__file__).parent / "texts"


def help_for(arguments: Sequence[str]) -> str | None:
    """Return the help that the `arguments` of `pqcad` ask for: that of a command, or of the program; None for none."""
    if not any(flag in arguments for flag in FLAGS):
        return None
    if arguments[0] in FLAGS:
        return text_of(PROGRAM)
    return text_of(arguments[0]) if arguments[0] in COMMANDS else None


def text_of(name: str) -> str:
    """Return the help of a command, or of the program."""
    return (TEXTS / f"{name}.txt").read_text(encoding="utf-8")


def is_asked_for(process: Sequence[str]) -> bool:
    """Return whether a process, `sys.orig_argv`, is `pqcad` or `python -m diffusers_pqcad.cli`, asked for help."""
    arguments = arguments_of(process)
    return arguments is not None and help_for(arguments) is not None


def arguments_of(process: Sequence[str]) -> list[str] | None:
    """Return the arguments of `pqcad` in those of the whole `process`; None for another program."""
    for index, word in enumerate(process[1:], start=1):
        if word == MODULE and process[index - 1] == "-m":
            return list(process[index + 1 :])
        is_value = process[index - 1] in ("-X", "-W")
        if not word.startswith("-") and not is_value:  # the script, after what is Python's own
            return list(process[index + 1 :]) if Path(word).stem == PROGRAM else None
    return None
