"""Specification of the resume files: exact, atomic, and refused when damaged; and of the fingerprint of a model."""

import copy
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_pqcad.compression.checkpoint import (
    NotWrittenError,
    check_request,
    clone_state,
    copy_state_,
    load_checkpoint,
    model_hash,
    save_checkpoint,
    write_text,
)

pytestmark = pytest.mark.fast

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]
tensors = st.builds(
    lambda dtype, shape, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype),
    st.sampled_from(DTYPES),
    st.sampled_from([(), (0,), (3,), (2, 3), (2, 1, 2)]),
    st.integers(0, 99),
)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text("ab/.", max_size=4) | st.integers(0, 3)
values = st.recursive(
    scalars | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def equal(a, b) -> bool:
    """Equality of nested values: same types, same dtypes, same bits."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@given(state=st.dictionaries(keys, values, max_size=4))
def test_what_is_loaded_is_what_was_saved(tmp_path_factory: pytest.TempPathFactory, state: dict) -> None:
    path = tmp_path_factory.mktemp("checkpoint") / "state.safetensors"
    save_checkpoint(path, state)
    assert equal(load_checkpoint(path), state)


def test_names_that_would_collide_as_paths_are_kept_apart(tmp_path: Path) -> None:
    state = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)}
    save_checkpoint(tmp_path / "state", state)
    assert equal(load_checkpoint(tmp_path / "state"), state)


def test_tuples_come_back_as_lists_and_infinities_as_they_were(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "state", {"pair": (1, torch.ones(2)), "inf": float("inf")})
    loaded = load_checkpoint(tmp_path / "state")
    assert loaded["pair"][0] == 1
    assert torch.equal(loaded["pair"][1], torch.ones(2))
    assert loaded["inf"] == float("inf")


def test_state_of_adam_survives_with_its_integer_keys(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "state", optimizer.state_dict())
    loaded = load_checkpoint(tmp_path / "state")
    assert list(loaded["state"]) == [0, 1]
    assert torch.equal(loaded["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_loaded_tensors_are_fresh_memory_and_views_are_saved_whole(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    save_checkpoint(tmp_path / "state", {"column": whole[:, 1], "again": whole[:, 1]})
    loaded = load_checkpoint(tmp_path / "state")
    loaded["column"].zero_()
    assert torch.equal(loaded["again"], torch.tensor([1.0, 5.0, 9.0]))
    assert torch.equal(load_checkpoint(tmp_path / "state")["column"], torch.tensor([1.0, 5.0, 9.0]))


@pytest.mark.parametrize("value", [{1, 2}, object(), nn.ReLU(), b"bytes"], ids=["set", "object", "module", "bytes"])
def test_other_types_are_refused_by_name(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="/outer/inner"):
        save_checkpoint(tmp_path / "state", {"outer": {"inner": value}})
    assert not list(tmp_path.iterdir())


def test_a_kill_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "state.safetensors"
    path.parent.mkdir()
    save_checkpoint(path, {"step": 1, "weight": torch.ones(3)})

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2, "weight": torch.zeros(3)})
    assert load_checkpoint(path)["step"] == 1
    monkeypatch.undo()
    save_checkpoint(path, {"step": 3})  # what the kill left behind is in nobody's way
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"]


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """Let no file be larger inside the block: the system refuses to write it, as it does on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path, text = tmp_path / "state.safetensors", tmp_path / "log.json"
    save_checkpoint(path, {"step": 1})
    write_text(text, "old")
    with disk_of(4096):
        with pytest.raises(NotWrittenError, match=r"state\.safetensors: .*the disk is full .*is as it was.*goes on"):
            save_checkpoint(path, {"step": 2, "weight": torch.zeros(100_000)})
        with pytest.raises(NotWrittenError, match=r"log\.json: .*the disk is full"):
            write_text(text, "new" * 100_000)
        with pytest.raises(NotWrittenError, match="There was none before"):
            write_text(tmp_path / "other.json", "new" * 100_000)
    assert load_checkpoint(path) == {"step": 1}
    assert text.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {path.name, text.name}


def test_a_folder_that_is_gone_is_named_and_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "state.safetensors"
    path.parent.mkdir()
    save_checkpoint(path, {"step": 1})
    shutil.rmtree(path.parent)
    for save in (lambda: save_checkpoint(path, {"step": 2}), lambda: write_text(path, "text")):
        with pytest.raises(NotWrittenError, match=r"the folder .*run is gone\. Bring it back"):
            save()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_matter_of_room_is_raised_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, {"weight": torch.ones(64)})
    whole = path.read_bytes()
    for length in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="state.safetensors.*damaged"):
            load_checkpoint(path)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, {"weight": torch.ones(64)})
    damaged = bytearray(path.read_bytes())
    damaged[-7] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="state.safetensors.*damaged"):
        load_checkpoint(path)


def test_an_edited_structure_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, {"step": 1, "weight": torch.ones(2)})
    with safe_open(path, "pt") as file:
        metadata, contents = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert json.loads(metadata["structure"])
    save_file(contents, path, metadata=metadata | {"structure": metadata["structure"].replace("1", "2", 1)})
    with pytest.raises(ValueError, match="state.safetensors.*damaged"):
        load_checkpoint(path)


def test_a_file_of_another_program_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="foreign.safetensors: not a file of this package"):
        load_checkpoint(tmp_path / "foreign.safetensors")


def test_copy_state_keeps_memory_and_demands_the_same_keys() -> None:
    layer = nn.Linear(3, 2)
    state, address = clone_state(layer), layer.weight.data_ptr()
    with torch.no_grad():
        layer.weight.add_(1)
    assert not torch.equal(state["weight"], layer.weight)
    copy_state_(layer, state)
    assert torch.equal(state["weight"], layer.weight)
    assert layer.weight.data_ptr() == address
    with pytest.raises(RuntimeError, match="bias"):
        copy_state_(layer, {"weight": state["weight"]})


def test_model_hash_knows_values_names_shapes_and_dtypes(tiny_unet: nn.Module) -> None:
    reference = model_hash(tiny_unet)
    assert model_hash(copy.deepcopy(tiny_unet)) == reference
    edited = copy.deepcopy(tiny_unet)
    with torch.no_grad():
        edited.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert model_hash(edited) != reference
    assert model_hash(copy.deepcopy(tiny_unet).to(torch.bfloat16)) != reference
    hashes = {model_hash(nn.Linear(*shape)) for shape in ((2, 3), (3, 2), (6, 1))}
    assert len(hashes) == 3


def test_model_hash_takes_scalars_and_empty_tensors() -> None:
    model = nn.Module()
    model.register_buffer("scalar", torch.tensor(2.0))
    model.register_buffer("empty", torch.zeros(0))
    assert len(model_hash(model)) == 64


def test_a_resume_file_of_another_request_is_refused_with_the_difference(tmp_path: Path) -> None:
    saved = {"request": json.dumps({"bits": 4, "seed": 0, "only there": [1]})}
    check_request(tmp_path / "resume", saved, {"bits": 4, "seed": 0, "only there": (1,)})  # as JSON stores it
    with pytest.raises(ValueError, match=r"resume was begun with other settings.*'bits': \(4, 3\)") as refusal:
        check_request(tmp_path / "resume", saved, {"bits": 3, "seed": 0, "only here": 2})
    assert "'only there': ([1], None)" in str(refusal.value)
    assert "'only here': (None, 2)" in str(refusal.value)
    assert "seed" not in str(refusal.value)
    with pytest.raises(ValueError, match="begun with other settings"):
        check_request(tmp_path / "resume", {"trajectory": 0}, {"bits": 4})  # another kind of file


def test_a_kill_while_writing_a_text_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "row.json"
    write_text(path, "old")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["row.json"]
