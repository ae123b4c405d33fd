"""Compare a pipeline with a reference pipeline: fidelity for the same seeds, distribution, size and speed."""

from diffusers_pqcad.evaluation.features import load_extractor
from diffusers_pqcad.evaluation.generate import Samples, generate_images, generate_samples, to_uint8
from diffusers_pqcad.evaluation.report import EvaluationReport, evaluate

__all__ = [
    "EvaluationReport",
    "Samples",
    "evaluate",
    "generate_images",
    "generate_samples",
    "load_extractor",
    "to_uint8",
]
