"""Specification of `pqcad env`: what a bug report needs, and no secret."""

import json

import torch
from command_line import answer

from diffusers_pqcad import __version__, kernels
from diffusers_pqcad.cli import env
from diffusers_pqcad.kernels import native

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY")


def test_it_says_what_a_report_needs_and_no_token(capsys, monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, "hf_geheim")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:hf_geheim@hub")
    monkeypatch.setenv("CFLAGS", "-O2")
    found = answer(capsys, "env", "--json")
    document = found.document
    assert found.code == 0
    assert "geheim" not in found.out + found.err
    assert document["packages"]["torch"] == torch.__version__
    assert document["packages"]["diffusers-pqcad"] == __version__
    assert document["variables"]["CFLAGS"] == "-O2"
    assert document["computer"]["num_threads"] == torch.get_num_threads()
    assert document["cache"]["folder"] == str(native.cache_folder())
    assert (document["compiler"] or {}).get("path") == native.compiler()
    assert set(document["kernels"]) == set(env.kinds())


def test_the_text_is_the_same_as_lists_of_markdown(capsys):
    found = answer(capsys, "env")
    assert f"- torch: {torch.__version__}" in found.out
    assert f"- cache: {native.cache_folder()}, " in found.out
    assert "\nKernels, by kind of layer:\n- linear: " in found.out
    assert "- convolution in three dimensions: reference; not x86: " in found.out


def test_each_kind_of_layer_has_the_kernel_that_it_would_take():
    for name, kind in env.kinds().items():
        found = env.kernel_of(kind)
        faster = list(kernels.KERNELS)[: list(kernels.KERNELS).index(found["kernel"])]
        assert list(found["faster_ones"]) == faster, name
    assert env.kernel_of(env.kinds()["any layer, activations in floating point"]) == {
        "kernel": "reference",
        "faster_ones": dict.fromkeys(("x86", "onednn"), "its activations stay in floating point"),
    }


def test_a_forced_kernel_is_the_one_that_is_taken():
    with kernels.use("reference"):
        assert env.kernel_of(env.kinds()["linear"])["kernel"] == "reference"


def test_without_a_compiler_and_with_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda: None)
    monkeypatch.setattr(env, "PACKAGES", ["torch", "no-such-package"])
    found = env.facts()
    assert found["compiler"] is None
    assert found["packages"]["no-such-package"] is None
    text = env.text_of(json.loads(json.dumps(found)))
    assert "- compiler: none" in text
    assert "- no-such-package: not installed" in text
