"""The old place of compression/reconstruction.py, kept for scripts until the rooms are settled."""

from diffusers_pqcad.compression.reconstruction import ReconstructionConfig

__all__ = ["ReconstructionConfig"]
