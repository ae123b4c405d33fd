"""The reader in the guide to the stored format, which knows numpy alone, reads folders of all widths."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build_tiny_unet
from diffusers import UNet2DModel

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.layers.checksums import CHECKSUM, PACKED_BUFFERS
from diffusers_pqcad.layers.find import packed_layers

GUIDE = (Path(__file__).parents[2] / "examples" / "guides" / "format.md").read_text()
(READER,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(READER, "format.md", "exec"), names)
    return names


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_it_reads_what_the_model_loads(reader, tmp_path, bits, group_size):
    config = PQCADConfig(method="fixed", weight_bits=bits, group_size=group_size)
    quantize_(build_tiny_unet(), config).save_pretrained(tmp_path)
    loaded = packed_layers(UNet2DModel.from_pretrained(tmp_path))
    found = reader["weights"](tmp_path)
    assert found.keys() == loaded.keys()
    for name, layer in loaded.items():
        wanted = layer.weight.flatten(1).numpy()
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name][:, : wanted.shape[1]], wanted), name


def test_it_reads_a_folder_of_several_widths_and_shards(reader, tmp_path):
    quantize_(build_tiny_unet(), PQCADConfig(weight_bits=4)).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = packed_layers(UNet2DModel.from_pretrained(tmp_path))
    assert len({layer.spec.bits for layer in loaded.values()}) > 1
    found = reader["weights"](tmp_path)
    for name, layer in loaded.items():
        wanted = layer.weight.flatten(1).numpy()
        assert np.array_equal(found[name][:, : wanted.shape[1]], wanted), name


def test_it_is_short_and_knows_numpy_alone():
    lines = [line for line in READER.splitlines() if line.strip()]
    assert len(lines) <= 30
    assert set(re.findall(r"^(?:import|from) (\w+)", READER, re.MULTILINE)) == {"json", "pathlib", "numpy"}


def test_the_guide_has_every_buffer():
    rows = re.findall(r"^\| `(\w+)` \| (?:uint8|float32|int32|int64) \|", GUIDE, re.MULTILINE)
    assert set(rows) == {*PACKED_BUFFERS, CHECKSUM}
