"""Models from the Hub: the real huggingface_hub against a server on this machine, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from small_models import SMALL, config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.errors import ModelError
from dinokit.loading import hub
from dinokit.loading.foreign import config_from_timm
from dinokit.loading.zoo import ZOO
from dinokit.model_folder.folder import write_model_folder
from dinokit.model_folder.weights import write_safetensors

# Loads each model named on the command line; one JSON line each with what came of it.
LOAD = """
import json, sys
from dinokit import load_backbone
from dinokit.errors import DinokitError
from PIL import Image
for request in sys.argv[2:]:
    name, _, revision = request.partition("@")
    try:
        backbone = load_backbone(name, device="cpu", revision=revision or None)
        vector = backbone.embed(Image.open(sys.argv[1]))
        said = {
            "vector": vector.tolist(), "name": backbone.name, "engine": backbone.engine,
            "source": backbone.source, "revision": backbone.revision, "sha": backbone.weights_sha256,
        }
    except DinokitError as error:
        said = {"error": str(error), "kind": type(error).__name__, "code": error.exit_code}
    print(json.dumps(said))
assert "torch" not in sys.modules
"""


NOBODY = "http://127.0.0.1:9"  # the port of "discard", where nobody listens


class Client:
    """Runs ``LOAD`` with the server as its Hub and a cache that stays."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        picture().save(folder / "photo.png")

    def load(self, *requests: str, **environment: str) -> list[dict[str, Any]]:
        run = subprocess.run(
            [sys.executable, "-c", LOAD, str(self.folder / "photo.png"), *requests],
            env=self.hub.environment(self.folder / "cache", **environment),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        assert "Traceback" not in run.stderr
        self.output = run.stdout + run.stderr
        return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with HubServer() as hub:
        yield Client(hub, tmp_path)


def test_a_dinokit_folder_its_revisions_and_the_cache(client: Client, tmp_path: Path) -> None:
    first = write_model_folder(tmp_path / "first", config_for(name="first"), random_weights(seed=1))
    second = write_model_folder(tmp_path / "second", config_for(name="second"), random_weights(seed=2))
    old = client.hub.add("user/model", first.path)
    client.hub.add("user/model", first.path, branch="v1")
    new = client.hub.add("user/model", second.path)

    latest, tagged, pinned, wrong = client.load(
        "user/model", "user/model@v1", f"user/model@{old}", "user/model@v9"
    )
    assert (latest["name"], latest["source"], latest["revision"]) == ("second", "user/model", new)
    assert latest["sha"] == second.weights_sha256
    np.testing.assert_allclose(latest["vector"], load_backbone(second.path, device="cpu").embed(picture()))
    assert tagged["name"] == pinned["name"] == "first"
    assert pinned["revision"] == old
    assert (wrong["kind"], wrong["code"]) == ("ModelError", 3)
    assert "user/model has no revision 'v9'" in wrong["error"]
    # neither the copy for transformers nor an ONNX file is fetched: the graph is written from the weights
    fetched = {request.rsplit("/", 1)[1] for request in client.hub.requests if request.startswith("GET")}
    assert fetched == {"config.json", "timm.safetensors", "preprocessor_config.json"}

    # without network: what is in the cache loads, and what is not says why
    asked = len(client.hub.requests)
    cached, other = client.load("user/model", "user/other", HF_HUB_OFFLINE="1")
    assert cached == latest
    assert "HF_HUB_OFFLINE (--offline) forbids fetching it" in other["error"]
    assert len(client.hub.requests) == asked

    # the Hub away though nobody said offline
    (cached,) = client.load("user/model", HF_ENDPOINT=NOBODY)
    assert cached["vector"] == latest["vector"]


def test_a_cache_that_cannot_be_written(client: Client, tmp_path: Path) -> None:
    client.hub.add("user/model", write_model_folder(tmp_path / "m", config_for(), random_weights()).path)
    (tmp_path / "file").touch()
    (said,) = client.load("user/model", HF_HOME=str(tmp_path / "file" / "cache"))
    assert said["code"] == 3
    assert "could not be stored in the Hub's cache (" in said["error"] and "[Errno" not in said["error"]
    assert said["error"].endswith("a folder that can be written and has room")
    assert "Not a directory); set HF_HOME to a folder that can be written" in said["error"]


@pytest.mark.slow  # huggingface_hub tries for 23 seconds
def test_no_network_and_not_in_the_cache(client: Client) -> None:
    named, known = client.load("user/other", HF_ENDPOINT=NOBODY) + client.load(
        "dino_vits8", HF_ENDPOINT=NOBODY
    )
    assert "config.json of user/other is not in the cache and the Hub cannot be reached" in named["error"]
    assert "model.safetensors of timm/vit_small_patch8_224.dino is not in the cache" in known["error"]


def test_what_is_missing_or_closed(client: Client, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "folder", config_for(), random_weights())
    files = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    client.hub.add("user/gated", files, gated=True)
    client.hub.add("user/empty", {"README.md": b"# nothing"})
    client.hub.add("user/half", {k: v for k, v in files.items() if k != "timm.safetensors"})
    client.hub.add("user/newer", files | {"config.json": b'{"dinokit": {"format_version": 7}}'})
    client.hub.add("user/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b""})
    client.hub.add("user/pickle", {"config.json": b'{"model_type": "vit"}', "pytorch_model.bin": b""})
    expected = {
        "user/nowhere": "the Hub has no repository user/nowhere, or it is private",
        "user/gated": "user/gated is gated: its owner requires you to accept its terms",
        "user/empty": "user/empty has no file config.json",
        "user/half": "has no file timm.safetensors",
        "user/newer": "the folder has format_version 7",
        "user/bert": "has model_type 'bert'",
        "user/pickle": "has no model.safetensors; pickled weights are not loaded",
    }
    secret = "hf_" + "s3cret" * 6
    answers = client.load(*expected, HF_TOKEN=secret)
    for (name, message), said in zip(expected.items(), answers, strict=True):
        assert message in said["error"], name
        assert said["code"] == 3
    assert "No file or folder here is called user/nowhere" in answers[0]["error"]
    assert "No file or folder" not in answers[1]["error"]  # there is such a model
    assert not any("bert/resolve" in r and "safetensors" in r for r in client.hub.requests)
    assert f"Bearer {secret}" in client.hub.tokens  # it was used,
    assert secret not in client.output  # and never shown


def test_a_repository_of_timm_keeps_timms_crop(client: Client, tmp_path: Path) -> None:
    """The form of timm/vit_small_patch16_224.dino, smaller."""
    values = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "global_pool": "token",
        "model_args": {"num_heads": 3},
        "pretrained_cfg": {
            "tag": "dino",
            "input_size": [3, 32, 32],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    }
    write_safetensors(tmp_path / "w", random_weights())
    client.hub.add(
        "timm/small.dino",
        {"config.json": json.dumps(values).encode(), "model.safetensors": (tmp_path / "w").read_bytes()},
    )
    (said,) = client.load("timm/small.dino")
    shapes = {name: array.shape for name, array in random_weights().items()}
    config = config_from_timm(values, shapes, source="timm/small.dino")
    assert config.preprocessing.resize_px == 35
    same = write_model_folder(tmp_path / "same", config, random_weights())
    assert said["engine"] == "onnx"
    np.testing.assert_allclose(said["vector"], load_backbone(same.path, device="cpu").embed(picture()))


def test_a_known_name_without_torch(client: Client, tmp_path: Path) -> None:
    """dino_vits16 itself, its weights random: fetched from its repository, run by ONNX, then from the cache."""
    known = ZOO["dino_vits16"]
    weights = random_weights(known.vit)
    write_safetensors(tmp_path / "w", weights, dtype="float16")
    commit = client.hub.add(known.repo, {"model.safetensors": (tmp_path / "w").read_bytes()})
    (said,) = client.load("dino_vits16")
    assert (said["name"], said["engine"]) == ("dino_vits16", "onnx")
    assert (said["source"], said["revision"]) == (known.repo, commit)
    assert {request.split()[1] for request in client.hub.requests if "resolve" in request} == {
        f"/{known.repo}/resolve/main/model.safetensors"
    }
    folder = write_model_folder(tmp_path / "folder", known.config, weights, dtype="float16")
    truth = load_backbone(folder.path, device="cpu").embed(picture())
    np.testing.assert_allclose(said["vector"], truth, atol=1e-5)
    (again,) = client.load("dino_vits16", HF_HUB_OFFLINE="1")
    assert again == said


def test_the_server_takes_what_the_client_pushes(client: Client, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "folder", config_for(), random_weights(SMALL))
    code = """
import sys
import types
from huggingface_hub import HfApi
api = HfApi(token="hf_test")
api.create_repo("me/pushed"); api.create_repo("me/pushed", exist_ok=True)
print(api.upload_folder(repo_id="me/pushed", folder_path=sys.argv[1]).oid)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder.path)],
        env=client.hub.environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    (said,) = client.load("me/pushed")
    assert said["revision"] == run.stdout.split()[-1]
    assert said["sha"] == folder.weights_sha256


def test_a_hub_that_cannot_be_asked_has_not_said_no(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, errors

    def away(repo: str, filename: str, *, revision: str | None = None) -> Path:
        raise ModelError("cannot be reached") from errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(hub, "hub_file", away)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match="cannot be reached"):
        hub.optional_hub_file("user/model", "timm.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nobody is to be asked
    assert hub.optional_hub_file("user/model", "timm.safetensors") is None


def test_the_commit_of_a_cached_file() -> None:
    repo = Path("/mnt/snapshots/hub/models--a--b/snapshots")
    assert hub.commit_of(repo / "abc123" / "onnx" / "model.onnx") == "abc123"
    assert hub.commit_of(Path("/models/a/config.json")) is None


class _OfHttpx(Exception):
    """As httpx's errors (huggingface_hub 1.0 and later), which are plain exceptions."""

    __module__ = "httpx"


class _OfRequests(OSError, ValueError):
    """As those of requests (huggingface_hub before 1.0), which are OSErrors and may be ValueErrors."""

    __module__ = "requests.exceptions"


@pytest.mark.parametrize("error", [_OfHttpx, _OfRequests, ConnectionResetError])
def test_a_broken_connection_is_no_full_disk(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from dinokit.cli.pull import _snapshot
    from dinokit.export.hub import _errors_in_words

    def broken(*args: object, **options: object) -> None:
        raise error("peer closed connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(ModelError, match=rf"fetching a.txt of me/m broke off \({error.__name__}\)") as caught:
        hub.hub_file("me/m", "a.txt")
    assert not hub.is_there(caught.value)
    with (
        pytest.raises(ModelError, match="the Hub cannot be reached, or the connection broke"),
        _errors_in_words("me/m"),
    ):
        broken()
    monkeypatch.setattr(
        "dinokit.loading.locate.locate", lambda *args, **options: types.SimpleNamespace(revision="1")
    )
    with pytest.raises(ModelError, match=rf"fetching me/m was interrupted \({error.__name__}\)"):
        _snapshot("me/m", None)
