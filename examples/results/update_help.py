"""Write the help texts of the command line from its parsers: `python examples/results/update_help.py`."""

from importlib import import_module

from diffusers_pqcad.cli.flags import parser_of, program_help
from diffusers_pqcad.cli.help import COMMANDS, PROGRAM, TEXTS


def texts() -> dict[str, str]:
    """Return the help of each command, and of the program, by the name of its file."""
    commands = {name: import_module(f"diffusers_pqcad.cli.{name}").COMMAND for name in COMMANDS}
    summaries = {name: command.summary for name, command in commands.items()}
    found = {name: parser_of(command).format_help() for name, command in commands.items()}
    return {PROGRAM: program_help(summaries)} | found


if __name__ == "__main__":
    for name, text in texts().items():
        (TEXTS / f"{name}.txt").write_text(text, encoding="utf-8")
