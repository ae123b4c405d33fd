"""`pqcad push`: publish the folder of a pipeline, with a card that has its figures."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_pqcad.cli.command import TRIAL, Command, Outcome, Trial
from diffusers_pqcad.loading.saved import INDEX_FILE
from diffusers_pqcad.publishing import hub, pushing
from diffusers_pqcad.publishing.settings import Part, config_of


@dataclass(frozen=True)
class PushConfig:
    """What is published, and where."""

    folder: str | None = field(default=None, metadata={"help": "folder of the pipeline"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to publish in: user/name"})
    hub_private_repo: bool = field(default=False, metadata={"help": "create that repository as a private one"})
    license: str | None = field(default=None, metadata={"help": "license of the teacher, for the model card"})

    def __post_init__(self) -> None:
        if self.hub_model_id is not None and (
            self.hub_model_id.count("/") != 1 or not pushing.is_repo_id(self.hub_model_id)
        ):
            raise ValueError(f"hub_model_id: expected user/name, got {self.hub_model_id!r}.")


class Settings(NamedTuple):
    """What `pqcad push` takes."""

    run: PushConfig
    trial: Trial


RUN = Part("run", PushConfig, ("folder", "hub_model_id", "hub_private_repo", "license"))


def run(settings: Settings) -> Outcome:
    """Return the address of what was published, or with `--dry_run` the files that would be."""
    folder, repo = Path(str(settings.run.folder)), str(settings.run.hub_model_id)
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(
            f"folder: expected the folder of a pipeline, with {INDEX_FILE}, got {folder}, which has none."
        )
    sizes = pushing.published_files(folder)
    document: dict[str, Any] = {"repository": repo, "files": sizes, "num_bytes": sum(sizes.values())}
    if settings.trial.dry_run:
        lines = [f"{size:>12} {name}" for name, size in sizes.items()]
        lines.append(f"{len(sizes)} files, {document['num_bytes']} bytes, would go to {repo}. Nothing was sent.")
        return Outcome(document | {"dry_run": True}, "\n".join(lines))
    pushing.check_access()
    refresh_card(folder, repo, settings.run.license)
    url = pushing.push(folder, repo, private=settings.run.hub_private_repo)
    return Outcome(document | {"url": url}, f"Published: {url}")


def refresh_card(folder: Path, repo: str, license_id: str | None) -> None:
    """Write the card of a run of `compress` for `repo`; the author's own text in it stays."""
    if (folder / "metrics.json").is_file():
        metrics = json.loads((folder / "metrics.json").read_text())
        license_id = license_id or metrics["settings"].get("license")
        card = hub.model_card(metrics, repo=repo, license_id=license_id)
        hub.write_card(folder, card, on_hub=pushing.card_on_hub(repo))


COMMAND = Command(
    name="push",
    summary="publish a pipeline's folder on the Hub, with a card of its figures",
    description="Publish the folder of a pipeline on the Hub: weights, configs, card and pictures, and nothing else "
    "of the folder. The card of a run of `pqcad compress` gets its figures anew; what you wrote in it stays. Log in "
    "with `hf auth login` first.",
    example="pqcad push outputs/small user/name --dry_run",
    parts=(RUN, TRIAL),
    operands={"folder": "FOLDER", "hub_model_id": "USER/NAME"},
    settings=lambda values: Settings(config_of(RUN, values), config_of(TRIAL, values)),
    run=run,
    kept=lambda settings: "What the Hub has of it is not sent again. To go on:",
)
