"""`push_to_hub` of a quantized pipeline: diffusers uploads it with a card without a word, so ours is written first."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from diffusers.utils.hub_utils import PushToHubMixin

MARK = "adds_pqcad_card"


def install_cards(add_card: Callable[[Any, str, str], None]) -> None:
    """Let diffusers call `add_card(pipeline, folder, repo)` before it uploads the folder of a quantized pipeline.

    Models and schedulers of their own, and pipelines in floating point, are uploaded as before. Once is enough.
    """
    upload = PushToHubMixin._upload_folder
    if hasattr(upload, MARK):
        return

    @wraps(upload)
    def upload_with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if is_quantized_pipeline(self):
            add_card(self, working_dir, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    setattr(upload_with_card, MARK, True)
    PushToHubMixin._upload_folder = upload_with_card


def is_quantized_pipeline(item: Any) -> bool:
    """Return whether `item` is a pipeline with a part that is quantized."""
    parts = getattr(item, "components", None)
    return isinstance(parts, dict) and any(getattr(part, "is_quantized", False) for part in parts.values())
