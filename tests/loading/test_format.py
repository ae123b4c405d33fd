"""The stored format: files of version 1, checksums, edited files and configs, and what its guide says."""

import copy
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForTokenClassification, BertModel, T5Config, T5EncoderModel

from diffusers_pqcad import PQCADConfig, kernels, quantize_, requantize_
from diffusers_pqcad.layers.checksums import CHECKSUM
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import PQCADLinear
from diffusers_pqcad.layers.timesteps import install_timestep_groups
from diffusers_pqcad.loading.convert import finish_, mark_quantized_
from diffusers_pqcad.loading.depth import shortcuts_at_the_output
from diffusers_pqcad.numerics.qparams import ActivationQParams, WeightSpec, activation_qparams

V1 = Path(__file__).parents[1] / "data" / "format-v1"
PACKED = ("qweight", "weight_scale", "input_scale", "input_zero_point", CHECKSUM)


# ---- small models of both libraries


def small_unet(boundaries=(250.5, 500)):
    """A quantized UNet of few layers, groups of inputs in the linear ones, three static ranges each."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()
    quantize_(unet, PQCADConfig(weight_bits=4, group_size=4))
    config = copy.deepcopy(unet.config["quantization_config"])
    config.timestep_boundaries = list(boundaries)
    groups = install_timestep_groups(unet, boundaries)
    for layer in packed_layers(unet).values():
        low, high = -3 - torch.rand(len(groups)), 3 + torch.rand(len(groups))
        layer.set_input_qparams_(activation_qparams(low, high, 8), groups)
    finish_(unet, config)
    mark_quantized_(unet, config)
    return unet


def small_text_encoder():
    torch.manual_seed(1)
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return quantize_(T5EncoderModel(config).eval(), PQCADConfig(weight_bits=4))


MODELS = {"diffusers": small_unet, "transformers": small_text_encoder}
FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
CLASSES = {"diffusers": UNet2DModel, "transformers": T5EncoderModel}


@pytest.fixture(scope="module", params=MODELS)
def library(request):
    return request.param


@pytest.fixture(scope="module")
def saved(library, one_thread, tmp_path_factory):
    """The folder of a small model, saved. Read only."""
    folder = tmp_path_factory.mktemp(library)
    MODELS[library]().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved`, to be edited."""
    return Path(shutil.copytree(saved, tmp_path / "edited"))


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def output(model):
    with torch.no_grad(), kernels.use("reference"):
        if isinstance(model, UNet2DModel):
            torch.manual_seed(2)
            return model(torch.randn(3, 1, 8, 8), torch.tensor([10, 300, 900])).sample
        return model(torch.tensor([[3, 1, 4, 1, 5]])).last_hidden_state


# ---- files of version 1


def v1_outputs(unet, text_encoder):
    expected = load_file(V1 / "expected.safetensors")
    with torch.no_grad(), kernels.use("reference"):
        yield unet(expected["sample"], expected["timestep"]).sample, expected["output"]
        yield text_encoder(expected["ids"]).last_hidden_state, expected["hidden"]


def test_files_of_version_1_have_the_outputs_that_they_had(tmp_path):
    unet, text_encoder = UNet2DModel.from_pretrained(V1 / "unet"), T5EncoderModel.from_pretrained(V1 / "text_encoder")
    assert {layer.spec.bits for layer in packed_layers(unet).values()} == {8, 6, 4, 3, 2}
    for actual, expected in v1_outputs(unet, text_encoder):
        torch.testing.assert_close(actual, expected)


def test_what_stays_in_floating_point_by_default_today_is_packed_where_version_1_packed_it(tmp_path):
    """Loaded, saved again and requantized: the shortcuts at the output, and nothing else, changed their default."""
    bits = json.loads((V1 / "unet" / "config.json").read_text())["quantization_config"]["weight_bits_by_module"]
    shortcuts = shortcuts_at_the_output(bits)
    assert len(shortcuts) == 2
    unet = UNet2DModel.from_pretrained(V1 / "unet")
    unet.save_pretrained(tmp_path)
    for model in (unet, UNet2DModel.from_pretrained(tmp_path)):
        assert {name: layer.spec.bits for name, layer in packed_layers(model).items()} == bits
    requantize_(unet, PQCADConfig(weight_bits=3))
    assert packed_layers(unet).keys() == bits.keys()
    assert unet.config["quantization_config"].modules_to_not_convert == []
    quantize_(unet.dequantize(), PQCADConfig())
    assert bits.keys() - packed_layers(unet).keys() == set(shortcuts)


@pytest.mark.parametrize(("folder", "model_class"), [("unet", UNet2DModel), ("text_encoder", T5EncoderModel)])
def test_a_model_of_version_1_is_saved_as_one_of_the_newest(folder, model_class, tmp_path):
    before = model_class.from_pretrained(V1 / folder)
    before.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (values["format_version"], values["quant_method"]) == (2, "diffusers_pqcad")
    stored = next(load_file(path) for path in tmp_path.glob("*.safetensors"))
    assert {f"{name}.{CHECKSUM}" for name in packed_layers(before)} <= stored.keys()
    assert_same_tensors(model_class.from_pretrained(tmp_path).state_dict(), before.state_dict())


@pytest.mark.parametrize(("tensor", "change", "message"), [
    ("qweight", lambda old: old.to(torch.int32), "expected torch.uint8, got torch.int32"),
    ("weight_scale", lambda old: old.half(), "expected torch.float32, got torch.float16"),
    ("input_scale", lambda old: old[:1], r"expected shape \(3,\), got shape \(1,\)"),
    ("input_zero_point", lambda old: old.float(), "expected torch.int32, got torch.float32"),
    ("input_zero_point", lambda old: old + 256, "expected 0 to 255"),
    ("weight_scale", lambda old: -old, "scales must be positive and finite"),
])  # fmt: skip
def test_what_can_be_checked_of_version_1_is(tensor, change, message, tmp_path):
    shutil.copytree(V1 / "unet", tmp_path, dirs_exist_ok=True)
    stored = load_file(tmp_path / FILES["diffusers"])
    name = next(name for name in stored if name.endswith(f".{tensor}"))
    save_file(stored | {name: change(stored[name]).contiguous()}, tmp_path / FILES["diffusers"])
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        UNet2DModel.from_pretrained(tmp_path)


def test_a_config_of_version_1_quantizes_to_the_newest():
    model = quantize_(UNet2DModel.from_config(small_unet().dequantize().config), PQCADConfig(format_version=1))
    assert model.config["quantization_config"].format_version == 2


# ---- checksums


def test_a_state_dict_has_a_checksum_for_each_packed_layer_and_the_model_holds_none(saved, library):
    for model in (MODELS[library](), CLASSES[library].from_pretrained(saved)):
        checksums = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(f".{CHECKSUM}")}
        assert checksums.keys() == {f"{name}.{CHECKSUM}" for name in packed_layers(model)}
        assert {tensor.dtype for tensor in checksums.values()} == {torch.int64}
        assert not [name for name, _ in model.named_buffers() if name.endswith(CHECKSUM)]


def test_saved_and_loaded_is_the_same_model(saved, library):
    model, loaded = MODELS[library](), CLASSES[library].from_pretrained(saved)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("options", [
    {"max_shard_size": "2KB"}, {"variant": "w4"}, {"safe_serialization": False},
], ids=str)  # fmt: skip
def test_checksums_go_through_every_way_to_save(library, options, tmp_path):
    if library == "transformers" and "safe_serialization" in options:
        pytest.skip("transformers writes safetensors only")
    model = MODELS[library]()
    model.save_pretrained(tmp_path, **options)
    loaded = CLASSES[library].from_pretrained(tmp_path, variant=options.get("variant"))
    assert_same_tensors(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("options", [
    {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"torch_dtype": torch.bfloat16},
], ids=str)  # fmt: skip
def test_checksums_are_compared_in_every_way_to_load(folder, library, options):
    assert packed_layers(CLASSES[library].from_pretrained(folder, **options))
    name = edit(folder, library, "qweight", flip_bit)
    with pytest.raises(ValueError, match=f"{re.escape(name)}: its checksum is [0-9a-f]{{8}}, not [0-9a-f]{{8}}"):
        CLASSES[library].from_pretrained(folder, **options)


CHANGES = {
    "weights": lambda layer: layer.qweight.view(-1)[0].bitwise_xor_(1),
    "scales": lambda layer: layer.weight_scale.mul_(2),
    "ranges": lambda layer: layer.set_input_qparams_(
        ActivationQParams(torch.full((3,), 0.5), torch.full((3,), 7)), layer.timestep_groups
    ),
    "activations": lambda layer: setattr(layer, "activation_bits", 7),
    "bits": lambda layer: pack_again_(layer, WeightSpec(2, layer.spec.group_size)),
}


def pack_again_(layer, spec):
    layer.unpack_()
    layer.pack_(spec, activation_bits=8)


@pytest.mark.parametrize("change", CHANGES)
def test_a_checksum_is_never_older_than_the_tensors(change):
    """Whatever changes them, and whether or not a state dict was made before."""
    model = small_unet()
    name, layer = next(iter(packed_layers(model).items()))
    before = model.state_dict()
    CHANGES[change](layer)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert not torch.equal(state[f"{name}.{CHECKSUM}"], before[f"{name}.{CHECKSUM}"])
    assert model.load_state_dict(state) == ([], [])


def test_requantizing_and_loading_another_state_are_saved_right(tmp_path):
    model, other = small_unet(), small_unet()
    requantize_(model, PQCADConfig(weight_bits=3)).save_pretrained(tmp_path / "requantized")
    again = UNet2DModel.from_pretrained(tmp_path / "requantized")
    assert_same_tensors(again.state_dict(), model.state_dict())
    for layer in packed_layers(other).values():
        layer.weight_scale.mul_(2)
    model = small_unet()
    assert model.load_state_dict(other.state_dict()) == ([], [])
    model.save_pretrained(tmp_path / "filled")
    assert_same_tensors(UNet2DModel.from_pretrained(tmp_path / "filled").state_dict(), other.state_dict())


def test_a_state_dict_can_be_saved_and_loaded_by_hand(tmp_path):
    model = small_unet()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    fresh = small_unet()
    assert fresh.load_state_dict(state) == ([], [])
    without = {name: tensor for name, tensor in state.items() if not name.endswith(CHECKSUM)}  # as of version 1
    assert fresh.load_state_dict(without) == ([], [])
    wrapped = nn.ModuleDict({"unet": model})
    assert nn.ModuleDict({"unet": fresh}).load_state_dict(wrapped.state_dict()) == ([], [])
    name = next(name for name in state if name.endswith("weight_scale"))
    with pytest.raises(RuntimeError, match=f"{re.escape(name)}: its checksum is"):
        fresh.load_state_dict(state | {name: state[name] * 2})


def test_a_single_layer_has_a_checksum_too():
    model = nn.Sequential(nn.Linear(8, 8))
    quantize_(model, PQCADConfig(method="fixed"))
    assert isinstance(model[0], PQCADLinear)
    assert len(model.state_dict()[f"0.{CHECKSUM}"]) == 4  # name, settings, integers, scales
    assert copy.deepcopy(model).load_state_dict(model.state_dict()) == ([], [])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_is_a_part_of_another_is_loaded_and_compared(bits, tmp_path):
    """Its layers have longer names there, as transformers' own loader gives them."""
    config = BertConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).eval()
    quantize_(model, PQCADConfig(method="fixed", weight_bits=bits)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"]["modules_to_not_convert"] = ["classifier"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    stored = load_file(tmp_path / FILES["transformers"])
    head = {"classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.zeros(2)}
    save_file(stored | head, tmp_path / FILES["transformers"], {"format": "pt"})
    wider = BertForTokenClassification.from_pretrained(tmp_path)
    name = "encoder.layer.0.output.dense"
    assert torch.equal(packed_layers(wider)[f"bert.{name}"].qweight, packed_layers(model)[name].qweight)
    flipped = flip_bit(stored[f"{name}.qweight"])
    save_file(stored | head | {f"{name}.qweight": flipped}, tmp_path / FILES["transformers"], {"format": "pt"})
    with pytest.raises(ValueError, match=f"bert.{name}.qweight: its checksum is"):
        BertForTokenClassification.from_pretrained(tmp_path)


# ---- the guide: what it says is enough to read a file without this package


def guide_weight(stored, name, bits):
    """Return the weights (C, K) of a layer by the rules of the guide; K is filled up to whole blocks."""
    stream = np.unpackbits(stored[f"{name}.qweight"], axis=1, bitorder="little")
    codes = stream.reshape(len(stream), -1, bits) @ (1 << np.arange(bits))
    step, largest = (2, 3) if bits == 2 else (1, 2 ** (bits - 1) - 1)
    return (codes * step - largest).astype(np.float32)


def guide_checksum(stored, name, settings):
    """Return the checksum of a layer by the rules of the guide."""
    numbers = [zlib.crc32(json.dumps(name).encode()), zlib.crc32(json.dumps(settings).encode())]
    for tensor in ("qweight", "weight_scale", "input_scale", "input_zero_point"):
        if (array := stored.get(f"{name}.{tensor}")) is not None:
            header = json.dumps([tensor, str(array.dtype), list(array.shape)])
            numbers.append(zlib.crc32(header.encode() + array.tobytes()))
    return numbers


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [None, 4])
def test_weights_and_checksums_follow_from_the_file_by_the_rules_of_the_guide(bits, group_size, tmp_path):
    float_model = UNet2DModel.from_config(small_unet().dequantize().config)
    model = quantize_(float_model, PQCADConfig(method="fixed", weight_bits=bits, group_size=group_size))
    model.save_pretrained(tmp_path)
    stored = load_numpy(tmp_path / FILES["diffusers"])
    for name, layer in packed_layers(model).items():
        weight = layer.dequantized_weight().flatten(1).numpy()
        levels = guide_weight(stored, name, bits)[:, : weight.shape[1]]
        scale = stored[f"{name}.weight_scale"]
        groups = levels.reshape(len(levels), scale.shape[1], -1) * scale[:, :, None]
        assert (groups.reshape(weight.shape) == weight).all(), name
        settings = [bits, group_size if isinstance(layer, nn.Linear) else None, 8, None]
        assert stored[f"{name}.{CHECKSUM}"].tolist() == guide_checksum(stored, name, settings), name


def test_checksums_with_static_ranges_follow_from_the_file_by_the_rules_of_the_guide(tmp_path):
    model = small_unet()
    model.save_pretrained(tmp_path)
    stored = load_numpy(tmp_path / FILES["diffusers"])
    for name, layer in packed_layers(model).items():
        settings = [layer.spec.bits, 4 if isinstance(layer, nn.Linear) else None, 8, [250.5, 500.0]]
        assert stored[f"{name}.{CHECKSUM}"].tolist() == guide_checksum(stored, name, settings), name


def test_the_guide_has_every_field_and_its_default():
    """Which PQCADConfig writes."""
    guide = (Path(__file__).parents[2] / "examples" / "guides" / "format.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", guide, re.MULTILINE))
    defaults = PQCADConfig().to_dict()
    assert {name: json.loads(rows[name].strip("`")) for name in defaults if name != "quant_method"} == {
        name: value for name, value in defaults.items() if name != "quant_method"
    }


# ---- without this package


LOADING = """
import sys
from diffusers import UNet2DModel
from transformers import T5EncoderModel
{"diffusers": UNet2DModel, "transformers": T5EncoderModel}[sys.argv[1]].from_pretrained(sys.argv[2])
assert "diffusers_pqcad" not in sys.modules
"""


def test_loaders_that_do_not_know_the_method_name_the_package(saved, library):
    """diffusers raises, transformers warns; both print the method's name, which is what to import."""
    command = [sys.executable, "-c", LOADING, library, str(saved)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "Unknown quantization type, got diffusers_pqcad" in result.stderr
    assert (result.returncode == 0) == (library == "transformers")


# ---- mutants


def flip_bit(tensor, bit=3):
    """Return `tensor` with one bit of its first element turned."""
    flipped = tensor.clone()
    data = flipped.view(-1).view(torch.uint8)
    data[0] ^= 1 << bit
    return flipped


def edit(folder, library, suffix, change):
    """Change the first tensor of the saved file whose name ends with `suffix`; return its name."""
    stored = load_file(folder / FILES[library])
    name = next(name for name in sorted(stored) if name.endswith(f".{suffix}"))
    save_file(stored | {name: change(stored[name])}, folder / FILES[library], metadata={"format": "pt"})
    return name


OTHER_DTYPES = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)


def mutants_of_tensors(stored):
    """Yield a name and the tensors of each mutant: packed tensors of three layers, damaged or edited."""
    layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    packed = [name for name in stored if name.rpartition(".")[0] in layers[:3] and name.endswith(PACKED)]
    for index, name in enumerate(packed):
        tensor = stored[name]
        yield f"{name} bit", stored | {name: flip_bit(tensor, index % 8)}
        yield f"{name} last-bit", stored | {name: flip_bit(tensor.flatten().flip(0)).flip(0).reshape(tensor.shape)}
        dtype = [dtype for dtype in OTHER_DTYPES if dtype != tensor.dtype][index % 6]
        yield f"{name} {dtype}", stored | {name: tensor.to(dtype)}
        yield f"{name} dropped", {other: value for other, value in stored.items() if other != name}
        yield f"{name} reshaped", stored | {name: tensor.reshape(1, -1)}
        yield f"{name} longer", stored | {name: torch.cat([tensor, tensor])}
        if tensor.is_floating_point():
            for value in (1e38, 1e-45, float("nan"), 0.0, -1.0):
                yield f"{name} {value}", stored | {name: torch.full_like(tensor, value)}
            yield f"{name} scaled", stored | {name: tensor * 2}
        twin = next((other for other in stored if other > name and same_kind(tensor, stored[other])), None)
        if twin is not None:
            yield f"{name} {twin} swapped", stored | {name: stored[twin], twin: tensor}
    yield f"{packed[0]} added", stored | {f"{packed[0]}_2": stored[packed[0]].clone()}
    for first, second in zip(layers[:3], layers[1:], strict=False):
        yield f"{first} {second} changed places", stored | exchange(stored, first, second)


def same_kind(tensor, other):
    return (tensor.dtype, tensor.shape) == (other.dtype, other.shape) and not torch.equal(tensor, other)


def exchange(stored, first, second):
    """Return the packed tensors of two layers, checksums included, under each other's names."""
    pairs = [(f"{first}.{name}", f"{second}.{name}") for name in PACKED]
    pairs = [(one, two) for one, two in pairs if one in stored]
    return {one: stored[two] for one, two in pairs} | {two: stored[one] for one, two in pairs}


ODD_VALUES = (
    None, True, 0, 1, 2, 7, -1, 2.5, 1e400, "", "fixed", [], [8], [500, 250], [250.5], [250.5, 501], ["to_q"], ["*"],
    [[8]], {}, {"to_q": 4}, {"a": [1]},
)  # fmt: skip


def mutants_of_config(values):
    """Yield a name, what an error may name, and the values of each mutant: fields set to odd values, or dropped."""
    for field in values:
        if field == "quant_method":  # the libraries themselves ask that
            continue
        for value in ODD_VALUES:
            yield f"{field} {value!r}", field, values | {field: value}
        yield f"{field} dropped", field, {other: value for other, value in values.items() if other != field}
    all_bits = values["weight_bits_by_module"]
    name, bits = next(iter(all_bits.items()))
    others = {other: width for other, width in all_bits.items() if other != name}
    yield f"{name} dropped", name, values | {"weight_bits_by_module": others}
    for width in (2, 3, 4, 6, 8, 5, "4", None, 4.5):
        yield f"{name} {width!r}", name, values | {"weight_bits_by_module": all_bits | {name: width}}


def refusal(folder, library, expected):
    """Return the error of loading `folder`, or `None`; any other model than the `expected` one fails."""
    try:
        model = CLASSES[library].from_pretrained(folder)
    except ValueError as error:
        return str(error)
    assert_same_tensors(model.state_dict(), expected.state_dict())
    assert torch.equal(output(model), output(expected))
    return None


def test_an_edited_file_is_the_same_model_or_an_error_that_names_the_tensor(folder, library):
    expected = CLASSES[library].from_pretrained(folder)
    stored = load_file(folder / FILES[library])
    refused = 0
    for mutant, tensors in mutants_of_tensors(stored):
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / FILES[library], {"format": "pt"})
        error = refusal(folder, library, expected)
        names = [name.removesuffix(f".{CHECKSUM}") for name in mutant.split()[:2]]
        refused += error is not None
        assert error is None or any(name in error for name in names), (mutant, error)
    assert refused > 60


def test_an_edited_config_is_the_same_model_or_an_error_that_names_the_field_or_a_tensor(folder, library):
    expected = CLASSES[library].from_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    config, layers = values["quantization_config"], list(packed_layers(expected))
    refused = 0
    for mutant, field, edited in mutants_of_config(config):
        (folder / "config.json").write_text(json.dumps(values | {"quantization_config": edited}))
        error = refusal(folder, library, expected)
        refused += error is not None
        assert error is None or any(name in error for name in (field, "weight_bits_by_module", *layers)), (
            mutant,
            error,
        )
    assert refused > 100
