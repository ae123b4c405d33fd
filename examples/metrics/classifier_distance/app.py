"""The page of the metric's Space: the distance of an uploaded file of features to uploaded statistics."""

from typing import Any

import evaluate
from safetensors.torch import load_file

MODULE = "classifier_distance.py"  # beside this file, where a Space starts it


def distance(features: str, reference: str, name: str) -> dict[str, Any]:
    """Return the result for a safetensors file with `features` (n, D), and one with `mean` and `covariance`."""
    statistics = load_file(reference)
    return evaluate.load(MODULE).compute(
        predictions=load_file(features)["features"].float().numpy(),
        reference={"mean": statistics["mean"], "covariance": statistics["covariance"], "name": name},
    )


if __name__ == "__main__":
    import gradio

    gradio.Interface(
        distance,
        [
            gradio.File(label="features: a safetensors file with `features` (n, D)", type="filepath"),
            gradio.File(
                label="reference: a safetensors file with `mean` (D,) and `covariance` (D, D)", type="filepath"
            ),
            gradio.Textbox(label="what the features are"),
        ],
        gradio.JSON(),
        title="classifier_distance",
    ).launch()
