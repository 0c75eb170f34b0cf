"""Backbones that are no Vision Transformers: their model folder, training, engines and export."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from click.testing import CliRunner
from lively_networks import PIXELS, lively
from safetensors.torch import save_file
from timm.layers import SyncBatchNormAct
from timm.models.xcit import Xcit

import dinokit.training.networks.network as network_room
from dinokit import load_backbone
from dinokit.cli import cli
from dinokit.errors import MissingExtraError, ModelError, UsageError
from dinokit.export import export_folder, export_onnx, traced
from dinokit.features.pooling import outputs_for
from dinokit.model_folder.architecture import (
    PosEmbedResize,
    TimmArchitecture,
    VitArchitecture,
    architecture_from_json,
    is_vit_name,
)
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.folder import read_model_folder, write_model_folder
from dinokit.model_folder.reference_networks import network_of, to_timm_names
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime.onnx import OnnxEngine
from dinokit.runtime.timm_networks import create_network, describe_network
from dinokit.runtime.torch import TorchEngine, create_vit, describe_any, forward_with_attention, weights_of
from dinokit.training.networks.network import build_network
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.run.state import TrainingState
from dinokit.training.trainer import train, training_step
from dinokit.vit_graph import build_vit_graph

RECIPE = with_overrides(
    Recipe(),
    [
        "arch=resnet10t",
        "global_crop_px=36",  # multiples of nothing
        "local_crop_px=19",
        "n_local_crops=1",
        "n_prototypes=16",
        "head_hidden_dim=16",
        "head_bottleneck_dim=8",
        "head_batch_norm=true",
        "optimizer=sgd",
        "lr=0.3",
        "epochs=2",
        "batch_size=2",
        "warmup_epochs=1",
        "log_every_steps=1",
        "precision=fp32",
        "workers=0",
        "device=cpu",
        "tensorboard=false",
        "crops=pillow",
    ],
)


def folder_of(module: Any, path: Path, arch: str, **model_args: Any) -> Path:
    known = describe_any(module, PIXELS.crop_px)
    config = BackboneConfig(path.name, known, arch, model_args, PIXELS, source="a test")
    return write_model_folder(path, config, weights_of(module)).path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> tuple[Path, TrainingState]:
    folder = tmp_path_factory.mktemp("convnet") / "run"
    return folder, train([photos], folder, RECIPE)


@pytest.fixture(scope="module")
def exported(run: tuple[Path, TrainingState], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_folder(run[0], out, precision="fp32,fp16")
    return out


# -- what is known of a network


def test_an_architecture_comes_back_from_json() -> None:
    known = TimmArchitecture(512, 32, (48, 64), token_dim=256, num_prefix_tokens=1, size_multiple=None)
    assert architecture_from_json(json.loads(json.dumps(known.to_json()))) == known
    vit = VitArchitecture(48, 2, 3, 8, (32, 32))
    assert "kind" not in vit.to_json()  # the contracts of ONNX files that are there already
    assert architecture_from_json(vit.to_json()) == vit
    with pytest.raises(ModelError, match=r"unknown kind 'rwkv'.*Update dinokit"):
        architecture_from_json({"kind": "rwkv"})
    with pytest.raises(ModelError, match="incomplete"):
        architecture_from_json({"kind": "timm", "embed_dim": 3})
    with pytest.raises(ModelError, match="invalid sizes"):
        architecture_from_json({**known.to_json(), "embed_dim": -1})


@pytest.mark.parametrize(
    ("arch", "args", "expected"),
    [
        ("resnet10t", {}, (512, 512, 32, 0, 1)),
        ("mobilenetv3_small_050", {}, (1024, 288, 32, 0, 1)),  # its embedding is wider than its map
        ("xcit_nano_12_p16_224", {}, (128, 128, 16, 1, 1)),
        ("resmlp_12_224", {"img_size": 32}, (384, 384, 16, 0, None)),
    ],
)
def test_a_network_is_described_by_running_it(
    arch: str, args: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    module = timm.create_model(arch, num_classes=0, **args)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    known = describe_any(module, (32, 32))
    assert isinstance(known, TimmArchitecture)
    found = (known.embed_dim, known.token_dim, known.stride, known.num_prefix_tokens, known.size_multiple)
    assert found == expected
    assert module.training  # left as it was
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_network_of_one_size_is_not_taken_for_one_of_any() -> None:
    """A row of pixels more ends in the same cells, which its tables of positions fit."""

    class OneGrid(torch.nn.Module):
        feature_info = ({"reduction": 4},)

        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 4, 4)
            self.positions = torch.nn.Parameter(torch.zeros(1, 5, 8, 8))

        def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
            cells = self.conv(pixels)
            if cells.shape[-1] > 9:
                raise IndexError  # as timm's mvitv2_tiny does
            return cells + self.positions

        def forward_head(self, cells: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            return cells.mean((2, 3))

    assert describe_network(OneGrid(), (32, 32)).size_multiple is None


def test_vision_transformers_are_still_told_apart() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1)
    assert isinstance(describe_any(vit, (99, 99)), VitArchitecture)
    with pytest.raises(UsageError, match="a Linear is not a feature extractor of timm"):
        describe_network(torch.nn.Linear(2, 2), (32, 32))
    assert is_vit_name("vit_small_patch16_224") and not is_vit_name("xcit_small_12_p16_224")


# -- engines


def test_a_resnet_is_torchvisions(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = lively(torchvision.models.resnet18(weights=None))
    theirs.fc = torch.nn.Identity()
    ours = timm.create_model("resnet18", num_classes=0)
    ours.load_state_dict(theirs.state_dict())
    engine = TorchEngine(
        BackboneConfig("r", describe_any(ours, (36, 36)), "resnet18", {}, PIXELS),
        weights_of(ours),
        device="cpu",
    )
    pixels = np.random.default_rng(0).normal(size=(2, 3, 41, 70)).astype(np.float32)
    with torch.inference_mode():
        right = theirs(torch.from_numpy(pixels)).numpy()
    found = engine.run(pixels, ["pooler_output", "last_hidden_state"])
    np.testing.assert_allclose(found["pooler_output"], right, rtol=1e-5, atol=1e-5)
    # torchvision pools by the mean over its map, so the tokens' mean is its feature, too.
    assert found["last_hidden_state"].shape == (2, 2 * 3, 512)
    np.testing.assert_allclose(found["last_hidden_state"].mean(axis=1), right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="a resnet18 has no attention to show"):
        engine.run(pixels, ["attention"])
    with pytest.raises(ModelError, match="do not fit resnet18"):
        broken = {**weights_of(ours), "conv1.weight": np.zeros((1, 3, 7, 7), np.float32)}
        TorchEngine(engine_config(ours), broken, device="cpu")
    with pytest.raises(ModelError, match=r"missing \['bn1.running_var'\]"):
        fewer = {name: array for name, array in weights_of(ours).items() if name != "bn1.running_var"}
        TorchEngine(engine_config(ours), fewer, device="cpu")


def engine_config(module: Any) -> BackboneConfig:
    return BackboneConfig("r", describe_any(module, (36, 36)), "resnet18", {}, PIXELS)


def test_no_vision_transformer_has_cls_tokens_of_inner_blocks() -> None:
    config = engine_config(timm.create_model("resnet18", num_classes=0))
    assert outputs_for("cls+mean", config) == ["pooler_output", "last_hidden_state"]
    with pytest.raises(
        UsageError, match=r"r is not a Vision Transformer .* for what='cls:4'; use what='cls'"
    ):
        outputs_for("cls:4", config)


def test_backbone_gives_what_the_network_has(run: tuple[Path, TrainingState], photos: Path) -> None:
    folder, state = run
    backbone, picture = load_backbone(folder, engine="torch", device="cpu"), photos / "chelsea.jpg"
    pixels = torch.from_numpy(backbone.transform(picture))[None]
    teacher: Any = state.teacher.backbone.eval()
    with torch.inference_mode():
        right, feature_map = teacher(pixels)[0].numpy(), teacher.forward_features(pixels)[0].numpy()
    np.testing.assert_allclose(backbone.embed(picture), right, atol=1e-6)
    assert backbone.grid == (2, 2)  # 36 pixels, 32 a cell
    np.testing.assert_allclose(backbone.patch_tokens(picture), feature_map.transpose(1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(
        backbone.embed(picture, what="mean"), feature_map.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6
    )
    assert backbone.num_heads == 0 and "no attention" in repr(backbone)
    for ask in (backbone.attention, backbone.masks):
        with pytest.raises(UsageError, match=r"has no attention to show.*need a ViT, such as starter"):
            ask(picture)
    # Any size, odd ones too.
    assert load_backbone(folder, engine="torch", device="cpu", image_size=(45, 67)).embed(picture).shape == (
        512,
    )


def test_the_command_line_says_that_there_is_no_attention(
    run: tuple[Path, TrainingState], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answer = CliRunner().invoke(cli, ["attention", str(photos), "-m", str(run[0]), "-o", str(out)])
    assert answer.exit_code == 2 and "has no attention to show" in answer.output
    assert "Traceback" not in answer.output and not out.exists()
    facts = json.loads(CliRunner().invoke(cli, ["info", str(run[0]), "--json"]).stdout)
    assert (facts["architecture"], facts["embed_dim"], facts["stride"]) == ("resnet10t", 512, 32)
    assert facts["engines"] == ["torch"] and "num_heads" not in facts


def test_a_map_of_another_width_and_a_network_of_one_size(tmp_path: Path) -> None:
    narrow = lively(timm.create_model("mobilenetv3_small_050", num_classes=0))
    backbone = load_backbone(folder_of(narrow, tmp_path / "narrow", "mobilenetv3_small_050"), device="cpu")
    picture = np.zeros((50, 50, 3), np.uint8)
    assert backbone.embed(picture).shape == (1024,) and backbone.patch_tokens(picture).shape == (2, 2, 288)
    with pytest.raises(UsageError, match="have 288 numbers, its embedding 1024; use what='cls'"):
        backbone.embed(picture, what="mean")

    args = {"img_size": 32}
    fixed = lively(timm.create_model("resmlp_12_224", num_classes=0, **args))
    pixels = Preprocessing(resize_px=36, crop_px=(32, 32))
    config = BackboneConfig("fixed", describe_any(fixed, (32, 32)), "resmlp_12_224", args, pixels)
    path = write_model_folder(tmp_path / "fixed", config, weights_of(fixed)).path
    assert load_backbone(path, device="cpu").embed(picture).shape == (384,)
    with pytest.raises(UsageError, match="an image height of 32 px only, not 48"):
        load_backbone(path, device="cpu", image_size=48)


# -- the folder


def test_a_config_cannot_make_timm_open_files(tmp_path: Path) -> None:
    module = timm.create_model("resnet10t", num_classes=0)
    folder = folder_of(module, tmp_path / "folder", "resnet10t", checkpoint_path="/etc/hostname")
    with pytest.raises(UsageError, match="model_args has checkpoint_path"):
        load_backbone(folder, engine="torch")


def test_a_run_leaves_a_folder_with_the_buffers(run: tuple[Path, TrainingState], photos: Path) -> None:
    folder = read_model_folder(run[0] / "model")
    assert not (folder.path / "model.safetensors").exists()  # transformers has no such network
    weights, state = folder.load_weights(), run[1].teacher.backbone.state_dict()
    assert {"bn1.running_mean", "bn1.running_var"} <= set(weights)
    assert set(weights) == {name for name in state if not name.endswith("num_batches_tracked")}
    assert all(np.array_equal(weights[name], state[name].numpy()) for name in weights)
    report = (run[0] / "report.html").read_text()
    assert "No attention maps: this network has no attention to show." in report
    assert not (run[0] / "attention").exists()

    # timm itself, strictly, gives the same numbers.
    theirs = timm.create_model(
        "resnet10t",
        pretrained=True,
        num_classes=0,
        pretrained_cfg_overlay={"file": str(folder.path / "timm.safetensors"), "num_classes": 0},
    ).eval()
    backbone = load_backbone(run[0], engine="torch", device="cpu")
    pixels = torch.from_numpy(backbone.transform(photos / "chelsea.jpg"))[None]
    with torch.inference_mode():
        np.testing.assert_array_equal(theirs(pixels)[0].numpy(), backbone.embed(photos / "chelsea.jpg"))


def test_without_torch_it_says_to_export(
    run: tuple[Path, TrainingState], exported: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = load_backbone(run[0], engine="torch", device="cpu").embed(photos / "chelsea.jpg")
    monkeypatch.setattr("dinokit.loading.load._torch_is_installed", lambda: False)
    with pytest.raises(
        MissingExtraError,
        match=r"it is a resnet10t.*export it on a machine with torch: dinokit export .* -o FOLDER",
    ):
        load_backbone(run[0])
    with pytest.raises(ModelError, match="cannot be run with engine='onnx': it is a resnet10t"):
        load_backbone(run[0], engine="onnx")
    backbone = load_backbone(exported, device="cpu")
    assert backbone.engine == "onnx"
    np.testing.assert_allclose(backbone.embed(photos / "chelsea.jpg"), right, atol=1e-4)


# -- training


def test_a_run_cut_short_ends_with_the_same_weights(
    run: tuple[Path, TrainingState], tmp_path: Path, photos: Path
) -> None:
    class Killed(Exception):
        pass

    class KilledAfterThree:
        def started(self, *_: Any) -> None: ...
        def saved(self, *_: Any) -> None: ...
        def warned(self, *_: Any) -> None: ...
        def told(self, *_: Any) -> None: ...
        def stepped(self, state: TrainingState, *_: Any) -> None:
            if state.step == 3:
                raise Killed

    with pytest.raises(Killed):
        train([photos], tmp_path / "cut", RECIPE, observer=KilledAfterThree())
    torch.manual_seed(99)
    resumed = train([photos], tmp_path / "cut", RECIPE)
    assert resumed.step == 4
    for part in ("student", "teacher"):
        for name, value in getattr(run[1], part).state_dict().items():  # running statistics, too
            assert torch.equal(value, getattr(resumed, part).state_dict()[name]), name


def test_the_teachers_statistics_are_of_its_own_batches() -> None:
    """facebookresearch/dino: the teacher is never put into evaluation mode, and the average skips buffers."""
    recipe = replace(
        RECIPE, n_prototypes=16, teacher_momentum=0.5, teacher_temp=0.04, warmup_teacher_temp=0.04, epochs=9
    )
    torch.manual_seed(0)
    networks = [build_network(recipe, is_student=student) for student in (True, False)]
    state = TrainingState.create(recipe, *networks, steps_per_epoch=10)
    state.step = 20  # past the warm-up
    first: Any = state.student.backbone.conv1[0]
    crops = [torch.randn(2, 2, 3, 36, 36), torch.randn(1, 2, 3, 19, 19)]
    with torch.no_grad():  # the first BatchNorm sees the first convolution's output
        globals_ = first(crops[0].flatten(0, 1)).mean(dim=(0, 2, 3))
        locals_ = first(crops[1].flatten(0, 1)).mean(dim=(0, 2, 3))
    weight = first.weight.detach().clone()
    training_step(state, crops)
    teacher, student = state.teacher.backbone.conv1, state.student.backbone.conv1
    np.testing.assert_allclose(teacher[1].running_mean, 0.1 * globals_, atol=1e-6)
    expected = 0.9 * 0.1 * globals_ + 0.1 * locals_  # one pass a size of crops
    np.testing.assert_allclose(student[1].running_mean, expected, atol=1e-6)
    momentum = float(state.schedules.teacher_momentum[20])  # while the weights do follow
    followed = momentum * weight + (1 - momentum) * student[0].weight.detach()
    np.testing.assert_allclose(teacher[0].weight.detach(), followed, atol=1e-6)
    assert not torch.equal(weight, student[0].weight)


def test_residual_branches_start_open_as_torchvisions() -> None:
    backbone = build_network(replace(RECIPE, n_prototypes=4), is_student=True).backbone
    norms = [part for part in backbone.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms and all(bool((norm.weight == 1).all()) for norm in norms)
    with pytest.raises(UsageError, match="initialisation=xavier is for Vision Transformers, and ResNet"):
        build_network(replace(RECIPE, n_prototypes=4, initialisation="xavier"), is_student=True)


def test_what_cannot_be_trained_says_why(tmp_path: Path, photos: Path) -> None:
    def build(**changes: Any) -> None:
        build_network(replace(RECIPE, n_prototypes=4, **changes), is_student=True)

    with pytest.raises(UsageError, match="has no model 'resnet10tt'; did you mean"):
        build(arch="resnet10tt")
    with pytest.raises(UsageError, match=r"takes pictures of one size only \(224 px\).*19 px and 224 px"):
        build(arch="resmlp_12_224", global_crop_px=224)
    with pytest.raises(
        UsageError, match=r"local_crop_px=16 does not fit convnext_atto: .* cannot take .* 16x16 px"
    ):
        build(arch="convnext_atto", global_crop_px=32, local_crop_px=16)
    build(arch="convnext_atto", global_crop_px=32, local_crop_px=16, n_local_crops=0)
    with pytest.raises(UsageError, match=r"global_crop_px=16 does not fit convnext_atto"):
        build(arch="convnext_atto", global_crop_px=16, image_size_px=32, n_local_crops=0)
    with pytest.raises(
        UsageError, match=r"local_crop_px=16 x 32 does not fit vit_tiny_r_s16_p8_224: .*16x32 px"
    ):
        build(arch="vit_tiny_r_s16_p8_224", patch_size=8, global_crop_px=64, local_crop_px=(16, 32))
    with pytest.raises(UsageError, match=r"timm cannot build 'vit_tiny_r_s16_p8_224' .*: AssertionError\."):
        build(arch="vit_tiny_r_s16_p8_224", patch_size=8, global_crop_px=(32, 48), local_crop_px=16)
    with pytest.raises(
        UsageError, match=r"timm cannot build 'vit_tiny_patch16_224' .*: tuple index out of range\."
    ):
        create_vit("vit_tiny_patch16_224", {"img_size": [32]}, PosEmbedResize())
    with pytest.raises(UsageError, match=r"timm cannot build 'resnet10t' with {'in_chans': 'x'}: "):
        create_network("resnet10t", {"in_chans": "x"})
    with pytest.raises(UsageError, match="needs at least 2 pictures in each piece"):
        build(batch_size=2, accumulate=2)
    with pytest.raises(UsageError, match="Set drop_path_rate=0"):
        build(arch="vgg11")
    with pytest.raises(UsageError, match="multiple of patch_size=16"):  # of a ViT it still matters
        replace(RECIPE, arch="vit_tiny_patch16_224")


def test_batch_norm_is_shared_by_torch_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, arch="regnetx_002", n_prototypes=4)  # its norms hold their activation
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(network_room, "pick_device", lambda _: SimpleNamespace(type="cuda"))
    network = build_network(recipe, is_student=True)
    norms = [part for part in network.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(part, torch.nn.SyncBatchNorm) for part in norms)
    assert any(isinstance(part, SyncBatchNormAct) and isinstance(part.act, torch.nn.ReLU) for part in norms)


@pytest.mark.parametrize("name", ["resnet50", "xcit_small_12_p16"])
def test_bundled_recipes_name_networks_that_exist(name: str) -> None:
    recipe = load_recipe(name)
    assert timm.is_model(recipe.arch) and not is_vit_name(recipe.arch)


# -- export


def test_an_export_is_proven_and_plain(run: tuple[Path, TrainingState], exported: Path, photos: Path) -> None:
    import onnx

    report = json.loads((exported / "export_report.json").read_text())
    whole = next(v for v in report["variants"] if v["file"] == "onnx/model.onnx")
    assert whole["max_difference"] <= 1e-4
    tried = {(c["batch_size"], c["height"], c["width"]) for c in whole["comparisons"]}
    assert tried == {(b, h, w) for b in (1, 3, 8) for h, w in ((36, 36), (54, 54), (27, 46))}
    assert all(c["attention_max"] is None and c["tokens_max"] is not None for c in whole["comparisons"])

    model = onnx.load(exported / "onnx" / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert str(Path(torch.__file__).parent).encode() not in model.SerializeToString()  # no stack traces
    engine = OnnxEngine(exported / "onnx" / "model.onnx", device="cpu")
    assert json.loads(engine.metadata["dinokit"])["architecture"]["kind"] == "timm"

    backbone = load_backbone(exported, engine="onnx", device="cpu", image_size=(70, 45))
    plain = load_backbone(run[0], engine="torch", device="cpu", image_size=(70, 45))
    picture = photos / "chelsea.jpg"
    np.testing.assert_allclose(backbone.embed(picture), plain.embed(picture), atol=1e-5)
    np.testing.assert_allclose(backbone.patch_tokens(picture), plain.patch_tokens(picture), atol=1e-5)
    with pytest.raises(UsageError, match="no attention"):
        backbone.attention(picture)
    lone = load_backbone(exported / "onnx" / "model.onnx", device="cpu")
    assert (lone.embed_dim, lone.grid, lone.num_heads) == (512, (2, 2), 0)
    half = load_backbone(exported, precision="fp16", device="cpu").embed(picture)
    own = load_backbone(exported, device="cpu").embed(picture)
    assert half @ own / np.linalg.norm(half) / np.linalg.norm(own) > 0.9999


def test_an_onnx_file_of_other_weights_is_refused(exported: Path, tmp_path: Path) -> None:
    other = lively(timm.create_model("resnet10t", num_classes=0), seed=5)
    folder = folder_of(other, tmp_path / "other", "resnet10t")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes((exported / "onnx" / "model.onnx").read_bytes())
    with pytest.raises(ModelError, match="weights_sha256"):
        load_backbone(folder, device="cpu")


def test_what_is_no_use_is_refused_before_anything_is_written(
    run: tuple[Path, TrainingState], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"is for the Vision Transformers of DINO.* and run is not one"):
        export_folder(run[0], out, target="ort-cuda")
    assert not out.exists()


def test_files_for_one_size_and_for_bytes(run: tuple[Path, TrainingState], tmp_path: Path) -> None:
    report = export_folder(run[0], tmp_path / "out", target="portable,embedder", image_size=(32, 48))
    assert [v.file for v in report.variants] == ["onnx/model_32x48.onnx", "onnx/embedder_32x48.onnx"]
    assert all(v.max_difference <= 1e-4 for v in report.variants)


def test_an_xcit_is_exported(tmp_path: Path) -> None:
    module = lively(Xcit(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0))
    report = export_onnx(module, tmp_path / "x.onnx", preprocessing=PIXELS)
    assert report.max_difference <= 1e-4
    small = export_onnx(
        module, tmp_path / "x8.onnx", preprocessing=PIXELS, precision="int8"
    )  # mostly products
    assert small.cosines[0] >= 0.99
    backbone = load_backbone(tmp_path / "x.onnx", device="cpu", image_size=(49, 65))
    picture = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    pixels = torch.from_numpy(backbone.transform(picture))[None]
    with torch.inference_mode():
        right, tokens = module(pixels)[0].numpy(), module.forward_features(pixels)[0].numpy()
    np.testing.assert_allclose(backbone.embed(picture), right, atol=1e-4)
    np.testing.assert_allclose(backbone.patch_tokens(picture), tokens[1:].reshape(4, 5, 48), atol=1e-4)


def test_a_module_in_memory_is_exported(tmp_path: Path) -> None:
    """With its classifier, which is left out; and one that takes a single size."""
    module = lively(timm.create_model("mobilenetv3_small_050", num_classes=7))
    export_onnx(module, tmp_path / "m.onnx", preprocessing=PIXELS, name="mine", licence="mit")
    backbone = load_backbone(tmp_path / "m.onnx", device="cpu")
    picture = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    pixels = torch.from_numpy(backbone.transform(picture))[None]
    with torch.inference_mode():
        right = module.forward_head(module.forward_features(pixels), pre_logits=True)[0].numpy()
    np.testing.assert_allclose(backbone.embed(picture), right, atol=1e-4)
    assert (backbone.name, backbone.config.licence, backbone.embed_dim) == ("mine", "mit", 1024)

    fixed = lively(timm.create_model("resmlp_12_224", num_classes=0, img_size=32))
    pixels_32 = Preprocessing(resize_px=36, crop_px=(32, 32))
    report = export_onnx(fixed, tmp_path / "f.onnx", preprocessing=pixels_32)
    assert {(c.batch_size, c.height, c.width) for c in report.comparisons} == {(b, 32, 32) for b in (1, 3, 8)}
    with pytest.raises(UsageError, match="takes pictures of 32x32 px only, not 64x64"):
        export_onnx(fixed, tmp_path / "g.onnx", preprocessing=pixels_32, image_size=64)


def gone(*_: Any) -> Any:
    raise TypeError("this exporter was removed")


def test_a_graph_that_took_a_size_for_settled_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "_by_torch_export", gone)  # it takes its time

    class Baked(torch.nn.Module):
        """Decides by the picture's size, which a recorded run cannot follow."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)

        def forward_features(self, x: Any) -> Any:
            return self.conv(x) * (2.0 if int(x.shape[-1]) > 37 else 1.0)

        def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
            return x.mean(dim=(2, 3))

    module = lively(Baked())
    known = describe_network(module, (36, 36))
    with pytest.raises(ModelError, match=r"torch cannot write this network as ONNX.*another pooler_output"):
        traced.trace_graph(module, replace(known, stride=2))


def test_equal_weights_are_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch writes them once, and Identity operators, behind which no pass would look for a weight."""
    monkeypatch.setattr(traced, "_by_torch_export", gone)
    module = timm.create_model("resnet10t", num_classes=0).eval()  # all biases are zero
    model, _ = traced.trace_graph(module, describe_network(module, (32, 32)))
    weights = {tensor.name for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 10
    assert all(weights.issuperset(node.input[1:]) for node in convolutions)


def test_an_exporter_that_fails_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch's C++ code writes whole graphs to stdout, where the report goes."""

    def failing(*_: Any) -> Any:
        os.write(1, b"graph(%pixel_values)")
        raise RuntimeError("\x1b[31mno such\x1b[0m operator")

    for name in ("_by_tracing", "_by_torch_export"):
        monkeypatch.setattr(traced, name, failing)
    module = create_network("resnet10t", {}).eval()
    with pytest.raises(ModelError, match=r"as ONNX \(no such operator; then: no such operator\)"):
        traced.trace_graph(module, describe_network(module, (32, 32)))
    os.write(1, b"it is back")
    assert capfd.readouterr().out == "it is back"


@pytest.mark.slow
def test_the_newer_exporter_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(traced, "_by_tracing", gone)
    module = lively(timm.create_model("resnet10t", num_classes=0))
    model, store = traced.trace_graph(module, describe_network(module, (36, 36)))
    assert str(Path(torch.__file__).parent).encode() not in model.SerializeToString()
    pixels = np.random.default_rng(0).normal(size=(3, 3, 61, 44)).astype(np.float32)
    found = OnnxEngine(model.SerializeToString(), weights=store, device="cpu").run(pixels, ["pooler_output"])
    with torch.inference_mode():
        right = module(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(found["pooler_output"], right, atol=1e-4)


# -- facebookresearch's files


def test_a_resnet_of_facebookresearch_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = lively(torchvision.models.resnet18(weights=None))
    del theirs.fc
    full = {f"module.backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}
    file = tmp_path / "dino_resnet18.pth"
    torch.save(
        {"teacher": {**full, "module.head.mlp.0.weight": torch.zeros(2, 2)}, "student": {}, "epoch": 3}, file
    )
    backbone = load_backbone(file, device="cpu", image_size=64)
    theirs.fc = torch.nn.Identity()
    picture = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    with torch.inference_mode():
        right = theirs(torch.from_numpy(backbone.transform(picture))[None])[0].numpy()
    np.testing.assert_allclose(backbone.embed(picture), right, rtol=1e-5, atol=1e-5)
    assert (backbone.engine, backbone.config.timm_architecture) == ("torch", "resnet18")
    monkeypatch.setattr("dinokit.loading.load._torch_is_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r"it is a resnet18.*dinokit export"):
        load_backbone(file)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resnet_in_safetensors_is_read(tmp_path: Path, bf16: bool) -> None:
    module = lively(timm.create_model("resnet18")).eval()  # with its classifier, as timm saves it
    if bf16:
        module = module.bfloat16()
    file = tmp_path / "resnet18.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)
    backbone = load_backbone(file, device="cpu", image_size=64)
    picture = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    module.float().reset_classifier(0)
    with torch.inference_mode():
        right = module(torch.from_numpy(backbone.transform(picture))[None])[0].numpy()
    np.testing.assert_allclose(backbone.embed(picture), right, rtol=1e-5, atol=1e-5)


def test_xcits_names_become_timms() -> None:
    from timm.models.xcit import checkpoint_filter_fn

    module = lively(Xcit(img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=0))
    official = {}
    for name, tensor in module.state_dict().items():
        if ".attn.q." in name and name.startswith("cls_attn"):
            parts = [module.state_dict()[name.replace(".q.", f".{part}.")] for part in "qkv"]
            official[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not (name.startswith("cls_attn") and (".attn.k." in name or ".attn.v." in name)):
            official[name.replace("pos_embed.", "pos_embeder.")] = tensor
    found = to_timm_names({name: tensor.float().numpy() for name, tensor in official.items()})
    right = checkpoint_filter_fn(dict(official), module)
    assert found is not None and set(found) == {
        name for name in right if not name.endswith("num_batches_tracked")
    }
    assert all(np.array_equal(found[name], right[name].numpy()) for name in found)


@pytest.mark.parametrize("arch", ["resnet50", "xcit_small_12_p16_224", "xcit_small_12_p8_224"])
def test_published_networks_are_told_by_their_shapes(arch: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(arch, num_classes=0)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    name, known = network_of(shapes) or ("", None)
    assert name == arch and known is not None
    cfg = module.pretrained_cfg
    said = (known.embed_dim, known.first_conv, known.classifier, known.stride)
    assert said == (
        module.num_features,
        cfg["first_conv"],
        cfg["classifier"],
        module.feature_info[-1]["reduction"],
    )
    assert network_of({"conv1.weight": (64, 3, 7, 7)}) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"act_layer": "quick_gelu"},
        {"act_layer": "gelu_tanh"},
        {"norm_layer": "rmsnorm"},
        {"norm_layer": torch.nn.LayerNorm, "another_eps": True},
    ],
)
def test_a_vit_that_computes_something_else_is_not_described_as_a_dino_vit(changes: dict[str, Any]) -> None:
    args = {key: value for key, value in changes.items() if key != "another_eps"}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2, **args)
    if "another_eps" in changes:
        vit.norm.eps = 1e-3  # that of its blocks is 1e-5
    assert isinstance(describe_any(vit, (32, 32)), TimmArchitecture)


def test_a_dinov3_that_turns_otherwise_is_not_described_as_one() -> None:
    args = {
        "num_classes": 0,
        "img_size": 32,
        "depth": 1,
        "embed_dim": 48,
        "num_heads": 3,
        "global_pool": "token",
    }
    usual = timm.create_model("vit_small_patch16_dinov3", **args)
    other = timm.create_model("vit_small_patch16_dinov3", **args, rope_temperature=10.0)
    assert isinstance(describe_any(usual, (32, 32)), VitArchitecture)
    assert isinstance(describe_any(other, (32, 32)), TimmArchitecture)


def test_torch_computes_with_the_eps_of_the_folder() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1)
    known = replace(describe_any(vit, (32, 32)), layer_norm_eps=1e-3)
    config = BackboneConfig("x", known, "vit_tiny_patch16_224", {"img_size": [32, 32], "depth": 1}, PIXELS)
    weights, pixels = weights_of(vit), np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    ours = TorchEngine(config, weights, device="cpu").run(pixels)["pooler_output"]
    graph = OnnxEngine(build_vit_graph(known, weights).SerializeToString(), device="cpu")
    np.testing.assert_allclose(ours, graph.run(pixels, ["pooler_output"])["pooler_output"], atol=1e-4)
    with torch.no_grad():
        assert np.abs(ours - vit.eval()(torch.from_numpy(pixels)).numpy()).max() > 1e-3


def test_the_hook_of_attention_survives_its_removal_in_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch then calls it, in the thread that is in the middle of its hooks, as one that takes no keywords."""
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1).eval()
    register, hooks = torch.nn.Module.register_forward_pre_hook, []

    def noted(module: Any, hook: Any, **options: Any) -> Any:
        hooks.append(hook)
        return register(module, hook, **options)

    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", noted)
    forward_with_attention(vit, torch.zeros(1, 3, 32, 32))
    assert hooks[0](vit.blocks[0].attn, (torch.zeros(1, 5, 192),)) is None
