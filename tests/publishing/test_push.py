"""Specification of pushing: only publishable files leave through the real client, and they come back the same."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build_tiny_scheduler, build_tiny_unet
from diffusers import DDIMPipeline
from safetensors.torch import load, load_file
from stub_hub import StubHub

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.publishing.hub import END, START, write_card
from diffusers_pqcad.publishing.pushing import without_places

ROOT = Path(__file__).parents[2]
TOKEN = StubHub.token
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SAVED = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS}  # by the pipeline
BESIDE = {"recipe.yaml", "metrics.json", "history.json", "assets/samples.png"}
PRIVATE = {
    "state/x.safetensors",
    "state/models/pq/config.json",
    "state/models/pq/diffusion_pytorch_model.safetensors",
    "state/rows/pq.json",
    "checkpoint-100/pq_cad.safetensors",
    "validation/pq_cad-000100.png",
    "logs/pqcad-compress/events.out.tfevents.1",
    "state/pq_cad-log.jsonl",
    "unet/diffusion_pytorch_model.safetensors.partial",
    "model.partial",
    "optimizer.pt",
    "unet/weights.bin",
    "pickle.pkl",
    ".env",
    "notes.txt",
    "assets/raw.npy",
}
PUSH = """
import sys
from diffusers_pqcad.publishing import pushing
pushing.check_access()
for folder in sys.argv[1:]:
    print(pushing.push(folder, "me/model", private=True))
"""
# A Hub in the same process as its client, so that each of its faults costs no import of the package.
FAULTS = """
import contextlib, io, json, os, pathlib, sys, time
from stub_hub import Fault, StubHub
folder, faults = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
time.sleep = lambda seconds: None  # the client waits before it tries again
found = {}
with StubHub() as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from diffusers_pqcad.cli.main import main
    def push(repo):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = main(["push", str(folder), repo, "--hub_private_repo"])
        here = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        there = hub.files(repo) if repo in hub.repos else {}
        return {"code": code, "err": err.getvalue(), "commits": len(hub.repos[repo].commits) if there else 0,
                "is_whole": {**there, ".gitattributes": b""} == {**here, ".gitattributes": b""}}
    for name, (request, status) in faults.items():
        repo = f"me/{name}"
        hub.faults = [Fault(request.replace("REPO", repo), status)]
        before = push(repo)
        hub.faults = []
        puts = sum(request.method == "PUT" for request in hub.requests)
        found[name] = [before, push(repo), sum(request.method == "PUT" for request in hub.requests) - puts]
        hub.objects.clear()
    import diffusers_pqcad
    from diffusers import DDIMPipeline
    from diffusers_pqcad.publishing.hub import START
    def card_of(repo):
        return {"card": hub.files(repo)["README.md"].decode(), "commits": len(hub.repos[repo].commits),
                "files": sorted(hub.files(repo)),
                "places": [name for name, data in hub.files(repo).items() if sys.argv[3].encode() in data]}
    DDIMPipeline.from_pretrained(sys.argv[3]).push_to_hub("me/pipeline")
    found["pipeline"] = [card_of("me/pipeline")]
    hub.repos["me/pipeline"].add({"README.md": hub.files("me/pipeline")["README.md"] + b"My own words."})
    again = DDIMPipeline.from_pretrained("me/pipeline")
    again.push_to_hub("me/pipeline")
    found["pipeline"].append(card_of("me/pipeline"))
    again.unet.dequantize()
    again.push_to_hub("me/float")
    found["float"] = card_of("me/float")
    hub.repos["me/public"] = type(hub.repos["me/cut"])(private=False)
    found["public"] = push("me/public")
    assert not hub.unexpected, hub.unexpected
print(json.dumps(found))
"""
# By name: the request that fails, what it gets, a part of the message.
FAILURES = {
    "unknown": ("GET /api/whoami-v2", 401, "log in with `hf auth login`"),
    "forbidden": ("POST /api/repos/create", 403, "that your token has the role 'write'"),
    "conflict": ("POST /api/models/REPO/commit", 409, "Another change of the repository is in the way"),
    "busy": ("POST /api/models/REPO/preupload", 429, "too many requests for the Hub: wait some minutes"),
    "broken": ("POST /api/models/REPO/commit", 500, "The Hub has a fault of its own: wait some minutes"),
    "cut": ("PUT /storage/", 0, "The connection failed: check the network"),
}
LOAD = """
import sys
import diffusers_pqcad
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
save_file(DiffusionPipeline.from_pretrained("me/model").unet.state_dict(), sys.argv[1])
"""


@pytest.fixture
def hub():
    with StubHub() as hub:
        yield hub


@pytest.fixture
def client(tmp_path):
    """Runs code as a user of a Hub does; see `client_in`."""
    return client_in(tmp_path)


def client_in(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return what runs code as a user of a Hub: its client reads its settings as it is imported: in a new process."""

    def run(url: str, code: str, *arguments: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": url,
            "HF_TOKEN": token,
            "HF_HOME": tempfile.mkdtemp(dir=tmp_path),  # nothing comes from an earlier process's cache
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=others | settings, capture_output=True, text=True, check=False, timeout=200)

    return run


def succeeded(result: subprocess.CompletedProcess[str], hub: StubHub) -> str:
    """What the process printed; it has asked for nothing that the stub does not know."""
    assert not hub.unexpected
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return result.stdout


def write_results(folder: Path, sqnr: str) -> None:
    matter = "---\nlibrary_name: diffusers\nbase_model: a/teacher\nbase_model_relation: quantized\n---\n"
    write_card(folder, f"{matter}{START}\nSQNR: {sqnr} dB\n{END}\n")


def bytes_of(folder: Path, names: set[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def pushed(hub: StubHub) -> dict[str, bytes]:
    """The files of the model at the stub, less the one that every new repository has."""
    return {name: data for name, data in hub.files("me/model").items() if name != ".gitattributes"}


def test_only_publishable_files_leave_and_the_model_loads_from_the_hub(
    hub: StubHub, client, tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    quantize_(tiny_pipeline.unet, PQCADConfig())
    tiny_pipeline.save_pretrained(folder)
    write_results(folder, "17.17")
    for name in BESIDE | PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(range(256)) + name.encode())
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}")

    assert succeeded(client(hub.url, PUSH, folder), hub) == f"{hub.url}/me/model\n"
    assert "/api/whoami-v2" in [request.path for request in hub.requests]  # access is checked, and a good token has it
    assert pushed(hub) == bytes_of(folder, SAVED | BESIDE | {"README.md"})
    assert list(hub.objects.values()) == [pushed(hub)[WEIGHTS]]
    assert hub.repos["me/model"].private
    sent = [request.body for request in hub.requests] + list(hub.files("me/model").values())
    assert not any(TOKEN.encode() in data for data in sent)

    succeeded(client(hub.url, LOAD, tmp_path / "loaded.safetensors"), hub)
    loaded, expected = load_file(tmp_path / "loaded.safetensors"), load(pushed(hub)[WEIGHTS])
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_pushing_again_replaces_what_changed(hub: StubHub, client, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "unet").mkdir(parents=True)
    (first / WEIGHTS).write_bytes(b"weights")
    write_results(first, "17.17")
    shutil.copytree(first, second)
    write_results(second, "18.28")
    urls = succeeded(client(hub.url, PUSH, first, second), hub).split()

    assert urls == [f"{hub.url}/me/model"] * 2
    assert list(hub.repos) == ["me/model"]
    created, *commits = hub.repos["me/model"].commits.values()  # the first comes with the repository
    assert [commit.items() - created.items() for commit in commits] == [
        bytes_of(folder, {"README.md", WEIGHTS}).items() for folder in (first, second)
    ]
    assert b"SQNR: 18.28 dB" in pushed(hub)["README.md"]
    assert sum(request.method == "PUT" for request in hub.requests) == 1  # weights that are there are not sent again


@pytest.mark.parametrize("reason", ["bad token", "no server"])
def test_without_access_there_is_advice_and_no_token(hub: StubHub, client, reason: str) -> None:
    token = "hf_wrong" if reason == "bad token" else TOKEN
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    result = client(hub.url if reason == "bad token" else nobody, PUSH, token=token)
    assert not hub.unexpected
    assert result.returncode == 1
    assert not hub.repos
    assert result.stderr.count("Traceback") == 1  # the client's own errors are not the user's
    message = result.stderr[result.stderr.index("HubError: ") :]
    assert ("Invalid user token" if reason == "bad token" else "ConnectError") in message
    assert "hf auth login" in message
    assert "without --push_to_hub" in message
    assert token not in result.stdout + result.stderr


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, Any]:
    """What `pqcad push` of 11 MB comes to while the Hub has each fault, and what the same command does next."""
    folder = tmp_path_factory.mktemp("pushes") / "small"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("My own words.\n")
    (folder / WEIGHTS).write_bytes(os.urandom(11 * 2**20))
    faults = json.dumps({name: failure[:2] for name, failure in FAILURES.items()})
    small = tmp_path_factory.mktemp("pipelines") / "small"
    DDIMPipeline(quantize_(build_tiny_unet(), PQCADConfig()), build_tiny_scheduler()).save_pretrained(small)
    noted = {"source": "someone/some-model", "source_from": "hub", "base_license": {"license": "mit"}}
    (small / "quantization.json").write_text(json.dumps(noted))
    run = client_in(tmp_path_factory.mktemp("clients"))
    result = run("http://127.0.0.1:9", FAULTS, folder, faults, small)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_no_place_of_this_computer_leaves_it(tmp_path: Path, name: str) -> None:
    """diffusers notes in these files where a pipeline was loaded from."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for place in (str(tmp_path), "/no/longer/there"):
        path.write_text(json.dumps({"a": [1], "_name_or_path": place}))
        assert json.loads(without_places(path)) == {"a": [1]}
    for place in ({"_name_or_path": "someone/some-model"}, {}):
        path.write_text(json.dumps({"a": [1]} | place))
        assert without_places(path) == str(path)


@pytest.mark.parametrize("name", FAILURES)
def test_a_push_that_fails_changes_nothing_and_the_same_command_finishes_it(failures, name: str) -> None:
    before, after, uploads = failures[name]
    assert before["code"] == 1
    assert before["commits"] <= 1  # the one that comes with a repository
    message = before["err"].rstrip().rpartition("\n")[2]
    message = message[message.index("pqcad push: ") :]  # a bar may be on this line
    assert FAILURES[name][2] in message
    assert TOKEN not in before["err"] + after["err"]
    assert (after["code"], after["commits"], after["is_whole"]) == (0, 2, True), after["err"]
    assert uploads == (0 if name in ("conflict", "broken") else 1)  # what has arrived is not sent again


def test_push_to_hub_of_a_quantized_pipeline_leaves_a_card_with_what_is_known(failures) -> None:
    first, second = failures["pipeline"]
    matter = yaml.safe_load(first["card"].split("---\n")[1])
    assert (matter["base_model"], matter["base_model_relation"]) == ("someone/some-model", "quantized")
    assert matter["license"] == "mit"
    assert matter["pipeline_tag"] == "unconditional-image-generation"
    assert "| unet | " in first["card"]
    assert 'from_pretrained("me/pipeline")' in first["card"]
    assert not first["places"]
    assert first["card"].endswith(f"{END}\n")  # and not that of diffusers beside it
    assert set(first["files"]) == SAVED | {".gitattributes", "README.md", "quantization.json"}
    # Loaded from there, it is still that of its base, and words that were written there stay.
    assert second["card"] == first["card"] + "My own words."
    assert second["commits"] == first["commits"] + 2  # those words, and where it was loaded from, in its index


def test_push_to_hub_of_a_float_pipeline_is_that_of_diffusers(failures) -> None:
    assert START not in failures["float"]["card"]
    assert "automatically generated" in failures["float"]["card"]


def test_a_push_that_shall_be_private_does_not_go_to_a_public_repository(failures) -> None:
    found = failures["public"]
    assert (found["code"], found["commits"]) == (1, 1)
    assert "expected a new repository, or a private one, got me/public, which is public" in found["err"]
