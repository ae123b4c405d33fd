"""What a command is: its flags, what it says of itself, what it does, and what it leaves when it is stopped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffusers_pqcad.publishing.settings import Part


class WrongUse(ValueError):
    """A command line, or a recipe, that cannot be meant."""


class Outcome(NamedTuple):
    """What a command found: JSON values for `--json`, a text for readers."""

    document: dict[str, Any]
    text: str


class Command(NamedTuple):
    """A command of `pqcad`.

    `parts` are the dataclasses of its flags; `operands` flags that are also given by their place, with the word that
    stands for them in the help. `settings` makes of the flags' values what `run` takes, or raises ValueError. `kept`
    says what a run that was stopped left, as a sentence that ends before the command to go on with. `presets` are sets
    of defaults. Of several processes (`accelerate launch`), the first one alone works, unless the command
    `shares_work`; it alone prints in any case.
    """

    name: str
    summary: str
    description: str
    example: str
    parts: tuple[Part, ...]
    settings: Callable[[dict[str, Any]], Any]
    run: Callable[[Any], Outcome]
    operands: Mapping[str, str] = {}
    kept: Callable[[Any], str] = lambda settings: "Nothing was written. To start over:"
    presets: Mapping[str, Mapping[str, Any]] = {}
    shares_work: bool = False


@dataclass(frozen=True)
class Output:
    """What every command takes."""

    json: bool = field(
        default=False, metadata={"help": "put one JSON document on stdout; messages are on stderr in any case"}
    )
    traceback: bool = field(default=False, metadata={"help": "show where in the code a failure happened, too"})


@dataclass(frozen=True)
class Trial:
    """What every command takes that would work for long, or write."""

    dry_run: bool = field(
        default=False, metadata={"help": "say what would be done, from files' headers; load no weights, write nothing"}
    )


OUTPUT = Part("output", Output, ("json", "traceback"))
TRIAL = Part("trial", Trial, ("dry_run",))
