"""From a command line to the values of a command's flags: defaults, then `--preset`, then `--config`, then flags."""

from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    RawDescriptionHelpFormatter,
)
from collections.abc import Sequence
from textwrap import fill
from typing import Any, NoReturn

from transformers import HfArgumentParser

from diffusers_pqcad.cli.command import OUTPUT, Command, WrongUse
from diffusers_pqcad.cli.help import COMMANDS, PROGRAM
from diffusers_pqcad.publishing.settings import Part, flag_types, flags_of, read_yaml

TRUTHS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # what HfArgumentParser takes for one
VALUES: dict[Any, str] = {int: "N", float: "X"}  # what stands for the value of a flag in the help
WIDTH = 100  # columns of a help text


class HelpFormat(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Help with one spelling of each flag, the short one before it, and defaults where there are some."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=WIDTH, max_help_position=28)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        short = [name for name in action.option_strings if not name.startswith("--")]
        names = ", ".join([*short, next(name for name in action.option_strings if name.startswith("--"))])
        is_switch = action.nargs in (0, "?")
        return names if is_switch else f"{names} {self._format_args(action, VALUES.get(action.type, 'TEXT'))}"

    def _get_help_string(self, action: Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


class FlagParser(HfArgumentParser):
    """A parser that raises WrongUse where argparse ends the process."""

    def error(self, message: str) -> NoReturn:
        """Raise WrongUse."""
        raise WrongUse(message)


def parts_of(command: Command) -> tuple[Part, ...]:
    """Return the dataclasses of all flags of a command."""
    return (*command.parts, OUTPUT)


def first_parser(command: Command) -> ArgumentParser:
    """Return the parser of the flags that other flags' defaults depend on."""
    parser = FlagParser(add_help=False, allow_abbrev=False, formatter_class=HelpFormat)
    parser.add_argument(
        "--config", default=SUPPRESS, help="YAML file of settings, by the flags' names; flags override it"
    )
    if command.presets:
        parser.add_argument(
            "--preset", choices=tuple(command.presets), default="default", help="set of defaults, before the file's"
        )
    return parser


def parser_of(command: Command) -> ArgumentParser:
    """Return the whole parser of a command."""
    parser = FlagParser(
        [flags_of(part) for part in parts_of(command)],
        prog=f"{PROGRAM} {command.name}",
        usage=f"{PROGRAM} {' '.join([command.name, *command.operands.values()])} [flags]",
        description=fill(command.description, WIDTH),
        epilog=f"example:\n  {command.example}",
        parents=[first_parser(command)],
        formatter_class=HelpFormat,
        allow_abbrev=False,
    )
    flags = {action.dest: action for action in parser._actions}
    for name, word in command.operands.items():
        parser.add_argument(word, nargs="?", default=SUPPRESS, help=flags[name].help)
        flags[name].help = f"{word}, by its name in a recipe"
    return parser


def parse(command: Command, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the value of every flag of a command; raises WrongUse for what cannot be parsed, or is missing."""
    first, _ = first_parser(command).parse_known_args(arguments)
    try:
        given = read_yaml(first.config, parts_of(command)) if hasattr(first, "config") else {}
    except ValueError as error:
        raise WrongUse(str(error)) from None
    parser = parser_of(command)
    parser.set_defaults(**{**command.presets.get(getattr(first, "preset", ""), {}), **given})
    found = vars(parser.parse_intermixed_args(spelled_out(arguments, flag_types(parts_of(command)))))
    values = {name: found[name] for name in flag_types(parts_of(command))}
    for name, word in command.operands.items():
        if word in found and values[name] not in (None, found[word]) and name not in given:
            raise WrongUse(f"{word} is {found[word]!r}, and --{name} {values[name]!r}; give one of them.")
        values[name] = found.get(word, values[name])
        if values[name] is None:
            raise WrongUse(f"expected {word}, got nothing in its place.")
    return values


def spelled_out(arguments: Sequence[str], types: dict[str, Any]) -> list[str]:
    """Return `arguments` with "=True" after each switch that has no value: it would take the word after it for one."""
    switches = {f"--{name}" for name, kind in types.items() if kind is bool}
    switches |= {name.replace("_", "-") for name in switches}
    after = [*arguments, ""][1:]
    return [
        f"{word}=True" if word in switches and following.lower() not in TRUTHS else word
        for word, following in zip(arguments, after, strict=True)
    ]


def program_help(summaries: dict[str, str]) -> str:
    """Return the help of `pqcad` itself, of the commands' summaries."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name.ljust(width)}  {summaries[name]}" for name in COMMANDS)
    return (
        f"usage: {PROGRAM} COMMAND [flags]\n\nMake diffusion pipelines smaller and faster on CPUs, and see by how "
        f"much.\n\ncommands:\n{lines}\n\nEach takes --config FILE.yaml, --json and --help. Exit codes: 0, it "
        "worked; 1, it failed, with\nthe reason on stderr; 2, wrong use; 130, stopped by Ctrl-C; 143, by SIGTERM."
        "\n\nexample:\n"
        f"  {PROGRAM} quantize my/pipeline --weight_bits 4 -o outputs/small\n"
    )
