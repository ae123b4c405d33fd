"""`pqcad push`: publish the folder of a pipeline, with a card that has its figures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_pqcad.cli.command import TRIAL, Command, Outcome, Trial
from diffusers_pqcad.loading.saved import INDEX_FILE
from diffusers_pqcad.publishing import pushing
from diffusers_pqcad.publishing.pipeline_push import refresh_card
from diffusers_pqcad.publishing.quantized_card import take_evaluation
from diffusers_pqcad.publishing.settings import Part, config_of


@dataclass(frozen=True)
class PushConfig:
    """What is published, and where."""

    folder: str | None = field(default=None, metadata={"help": "folder of the pipeline"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to publish in: user/name"})
    hub_private_repo: bool = field(default=False, metadata={"help": "create that repository as a private one"})
    license: str | None = field(
        default=None,
        metadata={"help": "license of the teacher, for the model card; None: the one that the teacher's card names"},
    )
    evaluation: str | None = field(
        default=None,
        metadata={"help": "output folder of `pqcad evaluate` for this pipeline, whose table goes into the card"},
    )

    def __post_init__(self) -> None:
        if self.hub_model_id is not None and (
            self.hub_model_id.count("/") != 1 or not pushing.is_repo_id(self.hub_model_id)
        ):
            raise ValueError(f"hub_model_id: expected user/name, got {self.hub_model_id!r}.")


class Settings(NamedTuple):
    """What `pqcad push` takes."""

    run: PushConfig
    trial: Trial


RUN = Part("run", PushConfig, ("folder", "hub_model_id", "hub_private_repo", "license", "evaluation"))


def run(settings: Settings) -> Outcome:
    """Return the address of what was published, or with `--dry_run` the files that would be."""
    folder, repo = Path(str(settings.run.folder)), str(settings.run.hub_model_id)
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(
            f"folder: expected the folder of a pipeline, with {INDEX_FILE}, got {folder}, which has none."
        )
    if settings.trial.dry_run:
        document = document_of(folder, repo)
        lines = [f"{size:>12} {name}" for name, size in document["files"].items()]
        lines.append(
            f"{len(document['files'])} files, {document['num_bytes']} bytes, would go to {repo}. Nothing was sent."
        )
        return Outcome(document | {"dry_run": True}, "\n".join(lines))
    pushing.check_access()
    if settings.run.evaluation is not None:
        take_evaluation(folder, Path(settings.run.evaluation))
    refresh_card(folder, repo, settings.run.license, pushing.card_on_hub(repo))
    url = pushing.push(folder, repo, private=settings.run.hub_private_repo)
    return Outcome(document_of(folder, repo) | {"url": url}, f"Published: {url}")


def document_of(folder: Path, repo: str) -> dict[str, Any]:
    """Return what leaves `folder` for `repo`, as JSON values."""
    sizes = pushing.published_files(folder)
    return {"repository": repo, "files": sizes, "num_bytes": sum(sizes.values())}


COMMAND = Command(
    name="push",
    summary="publish a pipeline's folder on the Hub, with a card of its figures",
    description="Publish the folder of a pipeline on the Hub: weights, configs, card and pictures, and nothing else "
    "of the folder, in one commit. The card of a quantized pipeline gets its figures anew; what you wrote in it "
    "stays. Log in with `hf auth login` first.",
    example="pqcad push outputs/small user/name --dry_run",
    parts=(RUN, TRIAL),
    operands={"folder": "FOLDER", "hub_model_id": "USER/NAME"},
    settings=lambda values: Settings(config_of(RUN, values), config_of(TRIAL, values)),
    run=run,
    kept=lambda settings: "What the Hub has of it is not sent again. To go on:",
)
