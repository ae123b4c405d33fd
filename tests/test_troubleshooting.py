"""The guide quotes what diffusers and transformers say without our import, as they say it."""

import re
import subprocess
import sys
from pathlib import Path

from diffusers import UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_pqcad import PQCADConfig, quantize_

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "examples" / "guides" / "troubleshooting.md").read_text()
QUOTES = [block.splitlines() for block in re.findall(r"\n\n```\n(.*?)\n```\n", GUIDE, re.DOTALL)]


def load_without_import(library: str, model: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"from {library} import {model}\n{model}.from_pretrained({str(folder)!r})\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def quoted(marker: str) -> list[str]:
    """The lines of the guide's first quote with `marker`."""
    return next(lines for lines in QUOTES if any(marker in line for line in lines))


def test_diffusers_raises_what_the_guide_quotes(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    quantize_(unet, PQCADConfig()).save_pretrained(tmp_path)
    result = load_without_import("diffusers", "UNet2DModel", tmp_path)
    assert result.returncode != 0
    assert all(line in result.stderr for line in quoted("ValueError: Unknown"))


def test_transformers_warns_as_the_guide_quotes_and_loads_random_weights(tmp_path):
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=99, bos_token_id=1, eos_token_id=2, **settings))
    quantize_(encoder, PQCADConfig()).save_pretrained(tmp_path)
    result = load_without_import("transformers", "CLIPTextModel", tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(line in result.stderr for line in quoted("Hence"))
    assert re.search(r"qweight\s*\| UNEXPECTED", result.stderr)
    assert re.search(r"q_proj\.weight\s*\| MISSING", result.stderr)


def test_the_cards_code_starts_with_the_import():
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "diffusers_pqcad" / "publishing" / "model_card.md").read_text(), re.DOTALL
    )
    assert code.startswith("import diffusers_pqcad")


def test_the_readme_leads_to_the_guide():
    assert "(examples/guides/troubleshooting.md)" in (ROOT / "README.md").read_text()
