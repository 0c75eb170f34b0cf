"""push and pull: the real huggingface_hub against a server on this machine, the command in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hub_server import HubServer, _Handler
from small_models import config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.cli import cli
from dinokit.errors import ModelError, UsageError
from dinokit.export import plan_push, push_to_hub
from dinokit.files.checksums import sha256_of
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import DATA_KEY, METADATA_KEY, contract
from dinokit.model_folder.folder import read_model_folder, write_model_folder
from dinokit.model_folder.weights import write_safetensors
from dinokit.pictures.preprocess import Preprocessing
from dinokit.vit_graph import build_vit_graph

TOKEN = "hf_" + "s3cret" * 6
NOBODY = "http://127.0.0.1:9"  # the port of "discard", where nobody listens
RUN = "import sys; from dinokit.cli import cli; cli(sys.argv[1:])\n"
NO_TORCH = "import sys; sys.modules['torch'] = None; sys.modules['timm'] = None\n"


class Client:
    """The command `dinokit` with the server as its Hub, a token and a cache of its own."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder = hub, folder

    def run(self, *args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        extra = {"HF_TOKEN": TOKEN, **environment}
        done = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", "-c", NO_TORCH + RUN, *map(str, args)],
            env=self.hub.environment(self.folder / "cache", **extra),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with HubServer() as hub:
        hub.owners = {TOKEN: "me"}
        yield Client(hub, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder with ONNX, a report, and things that should not travel."""
    path = tmp_path / "shoes"
    model = write_model_folder(path, config_for(name="shoes"), random_weights(seed=1))
    metadata = {METADATA_KEY: json.dumps(contract(model.config, model.weights_sha256))}
    graph = build_vit_graph(model.config.vit, model.load_weights(), metadata=metadata)
    (path / "onnx").mkdir()
    (path / "onnx" / "model.onnx").write_bytes(graph.SerializeToString())
    (path / "export_report.json").write_text("{}\n")
    (path / ".env").write_text("PASSWORD=1")
    (path / "optimizer.pth").write_bytes(b"pickle")
    return path


def sent(folder: Path) -> dict[str, bytes]:
    """What a push should send of the fixture."""
    names = (
        "README.md",
        "config.json",
        "export_report.json",
        "model.safetensors",
        "onnx/model.onnx",
        "preprocessor_config.json",
        "timm.safetensors",
    )
    return {name: (folder / name).read_bytes() for name in names}


def on_hub(client: Client, repo: str = "me/shoes", branch: str = "main") -> dict[str, bytes]:
    stored = client.hub.repos[repo]
    return {k: v for k, v in stored.commits[stored.refs[branch]].items() if k != ".gitattributes"}


@pytest.mark.parametrize("lfs_from", [None, 10_000], ids=["regular", "lfs"])
def test_push_pull_and_the_same_model(client: Client, folder: Path, lfs_from: int | None) -> None:
    client.hub.lfs_from = lfs_from
    pushed = client.run("push", folder, "me/shoes", "--json")
    assert pushed.returncode == 0, pushed.stderr
    said = json.loads(pushed.stdout)
    assert on_hub(client) == sent(folder)
    assert said["commit"] == client.hub.repos["me/shoes"].refs["main"]
    assert (said["url"], said["card"]) == (f"{client.hub.url}/me/shoes", "sent")
    assert "Not sent: .env (hidden, a pickle, or a link out of the folder)" in pushed.stderr
    assert "Not sent: optimizer.pth" in pushed.stderr
    large = {name for name, data in sent(folder).items() if data in client.hub.large.values()}
    weights = {"model.safetensors", "onnx/model.onnx", "timm.safetensors"}
    assert large == (weights if lfs_from else set())
    assert f"Bearer {TOKEN}" in client.hub.tokens

    back = client.folder / "back"
    pulled = client.run("pull", "me/shoes", "-o", back)
    assert pulled.returncode == 0, pulled.stderr
    assert Path(pulled.stdout.strip()) == back
    for name, data in sent(folder).items():
        assert (back / name).read_bytes() == data, name
        assert not (back / name).is_symlink()
    before, after = (load_backbone(path, device="cpu").embed(picture()) for path in (folder, back))
    np.testing.assert_array_equal(before, after)

    # from the cache, without network, and where it is
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"DINOKIT_OFFLINE": "1"}):
        asked = len(client.hub.requests)
        refused = client.run("pull", "me/other", **offline)
        assert refused.returncode == 3 and "--offline" in refused.stderr
        assert len(client.hub.requests) == asked
    cached = client.run("pull", "me/shoes", "--json", HF_HUB_OFFLINE="1")
    assert cached.returncode == 0, cached.stderr
    where = json.loads(cached.stdout)
    assert where["revision"] == said["commit"]
    assert read_model_folder(where["path"]).config.name == "shoes"

    # what the Hub has is not sent again
    asked = len(client.hub.requests)
    again = client.run("push", folder, "me/shoes", "--json")
    assert json.loads(again.stdout)["card"] == "same"
    assert not any(request.startswith("PUT") for request in client.hub.requests[asked:])
    assert on_hub(client) == sent(folder)


def test_an_edited_card_is_kept(client: Client, folder: Path) -> None:
    assert client.run("push", folder, "me/shoes").returncode == 0
    # ours on the Hub: replaced
    write_model_folder(folder, config_for(name="boots"), random_weights(seed=2))
    second = client.run("push", folder, "me/shoes", "--json")
    assert json.loads(second.stdout)["card"] == "sent"
    assert on_hub(client)["README.md"] == (folder / "README.md").read_bytes()
    assert b"# boots" in on_hub(client)["README.md"]

    # edited by a person on the Hub: kept, and all the rest goes
    mine = on_hub(client)["README.md"] + b"\nWritten by hand.\n"
    client.hub.add("me/shoes", on_hub(client) | {"README.md": mine})
    write_model_folder(folder, config_for(name="hats"), random_weights(seed=3))
    third = client.run("push", folder, "me/shoes", "--json")
    assert json.loads(third.stdout)["card"] == "kept"
    assert "README.md on the Hub was edited by hand and is kept" in third.stderr
    assert on_hub(client)["README.md"] == mine
    assert on_hub(client)["timm.safetensors"] == (folder / "timm.safetensors").read_bytes()

    # and still kept the next time, though dinokit's own config lies beside it
    assert json.loads(client.run("push", folder, "me/shoes", "--json").stdout)["card"] == "kept"
    forced = client.run("push", folder, "me/shoes", "--json", "--overwrite-card")
    assert json.loads(forced.stdout)["card"] == "sent"
    assert on_hub(client)["README.md"] == (folder / "README.md").read_bytes()

    # a card in a repository that dinokit did not make is a person's
    client.hub.add("me/old", {"README.md": b"# My own page\n"})
    assert json.loads(client.run("push", folder, "me/old", "--json").stdout)["card"] == "kept"
    assert on_hub(client, "me/old")["README.md"] == b"# My own page\n"


def test_figures_stay_while_an_edited_card_shows_them(client: Client, folder: Path) -> None:
    assert client.run("push", folder, "me/shoes").returncode == 0
    edited = {"README.md": b"# Mine\n![](figures/attention.png)\n", "figures/attention.png": b"drawn"}
    client.hub.add("me/shoes", on_hub(client) | edited)
    write_model_folder(folder, config_for(name="boots"), random_weights(seed=2))
    assert client.run("push", folder, "me/shoes").returncode == 0
    assert edited.items() <= on_hub(client).items()
    write_model_folder(folder, config_for(name="hats"), random_weights(seed=3))
    assert client.run("push", folder, "me/shoes", "--overwrite-card").returncode == 0
    assert "figures/attention.png" not in on_hub(client)
    assert on_hub(client)["README.md"] == (folder / "README.md").read_bytes()


def test_a_commit_of_somebody_else_meanwhile_is_not_undone(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.run("push", folder, "me/shoes").returncode == 0
    write_model_folder(folder, config_for(name="boots"), random_weights(seed=2))
    right = _Handler._preupload

    def edited_first(handler: Any, files: Any) -> None:  # after the card was looked at, before the commit
        client.hub.add("me/shoes", on_hub(client) | {"README.md": b"# Mine\n"})
        right(handler, files)

    monkeypatch.setattr(_Handler, "_preupload", edited_first)
    refused = client.run("push", folder, "me/shoes")
    assert refused.returncode == 3 and "me/shoes changed during the push" in refused.stderr
    assert on_hub(client)["README.md"] == b"# Mine\n"


@pytest.mark.parametrize("lfs_from", [None, 10_000], ids=["regular", "lfs"])
def test_files_of_other_weights_do_not_stay(client: Client, folder: Path, lfs_from: int | None) -> None:
    client.hub.lfs_from = lfs_from
    assert client.run("push", folder, "me/shoes").returncode == 0
    extra = {"onnx/model_q4.onnx": b"by hand", "figure.png": b"by hand"}
    client.hub.add("me/shoes", on_hub(client) | extra)
    (folder / "onnx" / "model.onnx").unlink()
    same = client.run("push", folder, "me/shoes", "--json")  # the same weights: all that is there still fits
    assert (same.returncode, json.loads(same.stdout)["removed"]) == (0, [])
    assert {"onnx/model.onnx", *extra} <= set(on_hub(client))

    write_model_folder(folder, config_for(name="boots"), random_weights(seed=2))
    other = client.run("push", folder, "me/shoes", "--json")
    assert sorted(json.loads(other.stdout)["removed"]) == ["onnx/model.onnx", "onnx/model_q4.onnx"]
    assert (
        "Removed from the Hub: onnx/model.onnx (it belonged to other weights or preprocessing)"
        in other.stderr
    )
    assert not any(name.startswith("onnx/") for name in on_hub(client))
    assert on_hub(client)["figure.png"] == b"by hand"
    back = client.folder / "back"
    assert client.run("pull", "me/shoes", "-o", back).returncode == 0
    assert load_backbone(back, device="cpu").name == "boots"


def test_files_for_other_pixels_do_not_stay(client: Client, folder: Path) -> None:
    """Rotary positions do not depend on the size, so another default size leaves the weights as they are."""
    assert client.run("push", folder, "me/shoes").returncode == 0
    extra = {"onnx/model_fp16.onnx": b"x", "onnx/model_fp16.onnx_data": b"x", "onnx/model_40x24.onnx": b"x"}
    client.hub.add("me/shoes", on_hub(client) | extra)
    (folder / "onnx" / "model.onnx").unlink()
    config = config_for(name="shoes")
    other = replace(config.preprocessing, resize_px=config.preprocessing.resize_px + 8)
    write_model_folder(folder, replace(config, preprocessing=other), random_weights(seed=1))
    done = client.run("push", folder, "me/shoes", "--json")
    assert done.returncode == 0, done.stderr
    wrong = ["onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_fp16.onnx_data"]
    assert sorted(json.loads(done.stdout)["removed"]) == wrong
    assert "onnx/model_40x24.onnx" in on_hub(client)


def test_a_file_for_one_size_is_pushed(tmp_path: Path) -> None:
    """Its preprocessing is that of its size, not the folder's."""
    config = config_for(name="shoes")
    path = write_model_folder(tmp_path / "shoes", config, random_weights(seed=1)).path
    model = read_model_folder(path)
    (path / "onnx").mkdir()

    def write(preprocessing: Preprocessing) -> None:
        says = contract(replace(config, preprocessing=preprocessing), model.weights_sha256)
        graph = build_vit_graph(config.vit, model.load_weights(), metadata={METADATA_KEY: json.dumps(says)})
        (path / "onnx" / "model_24x40.onnx").write_bytes(graph.SerializeToString())

    write(config.preprocessing.with_image_size((24, 40)))
    assert "onnx/model_24x40.onnx" in plan_push(path, "me/shoes").files
    write(config.preprocessing.with_image_size((40, 24)))
    with pytest.raises(ModelError, match=r"model_24x40\.onnx and the folder differ in preprocessing"):
        plan_push(path, "me/shoes")


def test_branches_pull_requests_privacy_and_runs(client: Client, folder: Path) -> None:
    run = client.folder / "run"
    run.mkdir()
    folder.rename(run / "model")  # a training run
    folder = run / "model"
    assert client.run("push", run, "me/shoes", "--private").returncode == 0
    assert client.hub.repos["me/shoes"].private
    assert on_hub(client) == sent(folder)

    write_model_folder(folder, config_for(name="boots"), random_weights(seed=2))
    old = on_hub(client)
    branch = client.run("push", run, "me/shoes", "--revision", "v2", "--message", "more epochs")
    assert branch.returncode == 0, branch.stderr
    asked = client.run("push", run, "me/shoes", "--create-pr")
    assert asked.stdout.strip() == f"{client.hub.url}/me/shoes/discussions/1"
    assert on_hub(client) == old
    new = (folder / "timm.safetensors").read_bytes()
    assert on_hub(client, branch="v2")["timm.safetensors"] == new
    assert on_hub(client, branch="refs/pr/1")["timm.safetensors"] == new
    pulled = client.run("pull", "me/shoes", "--revision", "v2", "-o", client.folder / "v2")
    assert pulled.returncode == 0, pulled.stderr
    assert read_model_folder(client.folder / "v2").config.name == "boots"

    client.hub.add("me/open", {"config.json": b"{}"})
    public = client.run("push", run, "me/open", "--private")
    assert public.returncode == 3
    assert "me/open exists and is public, but --private was given; nothing was sent" in public.stderr
    assert on_hub(client, "me/open") == {"config.json": b"{}"}


def test_what_stands_in_the_way(client: Client, folder: Path) -> None:
    cases: list[tuple[list[str | Path], dict[str, str], int, str]] = [
        (["me/shoes"], {"HF_TOKEN": ""}, 3, "no Hub token was found. Log in with `hf auth login`"),
        (["me/shoes"], {"HF_TOKEN": "hf_wrong"}, 3, "the Hub does not know this token (401)"),
        (["you/shoes"], {}, 3, "this token may not write to you/shoes (403)"),
        (["me/shoes"], {"HF_HUB_OFFLINE": "1"}, 3, "HF_HUB_OFFLINE forbids access to the Hub"),
        (["me/shoes"], {"HF_ENDPOINT": NOBODY}, 3, "the Hub cannot be reached"),
        (["shoes"], {}, 2, "'shoes' does not name its owner; expected user/name, for instance me/shoes"),
        (["me/a/shoes"], {}, 2, "'me/a/shoes' is not a valid repository name; expected user/name"),
    ]
    for args, environment, code, message in cases:
        done = client.run("push", folder, *args, **environment)
        assert done.returncode == code, (args, environment, done.stderr)
        assert message in done.stderr, (args, environment, done.stderr)
        assert "hf_wrong" not in done.stderr
    assert client.hub.repos == {}
    # somebody else's repository that exists: seen, not written, but asked to take it
    client.hub.add("you/shoes", {"config.json": b"{}"})
    assert "(403)" in client.run("push", folder, "you/shoes").stderr
    asked = client.run("push", folder, "you/shoes", "--create-pr")
    assert (asked.returncode, asked.stdout) == (0, f"{client.hub.url}/you/shoes/discussions/1\n"), (
        asked.stderr
    )
    assert on_hub(client, "you/shoes") == {"config.json": b"{}"}


LOAD = """
import sys
import numpy, timm, torch, transformers
x = torch.from_numpy(numpy.load(sys.argv[1]))
with torch.inference_mode():
    theirs = timm.create_model("hf-hub:me/shoes", pretrained=True).eval()(x)
    hf = transformers.AutoModel.from_pretrained("me/shoes").eval()(pixel_values=x).pooler_output
numpy.savez(sys.argv[2], timm=theirs.numpy(), transformers=hf.numpy())
"""


@pytest.mark.slow  # test_five_loaders.py loads the same bytes from the same server; this adds the push
def test_timm_and_transformers_load_what_was_pushed(client: Client, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    assert client.run("push", folder, "me/shoes").returncode == 0
    backbone = load_backbone(folder, device="cpu")
    np.save(tmp_path / "x.npy", backbone.transform(picture())[None])
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "x.npy"), str(tmp_path / "y.npz")],
        env=client.hub.environment(tmp_path / "other_cache"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    truth = backbone.embed(picture())
    with np.load(tmp_path / "y.npz") as found:
        for name in ("timm", "transformers"):
            np.testing.assert_allclose(found[name][0], truth, atol=1e-4, err_msg=name)


def test_a_dry_run_asks_nobody(client: Client, folder: Path) -> None:
    done = client.run("push", folder, "me/shoes", "--dry-run", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in done.stdout.splitlines()}
    files = {name: len(data) for name, data in sent(folder).items()}
    assert listed == files | {"bytes": sum(files.values())}
    assert "Nothing was sent to me/shoes: this was a dry run." in done.stderr
    said = json.loads(client.run("push", folder, "me/shoes", "--dry-run", "--json").stdout)
    assert said["files"] == files
    assert said["left_out"] == [".env", "optimizer.pth"]
    assert client.hub.requests == []


def edit(card: Path, old: str, new: str) -> None:
    text = card.read_text(encoding="utf-8")
    assert old in text
    card.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("library_name: timm\n", "", "library_name None; expected a library's name"),
        ("image-feature-extraction", "image-to-text", "pipeline_tag 'image-to-text'; expected image-feature"),
        ("license: apache-2.0\n", "", r"license None, but config.json says 'apache-2.0'"),
        ("license: apache-2.0", "license: mit", r"license 'mit', but config.json says 'apache-2.0'"),
        ("license: apache-2.0", "license: other", "license: other without license_name"),
        ("tags:", "tags: [", "the YAML front matter of README.md cannot be read"),
        ("---\n", "", "does not begin with YAML between two lines ---"),
    ],
)
def test_a_card_that_the_hub_would_misread(folder: Path, old: str, new: str, message: str) -> None:
    edit(folder / "README.md", old, new)
    with pytest.raises(ModelError, match=message):
        plan_push(folder, "me/shoes")


def test_every_onnx_file_must_belong_to_the_weights(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (folder / "onnx" / "model_q4.onnx").write_bytes(b"of another maker")
    shutil.copy(folder / "onnx" / "model.onnx", folder / "onnx" / "model_fp16.onnx")
    assert "onnx/model_fp16.onnx" in plan_push(folder, "me/shoes").files
    write_model_folder(other, config_for(), random_weights(seed=9))
    (other / "onnx").mkdir(exist_ok=True)
    shutil.copy(folder / "onnx" / "model_fp16.onnx", other / "onnx" / "model_fp16.onnx")
    with pytest.raises(ModelError, match=r"model_fp16\.onnx and the folder differ in weights_sha256"):
        plan_push(other, "me/shoes")


def test_an_onnx_file_must_be_the_one_that_was_proven(folder: Path) -> None:
    file, data = folder / "onnx" / "model.onnx", folder / "onnx" / "model.onnx_data"
    data.write_bytes(b"weights")
    told = {
        "file": "onnx/model.onnx",
        "sha256": sha256_of(file),
        "data": {"file": "onnx/model.onnx_data", "sha256": sha256_of(data)},
    }
    (folder / "export_report.json").write_text(json.dumps({"variants": [told]}))
    assert "onnx/model.onnx_data" in plan_push(folder, "me/shoes").files
    data.write_bytes(b"Weights")
    with pytest.raises(
        ModelError, match=r"onnx/model\.onnx_data does not match its checksum in export_report\.json"
    ):
        plan_push(folder, "me/shoes")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"onnx/model\.onnx does not match its checksum"):
        plan_push(folder, "me/shoes")
    (folder / "export_report.json").write_text('{"variants": [3]}')  # says nothing
    assert plan_push(folder, "me/shoes").files


def test_pickles_whatever_their_capitals_are_not_sent(folder: Path) -> None:
    for name in ("a.PTH", "b.joblib"):
        (folder / name).write_bytes(b"pickle")
    assert {"a.PTH", "b.joblib"} < set(plan_push(folder, "me/shoes").left_out)


def test_a_folder_that_is_not_whole(folder: Path, tmp_path: Path) -> None:
    edit(folder / "README.md", "license: apache-2.0", "license: other\nlicense_name: apache-2.0")
    assert plan_push(folder, "me/shoes").files  # another way to say the same
    (folder / "README.md").unlink()
    other = write_model_folder(tmp_path / "other", config_for(), random_weights(seed=9))
    (folder / "timm.safetensors").write_bytes((other.path / "timm.safetensors").read_bytes())
    with pytest.raises(
        ModelError, match=r"model\.onnx and the folder differ in weights_sha256.*README.md is miss"
    ):
        plan_push(folder, "me/shoes")
    (folder / "timm.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="not a complete model folder"):
        plan_push(folder, "me/shoes")
    with pytest.raises(ModelError, match="nowhere is not a folder"):
        plan_push(tmp_path / "nowhere", "me/shoes")
    with pytest.raises(UsageError, match="revision and create_pr cannot be combined"):
        push_to_hub(folder, "me/shoes", revision="v1", create_pr=True)


def test_pull_what_is_here(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "deep" / "copy"
    done = CliRunner().invoke(cli, ["pull", str(folder), "-o", str(copy)])
    assert done.exit_code == 0, done.output
    assert (copy / "onnx" / "model.onnx").read_bytes() == (folder / "onnx" / "model.onnx").read_bytes()
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]  # nothing half made beside it
    full = CliRunner().invoke(cli, ["pull", str(folder), "-o", str(copy)])
    assert (full.exit_code, "exists and is not an empty folder" in full.output) == (2, True)
    unknown = CliRunner().invoke(cli, ["pull", "dino_vits61"])
    assert unknown.exit_code == 2
    assert "dino_vits16" in unknown.output


def test_pull_takes_all_files_of_a_model(folder: Path, tmp_path: Path) -> None:
    """The weights beside an ONNX file, and the files that an index lists."""
    pair, shards = tmp_path / "pair", tmp_path / "shards"
    pair.mkdir()
    model = onnx.load(folder / "onnx" / "model.onnx")
    model.metadata_props.add(key=DATA_KEY, value="m.onnx_data")
    (pair / "m.onnx").write_bytes(model.SerializeToString())
    said = CliRunner().invoke(cli, ["pull", str(pair / "m.onnx"), "-o", str(tmp_path / "half")])
    assert (said.exit_code, "m.onnx_data, which is not beside" in said.stderr) == (3, True)
    assert not (tmp_path / "half").exists()
    (pair / "m.onnx_data").write_bytes(b"weights")
    shards.mkdir()
    weights = random_weights(VitArchitecture(64, 2, 1, 8, (32, 32)))
    parts = {f"m-0000{n}.safetensors": dict(list(weights.items())[n::2]) for n in (0, 1)}
    for name, part in parts.items():
        write_safetensors(shards / name, part)
    listed = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (shards / "m.safetensors.index.json").write_text(json.dumps(listed))
    (shards / "other.txt").touch()
    for source in (pair / "m.onnx", shards / "m.safetensors.index.json"):
        copy = tmp_path / f"copy of {source.parent.name}"
        done = CliRunner().invoke(cli, ["pull", str(source), "-o", str(copy)])
        assert done.exit_code == 0, done.output
        there = {path.name for path in source.parent.iterdir()} - {"other.txt"}
        assert {path.name for path in copy.iterdir()} == there


def test_pull_copies_no_folder_into_itself(folder: Path) -> None:
    said = CliRunner().invoke(cli, ["pull", str(folder), "-o", str(folder / "sub" / "copy")])
    assert (said.exit_code, "would be copied into itself" in said.stderr) == (2, True)
    assert not (folder / "sub").exists()


def test_pull_a_known_name_into_a_model_folder(client: Client, tmp_path: Path) -> None:
    from dinokit.loading.zoo import ZOO
    from dinokit.model_folder.weights import write_safetensors

    known = ZOO["dino_vits16"]
    write_safetensors(tmp_path / "w", random_weights(known.vit), dtype="float16")
    commit = client.hub.add(known.repo, {"model.safetensors": (tmp_path / "w").read_bytes()})
    done = client.run("pull", "dino_vits16", "-o", tmp_path / "vits16", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == commit
    assert read_model_folder(tmp_path / "vits16").config.preprocessing == known.config.preprocessing
    client.hub.add("me/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"0"})
    foreign = client.run("pull", "me/bert")
    assert (foreign.returncode, "has model_type 'bert'" in foreign.stderr) == (3, True)
    assert "GET /me/bert/resolve/main/model.safetensors" not in client.hub.requests
    missing = client.run("pull", "me/nowhere")
    assert (missing.returncode, "the Hub has no repository me/nowhere" in missing.stderr) == (3, True)


def test_pull_fetches_no_pickles(client: Client, folder: Path) -> None:
    client.hub.add("me/mixed", folder)  # with its optimizer.pth
    done = client.run("pull", "me/mixed", "-o", client.folder / "mixed")
    assert done.returncode == 0, done.stderr
    assert not list((client.folder / "mixed").rglob("*.pth"))
    assert not any("optimizer.pth" in request for request in client.hub.requests)


def test_links_out_of_the_folder_are_not_sent(folder: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_secret")
    (folder / "notes.txt").symlink_to(token)
    (folder / "same.json").symlink_to("config.json")
    plan = plan_push(folder, "me/shoes")
    assert "notes.txt" in plan.left_out and "notes.txt" not in plan.files
    assert "same.json" in plan.files
    # A folder of the Hub's cache is made of links, and may be pushed elsewhere.
    shown = tmp_path / "models--me--shoes" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--shoes" / "blobs"
    shown.mkdir(parents=True)
    blobs.mkdir()
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    for name in names:
        (blobs / name).write_bytes((folder / name).read_bytes())
        (shown / name).symlink_to(f"../../blobs/{name}")
    assert {"config.json", "timm.safetensors"} <= set(plan_push(shown, "me/other").files)
