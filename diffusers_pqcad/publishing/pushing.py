"""Pushing: what of a folder may leave it, in one commit, and what to do where the Hub does not take it."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from diffusers_pqcad.loading.saved import INDEX_FILE

CARD = "README.md"
CONFIGS = (INDEX_FILE, "config.json", "scheduler_config.json")
# What may be published: no resume files, no logs, no pickles.
PUBLISHED_FILES = (
    "README.md",
    "recipe.yaml",
    "prompts.txt",
    "metrics.json",
    "history.json",
    "quantization.json",
    "model_index.json",
    "pytorch_lora_weights.safetensors",
    "assets/*.png",
    "*/config.json",
    "*/scheduler_config.json",
    "*/*.safetensors",
    "*/*.safetensors.index.json",
    "*/generation_config.json",
    "*/preprocessor_config.json",
    # Of tokenizers:
    "*/added_tokens.json",
    "*/chat_template.jinja",
    "*/merges.txt",
    "*/special_tokens_map.json",
    "*/spiece.model",
    "*/tokenizer.json",
    "*/tokenizer_config.json",
    "*/vocab.json",
    "*/vocab.txt",
)
UNPUBLISHED_FILES = ("state/*", "checkpoint-*/*")  # of a run, which have such names, too
# What helps, by the status of an HTTP answer.
ADVICE = {
    401: "The Hub does not know you: log in with `hf auth login`.",
    403: "You may not do this there: check the name before the slash, and that your token has the role 'write'.",
    404: "The Hub finds no such repository for you: check its name, and log in with `hf auth login`.",
    409: "Another change of the repository is in the way: wait until it is done.",
    412: "Somebody else changed the repository meanwhile.",
    429: "These were too many requests for the Hub: wait some minutes.",
}
FAULT = "The Hub has a fault of its own: wait some minutes."
CUT = "The connection failed: check the network, and log in with `hf auth login` if you have not."


class HubError(ValueError):
    """The Hub did not do what it was asked for; the message says what helps."""


def is_repo_id(name: str) -> bool:
    """Return whether the Hub takes `name` for a repository's: it refuses a card that names another."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def published_files(folder: Path) -> dict[str, int]:
    """Return the bytes of each file that leaves `folder`, by its name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = filter_repo_objects(names, allow_patterns=list(PUBLISHED_FILES), ignore_patterns=list(UNPUBLISHED_FILES))
    return {name: (folder / name).stat().st_size for name in kept}


def without_places(path: Path) -> str | bytes:
    """Return what is uploaded of a file: its name, or the bytes of a config without the place it was loaded from.

    diffusers notes that, and it may be a folder of this computer; a repository stays.
    """
    if path.name not in CONFIGS:
        return str(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    place = values.get("_name_or_path") if isinstance(values, dict) else None
    if not isinstance(place, str) or not (Path(place).is_absolute() or Path(place).exists()):
        return str(path)
    del values["_name_or_path"]
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload what is publishable in `folder` to the model repository `repo_id`, creating it; return its URL.

    All of it in one commit: a push that fails changes nothing there. The next one sends no large file again that has
    arrived. Raises HubError where the Hub does not take it, and where a repository that shall be `private` is public.
    """
    folder, api = Path(folder), HfApi()
    # Not upload_folder: with hf_xet it makes several commits.
    operations = [CommitOperationAdd(name, without_places(folder / name)) for name in published_files(folder)]
    with explained(repo_id, "Nothing was published. Then the same command finishes it."):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        is_public = private and not api.repo_info(repo_id).private
        if not is_public:
            api.create_commit(repo_id, operations, commit_message="Upload a PQCAD pipeline")
    if is_public:
        raise HubError(
            f"hub_private_repo: expected a new repository, or a private one, got {repo_id}, which is public. Nothing "
            "was published. Make it private in its settings, or give another name."
        )
    return str(url)


def card_on_hub(repo_id: str) -> str | None:
    """Return the card of the repository `repo_id`, None where there is no such repository, or no card in it."""
    with explained(repo_id, "Nothing was published. Then the same command finishes it."):
        if not HfApi().repo_exists(repo_id):
            return None
        try:
            return Path(hf_hub_download(repo_id, CARD)).read_text(encoding="utf-8")
        except EntryNotFoundError:
            return None


def check_access() -> None:
    """Raise HubError, before hours of work, where a push at the end would fail for lack of a network or a token."""
    later = "A run that publishes later goes without --push_to_hub, and `pqcad push` follows it."
    with explained("push_to_hub", later):
        HfApi().whoami()


@contextmanager
def explained(what: str, then: str) -> Iterator[None]:
    """Raise HubError in the place of any error of the client: what failed, what helps, what to do `then`."""
    try:
        yield
    except Exception as raised:
        errors = [*chain_of(raised)]
        # Of an upload, the client's own says only that it failed.
        error = next((each for each in errors if type(each) is not RuntimeError), raised)
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise HubError(f"{what}: {advice(errors)} {then} ({said})") from None


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Give `error`, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def advice(errors: Iterable[BaseException]) -> str:
    """Return what helps against an error of the client and those that it came from."""
    answers = (getattr(error, "response", None) for error in errors)
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if status is None:
        return CUT
    return ADVICE.get(status, FAULT if status >= 500 else "The Hub refuses.")
