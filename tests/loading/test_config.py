"""PQCADConfig: values, JSON, equality, exemptions, and what diffusers' pipeline loader asks of it."""

import copy
import json
import pickle

import pytest
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from hypothesis import example, given
from hypothesis import strategies as st

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.loading.config import DENOISER_COMPONENTS, EXEMPT_MODULES, FORMAT_VERSION, PQCADMethod, matches
from diffusers_pqcad.numerics.qparams import WeightSpec

pytestmark = pytest.mark.fast

# One value for every field that differs from the default.
CHANGED = {
    "weight_bits": 4.5,
    "bit_choices": (8, 4),
    "activation_bits": None,
    "group_size": 32,
    "method": "fixed",
    "modules_to_not_convert": ["to_q"],
    "search_all_modules": True,
    "components": ["unet", "vae"],
    "weight_bits_by_module": {"mid_block.resnets.0.conv1": 3},
    "timestep_boundaries": [250, 500],
    "num_inference_steps": 4,
    "guidance_folded": True,
    "packed_share": 0.75,
    "format_version": 1,
}


def config_with(name):
    return PQCADConfig(**{name: CHANGED[name]})


def test_the_defaults_are_the_documented_ones():
    assert PQCADConfig().to_dict() == {
        "weight_bits": 5.0,
        "bit_choices": [8, 6, 4, 3, 2],
        "activation_bits": 8,
        "group_size": None,
        "method": "progressive",
        "modules_to_not_convert": [],
        "search_all_modules": False,
        "components": None,
        "weight_bits_by_module": {},
        "timestep_boundaries": None,
        "num_inference_steps": None,
        "guidance_folded": False,
        "packed_share": None,
        "format_version": FORMAT_VERSION,
        "quant_method": "diffusers_pqcad",
    }


def test_it_is_a_model_config_and_a_pipeline_config():
    config = PQCADConfig()
    assert isinstance(config, QuantizationConfigMixin)
    assert isinstance(config, PipelineQuantizationConfig)
    assert (config.quant_mapping, config.quant_backend, config.is_granular) == (None, "pqcad", False)


def test_the_method_is_an_enum_that_hashes_like_its_string():
    assert PQCADConfig().quant_method.value == "diffusers_pqcad"
    assert {"diffusers_pqcad": 1}[PQCADConfig().quant_method] == 1


@pytest.mark.parametrize("name", ["pqcad", "diffusers_pqcad", PQCADMethod.PQCAD])
def test_both_names_of_the_method_are_read_and_one_is_written(name):
    assert PQCADConfig.from_dict({"quant_method": name}) == PQCADConfig()
    assert PQCADConfig(quant_method=name).to_dict()["quant_method"] == "diffusers_pqcad"


def test_every_changed_field_is_listed_here():
    assert set(CHANGED) == set(PQCADConfig().to_dict()) - {"quant_method"}


@pytest.mark.parametrize("name", CHANGED)
def test_json_brings_back_an_equal_config(name):
    config = config_with(name)
    text = json.dumps(config.to_dict(), sort_keys=True)  # what diffusers itself does; fails on mixed key types
    assert PQCADConfig.from_dict(json.loads(text)) == config
    assert PQCADConfig.from_dict(json.loads(config.to_json_string(use_diff=True))) == config
    assert PQCADConfig.from_dict(json.loads(config.to_json_string(use_diff=False))) == config


def test_a_json_file_brings_back_an_equal_config(tmp_path):
    config = PQCADConfig(weight_bits=3.5, weight_bits_by_module={"a": 8, "b": 2})
    config.to_json_file(tmp_path / "config.json")
    assert PQCADConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config


@pytest.mark.parametrize("name", CHANGED)
def test_configs_that_differ_in_one_field_are_unequal(name):
    assert config_with(name) == config_with(name)
    assert config_with(name) != PQCADConfig()


def test_configs_are_mutable_and_so_not_hashable():
    with pytest.raises(TypeError, match="unhashable"):
        hash(PQCADConfig())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
@pytest.mark.parametrize("name", CHANGED)
def test_copies_are_equal_and_independent(name, duplicate):
    config = config_with(name)
    twin = duplicate(config)
    assert twin == config
    twin.modules_to_not_convert.append("other")
    twin.weight_bits_by_module["other"] = 2
    assert config == config_with(name)


def test_the_dict_shares_nothing_with_the_config():
    config = PQCADConfig(weight_bits_by_module={"a": 8}, modules_to_not_convert=["b"], components=["unet"])
    values = config.to_dict()
    values["weight_bits_by_module"]["a"] = 2
    values["modules_to_not_convert"].append("c")
    values["components"].append("vae")
    assert config == PQCADConfig(weight_bits_by_module={"a": 8}, modules_to_not_convert=["b"], components=["unet"])


def test_the_config_shares_nothing_with_its_arguments():
    skipped, bits, components, boundaries = ["b"], {"a": 8}, ["unet"], [500]
    config = PQCADConfig(
        modules_to_not_convert=skipped,
        weight_bits_by_module=bits,
        components=components,
        timestep_boundaries=boundaries,
    )
    before = copy.deepcopy(config)
    skipped.append("c")
    bits["a"] = 2
    components.append("vae")
    boundaries.append(900)
    assert config == before


def test_repr_and_diff_name_only_what_differs():
    assert PQCADConfig().to_diff_dict() == {"quant_method": "diffusers_pqcad"}
    assert PQCADConfig(weight_bits=3).to_diff_dict() == {"quant_method": "diffusers_pqcad", "weight_bits": 3}
    assert repr(PQCADConfig(weight_bits=3)) == 'PQCADConfig({"quant_method": "diffusers_pqcad", "weight_bits": 3})'


def test_whole_floats_become_widths():
    config = PQCADConfig(bit_choices=(8.0, 4.0), weight_bits_by_module={"a": 4.0})
    assert [type(bits) for bits in (*config.bit_choices, *config.weight_bits_by_module.values())] == [int] * 3


def test_bit_choices_are_sorted_and_unique():
    assert PQCADConfig(bit_choices=[2, 8, 4, 4]).bit_choices == (8, 4, 2)


BAD_VALUES = [
    ({"bit_choices": (8, 5)}, "bit_choices: expected some of"),
    ({"bit_choices": (8, 4.7)}, "bit_choices: expected some of"),
    ({"modules_to_not_convert": "to_q"}, "modules_to_not_convert: expected a list of names, got the string 'to_q'"),
    ({"components": "unet"}, "components: expected 'all' or a list of names, got the string 'unet'. One component"),
    ({"bit_choices": ()}, "bit_choices: expected some of"),
    ({"weight_bits": "4"}, "weight_bits: expected a number, got '4'"),
    ({"weight_bits": 9}, "weight_bits: an average of 9 cannot be met"),
    ({"weight_bits": 1.5}, "weight_bits: an average of 1.5 cannot be met"),
    ({"weight_bits": 3.0, "bit_choices": (8, 4)}, r"cannot be met with bit_choices \[8, 4\]; expected 4 to 8"),
    ({"weight_bits": float("nan")}, "weight_bits: an average of nan cannot be met"),
    ({"weight_bits": float("nan"), "method": "fixed"}, "takes one width out of"),
    ({"weight_bits": 4.5, "method": "fixed"}, "takes one width out of .* Use method='progressive'"),
    ({"weight_bits": 5, "method": "fixed"}, "takes one width out of"),
    ({"activation_bits": 4}, r"activation_bits: expected one of \(8, 7\) or None, got 4"),
    ({"group_size": 0}, "group_size: expected a positive integer or None, got 0"),
    ({"group_size": 32.0}, "group_size: expected a positive integer or None, got 32.0"),
    ({"group_size": -1}, "group_size: expected a positive integer or None, got -1"),
    ({"method": "magic"}, "method: expected 'progressive' or 'fixed', got 'magic'"),
    ({"weight_bits_by_module": {"a": 5}}, r"weight_bits_by_module: expected widths out of .* got \{'a': 5\}"),
    ({"guidance_folded": 1}, "guidance_folded: expected True or False, got 1"),
    ({"num_inference_steps": 0}, "num_inference_steps: expected a positive integer or None, got 0"),
    ({"timestep_boundaries": [500, 250]}, "timestep_boundaries: expected a list of increasing numbers"),
    ({"timestep_boundaries": [250, 250]}, "timestep_boundaries: expected a list of increasing numbers"),
    ({"format_version": FORMAT_VERSION + 1}, "format_version 3 is newer .* upgrade diffusers-pqcad"),
    ({"format_version": 0}, "format_version: expected an integer from 1 to 2, got 0"),
    ({"format_version": True}, "format_version: expected an integer from 1 to 2, got True"),
    ({"weight_bits": True}, "weight_bits: expected a number, got True"),
    ({"group_size": True}, "group_size: expected a positive integer or None, got True"),
    ({"search_all_modules": 1}, "search_all_modules: expected True or False, got 1"),
    ({"bit_choices": 8}, "bit_choices: expected some of .*, got 8"),
    ({"bit_choices": [[8]]}, r"bit_choices: expected some of .*, got \[\[8\]\]"),
    ({"components": "ALL"}, "components: expected 'all' or a list of names, got the string 'ALL'"),
    ({"components": ["unet", "all"]}, r"components: .*both: \['unet', 'all'\].*\['unet'\] out"),
    ({"components": [1]}, r"components: expected a list of names, got \[1\]"),
    ({"components": {"unet": 1}}, "components: expected a list of names, got {'unet': 1}"),
    ({"modules_to_not_convert": 3}, "modules_to_not_convert: expected a list of names, got 3"),
    ({"weight_bits_by_module": ["a"]}, "weight_bits_by_module: expected a dict of layers' names to widths, got "),
    ({"weight_bits_by_module": {"a": "4"}}, "weight_bits_by_module: expected widths out of .* got {'a': '4'}"),
    ({"timestep_boundaries": 500}, "timestep_boundaries: expected a list of increasing numbers, got 500"),
    ({"timestep_boundaries": [float("nan")]}, "timestep_boundaries: expected a list of increasing numbers, got"),
    ({"timestep_boundaries": [10**400]}, "timestep_boundaries: expected a list of increasing numbers, got"),
    ({"timestep_boundaries": [2**60, 2**60 + 1]}, "timestep_boundaries: expected a list of increasing numbers, got"),
    ({"quant_method": "torchao"}, "quant_method: expected one of .*'diffusers_pqcad'.*, got 'torchao'"),
    ({"packed_share": 1.01}, "packed_share: expected a number from 0 to 1 or None, got 1.01"),
    ({"packed_share": "all"}, "packed_share: expected a number from 0 to 1 or None, got 'all'"),
    ({"packed_share": float("nan")}, "packed_share: expected a number from 0 to 1 or None, got nan"),
    ({"packed_share": True}, "packed_share: expected a number from 0 to 1 or None, got True"),
]


def test_one_width_has_a_default_of_its_own() -> None:
    config = PQCADConfig(method="fixed")
    assert config.weight_bits == 8
    assert PQCADConfig.from_dict(config.to_dict()) == config
    assert "weight_bits" not in config.to_diff_dict()
    assert "weight_bits" not in PQCADConfig().to_diff_dict()
    assert PQCADConfig(weight_bits=4).to_diff_dict()["weight_bits"] == 4
    assert PQCADConfig(method="fixed", weight_bits=4).to_diff_dict()["weight_bits"] == 4


@pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=[str(values) for values, _ in BAD_VALUES])
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PQCADConfig(**values)
    with pytest.raises(ValueError, match=message):
        PQCADConfig.from_dict(values)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2, 3, 4, 6, 7, 8, 10**400, -1, 0.5, 4.0])
    | st.floats()
    | st.sampled_from(["", "fixed", "progressive", "pqcad", "unet", "4"])
    | st.text(max_size=3),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", [*CHANGED, "quant_method"])
@given(value=JSON)
@example(value=[250, 500.5])
@example(value={"a": 4.0})
@example(value=[True])
def test_any_json_value_of_a_field_gives_a_valid_config_or_an_error_that_names_the_field(name, value):
    try:
        config = PQCADConfig.from_dict({name: value})
    except ValueError:
        with pytest.raises(ValueError, match=name):
            PQCADConfig.from_dict({name: value})
        return
    stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert PQCADConfig.from_dict(stored) == config
    assert [type(value) for value in stored.values()] == [type(value) for value in config.to_dict().values()]
    assert type(value) is not bool or name == "search_all_modules"


def test_boundaries_may_be_floats_and_integers_stay_integers():
    stored = json.dumps(PQCADConfig(timestep_boundaries=(0, 0.25, 1)).to_dict())
    assert '"timestep_boundaries": [0, 0.25, 1]' in stored
    assert PQCADConfig.from_dict(json.loads(stored)).timestep_boundaries == [0, 0.25, 1]


def test_unknown_keys_are_refused_not_dropped():
    with pytest.raises(ValueError, match=r"unknown settings \['bits'\]; expected some of .*'weight_bits'"):
        PQCADConfig.from_dict({"quant_method": "pqcad", "bits": 4})
    with pytest.raises(TypeError, match="bits"):
        PQCADConfig(bits=4)


def test_a_newer_format_is_named_before_its_unknown_keys():
    with pytest.raises(ValueError, match="format_version 3 is newer"):
        PQCADConfig.from_dict({"format_version": FORMAT_VERSION + 1, "a_new_setting": 1})


def test_from_dict_leaves_its_argument_alone():
    values = {"quant_method": "pqcad", "weight_bits": 3.0, "bit_choices": [8, 3]}
    before = copy.deepcopy(values)
    PQCADConfig.from_dict(values)
    assert values == before


@pytest.mark.parametrize("name", EXEMPT_MODULES)
def test_first_and_last_layers_are_exempt_by_default_and_searched_on_request(name):
    for module in (name, f"{name}.linear_1"):
        assert PQCADConfig().is_exempt(module)
        assert PQCADConfig(method="fixed").is_exempt(module)
        assert not PQCADConfig(search_all_modules=True).is_exempt(module)


def test_only_top_level_modules_are_exempt_by_default():
    for name in ("down_blocks.0.conv_in", "mid_block.conv_out", "mid_block.resnets.0.time_emb_proj", "conv_in2"):
        assert not PQCADConfig().is_exempt(name)


def test_the_switch_does_not_search_what_the_user_excluded():
    config = PQCADConfig(search_all_modules=True, modules_to_not_convert=["conv_in"])
    assert config.is_exempt("conv_in")
    assert not config.is_exempt("conv_out")


MATCHES = [
    ("mid_block.attentions.0.to_q", "mid_block.attentions.0.to_q", True),
    ("mid_block.attentions.0.to_q", "mid_block", True),
    ("mid_block.attentions.0.to_q", "mid_block.attentions.0", True),
    ("mid_block.attentions.0.to_q", "to_q", True),
    ("mid_block.attentions.0.to_q", "attentions", True),
    ("mid_block.attentions.0.to_q", "*.to_?", True),
    ("mid_block.attentions.0.to_q", "mid", False),
    ("mid_block.attentions.0.to_q", "to", False),
    ("mid_block.attentions.10.to_q", "mid_block.attentions.1", False),
    ("mid_block.attentions.0.to_q", "to_k", False),
]


@pytest.mark.parametrize(("name", "pattern", "expected"), MATCHES, ids=[pattern for _, pattern, _ in MATCHES])
def test_patterns_are_names_parts_of_names_or_globs(name, pattern, expected):
    assert matches(name, pattern) is expected
    assert PQCADConfig(modules_to_not_convert=[pattern]).is_exempt(name) is expected


def test_a_pattern_that_matches_nothing_is_refused():
    config = PQCADConfig(modules_to_not_convert=["to_q", "typo"])
    with pytest.raises(ValueError, match=r"modules_to_not_convert: 'typo' matches none of the 2 quantizable layers"):
        config.check_patterns(["a.to_q", "a.to_k"])


def test_weight_spec_is_the_decided_width_and_groups_only_linear_layers():
    config = PQCADConfig(weight_bits_by_module={"a": 3}, group_size=16)
    assert config.weight_spec("a", is_linear=True) == WeightSpec(3, 16)
    assert config.weight_spec("a", is_linear=False) == WeightSpec(3)
    assert PQCADConfig(method="fixed", weight_bits=6).weight_spec("any", is_linear=True) == WeightSpec(6)
    with pytest.raises(ValueError, match="b: the config of this quantized model says nothing about it"):
        config.weight_spec("b", is_linear=True)


@pytest.mark.parametrize("name", DENOISER_COMPONENTS)
def test_pipelines_quantize_the_denoiser_by_default(name):
    config = PQCADConfig(weight_bits=3.5)
    resolved = config._resolve_quant_config(is_diffusers=True, module_name=name)
    assert resolved == config
    assert resolved is not config


@pytest.mark.parametrize("name", ["vae", "text_encoder", "controlnet", None])
def test_pipelines_leave_the_other_components_alone(name):
    assert PQCADConfig()._resolve_quant_config(is_diffusers=name != "text_encoder", module_name=name) is None


def test_components_replace_the_default_choice():
    config = PQCADConfig(components=["vae"])
    assert config.components_to_quantize == ["vae"]
    assert config._resolve_quant_config(module_name="vae") == config
    assert config._resolve_quant_config(module_name="unet") is None
    assert PQCADConfig().components_to_quantize is None  # else diffusers warns about every component that is absent


@pytest.mark.parametrize("components", ["all", ["all"]], ids=["the word", "a list"])
def test_all_components_are_the_denoiser_the_text_encoders_and_the_vae(components):
    settings = {"activation_bits": 7, "search_all_modules": True}
    config = PQCADConfig(weight_bits=3.5, components=components, modules_to_not_convert=["to_q"], **settings)
    others = PQCADConfig(method="fixed", weight_bits=8, **settings)
    denoiser = PQCADConfig(weight_bits=3.5, modules_to_not_convert=["to_q"], **settings)
    assert config.components_to_quantize is None  # else diffusers warns that there is no component of this name
    assert PQCADConfig.from_dict(config.to_dict()) == config
    for name, expected in {
        **dict.fromkeys(("unet", "transformer", "transformer_2", "prior"), denoiser),
        **dict.fromkeys(("vae", "vqvae", "movq", "text_encoder", "text_encoder_2", "text_encoder_3"), others),
        **dict.fromkeys(("safety_checker", "image_encoder", "controlnet"), None),
    }.items():
        assert config._resolve_quant_config(is_diffusers=True, module_name=name) == expected, name


def test_beside_the_denoiser_the_largest_allowed_width_is_taken():
    config = PQCADConfig(weight_bits=3, bit_choices=(6, 4, 3), group_size=4, components="all")
    assert config.for_component("unet") == PQCADConfig(weight_bits=3, bit_choices=(6, 4, 3), group_size=4)
    assert config.for_component("vae") == PQCADConfig(method="fixed", weight_bits=6)
    fixed = PQCADConfig(method="fixed", weight_bits=4, components="all")
    assert fixed.for_component("unet") == PQCADConfig(method="fixed", weight_bits=4)
    assert fixed.for_component("text_encoder") == PQCADConfig(method="fixed", weight_bits=8)


def test_a_transformers_component_is_quantized_only_by_name():
    for config, expected in ((PQCADConfig(), None), (named := PQCADConfig(components=["text_encoder"]), named)):
        assert config._resolve_quant_config(is_diffusers=False, module_name="text_encoder") == expected


def test_the_method_survives_pickle_as_the_same_member():
    assert pickle.loads(pickle.dumps(PQCADMethod.PQCAD)) is PQCADMethod.PQCAD
