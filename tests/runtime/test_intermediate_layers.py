"""Tokens of inner blocks, against hooks on timm's own blocks, timm's and transformers' own ways to them."""

from __future__ import annotations

import pickle
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_engine import backbone_of
from numpy.typing import NDArray
from small_generations import TIMM, TRANSFORMERS, lively, pixels, timm_model, transformers_model
from small_models import config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.errors import ModelError, UsageError
from dinokit.features.backbone import Backbone
from dinokit.model_folder.architecture import PosEmbedResize, VitArchitecture
from dinokit.model_folder.config import BackboneConfig, timm_arguments
from dinokit.model_folder.contract import block_of, block_output
from dinokit.model_folder.folder import write_model_folder
from dinokit.model_folder.weight_names import transformers_to_timm
from dinokit.model_folder.weights import read_safetensors
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime.onnx import OnnxEngine
from dinokit.runtime.onnx_layers import OnnxEngineWithLayers
from dinokit.vit_graph import build_vit_graph

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

TOLERANCE = 2e-5  # the issue asks for 1e-4; tokens after the norm are of size 1 …
RAW_TOLERANCE = 1e-4  # … and before it several times as large
V1 = "vit_tiny_patch16_224"
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 32, "patch_size": 8}
PICTURES = [picture(70 + 9 * i, 60, seed=i) for i in range(3)]
OBLONG = (40, 24)  # 5 x 3 patches of 8
DEEP = VitArchitecture(embed_dim=48, depth=4, num_heads=3, patch_size=8, image_size=(32, 32))


def of_timm(name: str) -> Any:
    """A network of timm itself, of DINO v1 to v3."""
    if name in TIMM:
        return timm_model(name)
    return lively(timm.create_model(name, num_classes=0, dynamic_img_size=True, **SMALL))


def hooked(module: Any, images: NDArray[np.float32]) -> list[Any]:
    """What each of the module's blocks gives, seen from outside."""
    seen: list[Any] = []
    handles = [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in module.blocks]
    with torch.inference_mode():
        module.forward_features(torch.from_numpy(images))
    for handle in handles:
        handle.remove()
    return seen


def right_outputs(module: Any, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    found = {}
    with torch.inference_mode():
        for index, tokens in enumerate(hooked(module, images)):
            found[f"blocks.{index}"] = tokens.numpy()
            found[f"blocks.{index}.norm"] = module.norm(tokens).numpy()
    return found


def described(weights: dict[str, Any], **changes: Any) -> VitArchitecture:
    return replace(
        VitArchitecture.from_shapes({n: a.shape for n, a in weights.items()}, num_heads=3), **changes
    )


def engine_with(vit: VitArchitecture, weights: Any, blocks: Sequence[str]) -> OnnxEngine:
    return OnnxEngine(build_vit_graph(vit, weights, blocks=blocks).SerializeToString(), device="cpu")


# -- the written graph


@pytest.mark.parametrize("name", [V1, *sorted(TIMM)])
def test_the_graph_agrees_with_hooks_on_timms_blocks(name: str) -> None:
    module = of_timm(name)
    weights = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
    patch, depth = module.patch_embed.patch_size[0], len(module.blocks)
    vit = described(weights, image_size=(4 * patch, 4 * patch), pos_embed_resize=PosEmbedResize(0.0, True))
    names = [block_output(index, norm=norm) for index in range(depth) for norm in (False, True)]
    engine = engine_with(vit, weights, names)
    for rows, columns in ((4, 4), (5, 3), (1, 6)):
        images = pixels(rows * patch, columns * patch)
        right, found = right_outputs(module, images), engine.run(images, names)
        assert set(right) == set(names)
        for output in names:
            assert found[output].shape == right[output].shape
            least = TOLERANCE if output.endswith(".norm") else RAW_TOLERANCE
            assert np.abs(found[output] - right[output]).max() <= least, (output, rows, columns)


@pytest.mark.parametrize("name", ["dinov2", "dinov2 giant reg", "dinov3", "dinov3 gated"])
def test_the_graph_agrees_with_transformers_hidden_states(name: str, tmp_path: Path) -> None:
    assert name in TRANSFORMERS
    if name.startswith("dinov3") and pytest.importorskip("transformers").__version__.startswith("4."):
        pytest.skip("transformers 4 numbers the hidden states of DINOv3 differently")
    model = transformers_model(name)
    model.save_pretrained(tmp_path)
    weights = transformers_to_timm(read_safetensors(tmp_path / "model.safetensors"))
    patch = model.config.patch_size
    rule = PosEmbedResize(0.0, antialias="reg" in name)
    vit = described(weights, image_size=(4 * patch, 4 * patch), pos_embed_resize=rule)
    names = ["blocks.0", "blocks.1", "blocks.0.norm", "blocks.1.norm"]
    images = pixels(5 * patch, 3 * patch)
    with torch.inference_mode():
        states = model(torch.from_numpy(images), output_hidden_states=True).hidden_states
        assert len(states) == 3  # the first is what goes into block 0
        norm = model.norm if hasattr(model, "norm") else model.layernorm
        right = [states[1], states[2], norm(states[1]), norm(states[2])]
    found = engine_with(vit, weights, names).run(images, names)
    for output, expected in zip(names, right, strict=True):
        least = TOLERANCE if output.endswith(".norm") else RAW_TOLERANCE
        assert np.abs(found[output] - expected.numpy()).max() <= least, output


def test_the_graph_is_valid_and_declares_what_it_gives() -> None:
    weights = random_weights(DEEP)
    model = build_vit_graph(DEEP, weights, blocks=["blocks.1", "blocks.2.norm", "blocks.3.norm"])
    onnx.checker.check_model(model, full_check=True)
    dims = {
        o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output
    }
    assert list(dims) == [
        *("last_hidden_state", "pooler_output", "attention"),
        *("blocks.1", "blocks.2.norm", "blocks.3.norm"),
    ]
    assert dims["blocks.1"] == dims["blocks.2.norm"] == ["batch", "tokens", 48]
    plain = build_vit_graph(DEEP, weights)
    assert len(plain.graph.initializer) == len(model.graph.initializer)  # the final norm is stored once
    with pytest.raises(
        ModelError, match=r"of 4 blocks has no output 'blocks.4.norm'; expected 'blocks.0' to 'blocks.3'"
    ):
        build_vit_graph(DEEP, weights, blocks=["blocks.4.norm", "blocks.0"])


def test_names_of_outputs_are_read_as_they_are_written() -> None:
    for index in (0, 7, 11):
        for norm in (False, True):
            assert block_of(block_output(index, norm=norm)) == (index, norm)
    for other in ("last_hidden_state", "blocks.1.attn", "blocks.", "blocks.1.normal"):
        assert block_of(other) is None


# -- backbones


@pytest.fixture(scope="module", params=[V1, "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model folder, and timm's own module with its weights."""
    module = of_timm(request.param)
    weights = {key: tensor.numpy().copy() for key, tensor in module.state_dict().items()}
    patch = module.patch_embed.patch_size[0]
    rule = PosEmbedResize(0.0, antialias=True)  # timm's own
    vit = described(weights, image_size=(4 * patch, 4 * patch), pos_embed_resize=rule)
    arch, args = timm_arguments(vit)
    see = Preprocessing(resize_px=4 * patch, crop_px=(4 * patch, 4 * patch))
    config = BackboneConfig("family", vit, arch, args, see, source="a test")
    path = tmp_path_factory.mktemp("family") / "model"
    return write_model_folder(path, config, weights).path, module


def oblong(folder: Path, **how: Any) -> Backbone:
    backbone = load_backbone(folder)
    return load_backbone(folder, image_size=(5 * backbone.patch_size, 3 * backbone.patch_size), **how)


@pytest.mark.parametrize("engine", ["onnx", "torch"])
@pytest.mark.parametrize("norm", [True, False])
def test_layers_agree_with_timms_forward_intermediates(
    family: tuple[Path, Any], engine: str, norm: bool
) -> None:
    folder, module = family
    backbone = oblong(folder, engine=engine)
    assert backbone.grid == (5, 3)
    images = np.stack([backbone.transform(one) for one in PICTURES])
    depth = len(module.blocks)
    with torch.inference_mode():
        right = module.forward_intermediates(
            torch.from_numpy(images), list(range(depth)), norm=norm, return_prefix_tokens=True,
            intermediates_only=True,
        )  # fmt: skip
    maps = np.stack([patches.permute(0, 2, 3, 1).numpy() for patches, _ in right], axis=1)
    cls = np.stack([prefix[:, 0].numpy() for _, prefix in right], axis=1)

    order = [depth - 1, 0]
    found, tokens = backbone.patch_tokens(PICTURES, layers=order, norm=norm, return_class_token=True)
    assert found.shape == (3, 2, 5, 3, 48) and tokens.shape == (3, 2, 48)
    assert found.dtype == tokens.dtype == np.float32
    assert np.abs(found - maps[:, order]).max() <= 1e-4
    assert np.abs(tokens - cls[:, order]).max() <= 1e-4
    from_the_end = backbone.patch_tokens(PICTURES, layers=(-1, -depth), norm=norm)
    assert np.array_equal(from_the_end, found)


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_layers_agree_with_dinov2s_function_in_timm(family: tuple[Path, Any], engine: str) -> None:
    folder, module = family
    if not hasattr(module, "get_intermediate_layers"):
        module = None  # timm's class for DINOv3 has it not: asked of hooks instead
    backbone = oblong(folder, engine=engine)
    images = np.stack([backbone.transform(one) for one in PICTURES])
    with torch.inference_mode():
        if module is not None:
            maps = module.get_intermediate_layers(torch.from_numpy(images), [0, 1], reshape=True, norm=True)
            right = np.stack([one.permute(0, 2, 3, 1).numpy() for one in maps], axis=1)
        else:
            outputs = right_outputs(family[1], images)
            both = [outputs["blocks.0.norm"], outputs["blocks.1.norm"]]
            right = np.stack([one[:, -15:].reshape(3, 5, 3, 48) for one in both], axis=1)
    assert np.abs(backbone.patch_tokens(PICTURES, layers=[0, 1]) - right).max() <= 1e-4


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_the_last_layer_is_what_patch_tokens_gives(family: tuple[Path, Any], engine: str) -> None:
    backbone = oblong(family[0], engine=engine)
    before, vectors, maps = (f(PICTURES) for f in (backbone.patch_tokens, backbone.embed, backbone.attention))
    layers, cls = backbone.patch_tokens(PICTURES, layers=[0, -1, 0, 1], return_class_token=True)
    assert np.array_equal(layers[:, 1], before)
    assert np.array_equal(layers[:, 0], layers[:, 2])
    assert np.abs(layers[:, 0] - layers[:, 1]).max() > 0.1
    assert np.array_equal(cls[:, 1], vectors)
    # Not even the last bit of anything else depends on which layers were asked for before.
    backbone.patch_tokens(PICTURES, layers=[0, 1], norm=False)
    assert np.array_equal(backbone.patch_tokens(PICTURES), before)
    assert np.array_equal(backbone.embed(PICTURES), vectors)
    assert np.array_equal(backbone.attention(PICTURES), maps)


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_without_layers_there_is_no_axis_for_them(family: tuple[Path, Any], engine: str) -> None:
    backbone = oblong(family[0], engine=engine)
    plain, cls = backbone.patch_tokens(PICTURES, return_class_token=True)
    assert np.array_equal(plain, backbone.patch_tokens(PICTURES))
    assert np.array_equal(cls, backbone.embed(PICTURES))
    raw = backbone.patch_tokens(PICTURES, norm=False)
    assert raw.shape == plain.shape
    assert np.array_equal(raw, backbone.patch_tokens(PICTURES, layers=[-1], norm=False)[:, 0])
    assert np.abs(raw - plain).max() > 0.1
    one, vector = backbone.patch_tokens(PICTURES[0], layers=iter([0, 1]), return_class_token=True)
    assert one.shape == (2, 5, 3, 48) and vector.shape == (2, 48)
    none, vectors = backbone.patch_tokens([], layers=np.array([0, 1]), return_class_token=True)
    assert none.shape == (0, 2, 5, 3, 48) and vectors.shape == (0, 2, 48)
    assert backbone.patch_tokens([], layers=range(2)).shape == (0, 2, 5, 3, 48)


def test_torch_computes_layers_in_its_precision(family: tuple[Path, Any]) -> None:
    whole = oblong(family[0], engine="torch")
    half = oblong(family[0], engine="torch", precision="fp16")
    assert half.precision == "fp16"
    layers = half.patch_tokens(PICTURES, layers=[0, 1])
    assert layers.dtype == np.float32
    assert np.array_equal(layers, layers.astype(np.float16))
    difference = np.abs(layers - whole.patch_tokens(PICTURES, layers=[0, 1])).max()
    assert 0 < difference < 0.1


# -- the graph that is written on demand


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "deep", config_for(DEEP), random_weights(DEEP)).path


def test_the_weights_are_held_once(folder: Path) -> None:
    backbone = load_backbone(folder, engine="onnx")
    holder = backbone._engine
    assert isinstance(holder, OnnxEngineWithLayers)
    first = weakref.ref(holder._engine)
    backbone.patch_tokens(PICTURES, layers=[-1])  # every engine has it
    assert holder._engine is first()
    backbone.patch_tokens(PICTURES, layers=[0, 2])
    assert first() is None
    second = weakref.ref(holder._engine)
    for layers in ([2, 0], [0], [2, 3]):  # a list that is within what was asked for
        backbone.patch_tokens(PICTURES, layers=layers)
    assert holder._engine is second()
    backbone.patch_tokens(PICTURES, layers=[1])
    assert second() is None
    third = weakref.ref(holder._engine)
    backbone.patch_tokens(PICTURES, layers=[0, 1, 2])
    assert holder._engine is third()


def test_further_outputs_leave_the_others_as_they_were(photos: Path) -> None:
    # With a sum as an output ONNX Runtime fuses less, and twelve blocks later the last bits are others.
    backbone = load_backbone("starter", engine="onnx", device="cpu")
    before = backbone.embed(photos)
    backbone.patch_tokens(photos, layers=[0, 2, 7], norm=False)
    assert np.array_equal(backbone.embed(photos), before)


def test_several_threads_write_one_graph() -> None:
    class Counted:
        device, precision = "cpu", "fp32"

        def run(self, pixel_values: Any, outputs: Sequence[str]) -> dict[str, Any]:
            return dict.fromkeys(outputs, pixel_values)

    written: list[tuple[str, ...]] = []
    together = threading.Barrier(4)

    def write(blocks: Sequence[str]) -> Any:
        written.append(tuple(blocks))
        return Counted()

    engine = OnnxEngineWithLayers(Counted(), write)  # type: ignore[arg-type]

    def work() -> None:
        together.wait()
        for _ in range(50):
            engine.run(np.zeros((1, 3, 8, 8), np.float32), ["blocks.1", "last_hidden_state"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [("blocks.1",)]
    engine.run(np.zeros((1, 3, 8, 8), np.float32), ["blocks.0.norm"])
    assert written[1:] == [("blocks.1", "blocks.0.norm")]


def test_the_model_is_found_again_from_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    backbone = load_backbone(folder.name, engine="onnx")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    layers = backbone.patch_tokens(PICTURES, layers=[1])
    again = pickle.loads(pickle.dumps(backbone))
    assert np.array_equal(again.patch_tokens(PICTURES, layers=[1]), layers)


def test_a_bare_file_of_weights_gives_layers(tmp_path: Path) -> None:
    vit = replace(DEEP, embed_dim=64, num_heads=1)  # heads of 64, as a bare file is read
    there = write_model_folder(tmp_path / "model", config_for(vit), random_weights(vit)).path
    right = load_backbone(there, engine="torch").patch_tokens(PICTURES, layers=[1])
    found = load_backbone(there / "timm.safetensors", engine="onnx").patch_tokens(PICTURES, layers=[1])
    assert np.abs(found - right).max() <= 1e-4


def test_a_model_that_changed_meanwhile_is_refused(folder: Path) -> None:
    backbone = load_backbone(folder, engine="onnx")
    before = backbone.embed(PICTURES)
    write_model_folder(folder, config_for(DEEP), random_weights(DEEP, seed=1))
    with pytest.raises(ModelError, match=r"deep no longer has the weights .* load it again"):
        backbone.patch_tokens(PICTURES, layers=[0])
    assert np.array_equal(backbone.embed(PICTURES), before)  # and goes on as it was


# -- what cannot be


@pytest.fixture(scope="module", params=["onnx", "torch"])
def starter(request: pytest.FixtureRequest) -> Iterator[Backbone]:
    yield load_backbone("starter", engine=request.param)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (
            4,
            r"layers=4 is not a list of blocks; expected one such as \[11\], or \[-4, -3, -2, -1\] for the last 4",
        ),
        ("2,5", "layers='2,5' is not a list of blocks"),
        ({2, 5}, "is not a list of blocks"),
        ([], r"layers=\[\] is empty; expected"),
        ([2.0], r"layers=\[2.0\] must be integers"),
        (
            [2, 12],
            r"starter has no block 12 \(layers=\[2, 12\]\) but 12 blocks, 0 to 11; -1 is the last, -12 the first",
        ),
        ([-13], "starter has no block -13"),
    ],
)
def test_layers_that_are_none(starter: Backbone, layers: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        starter.patch_tokens([], layers=layers)


def test_a_lone_file_has_its_last_block_only(exported_folder: Path) -> None:
    backbone = load_backbone(exported_folder / "onnx" / "model.onnx")
    for how in ({"layers": [0]}, {"norm": False}):
        with pytest.raises(
            UsageError, match=r"layers, norm=False.*model.onnx is a single ONNX file.* Load the model folder"
        ):
            backbone.patch_tokens(PICTURES, **how)
    assert np.array_equal(backbone.patch_tokens(PICTURES, layers=[-1])[:, 0], backbone.patch_tokens(PICTURES))


def test_a_folder_with_a_file_gives_layers_from_its_weights(exported_folder: Path) -> None:
    ort, right = (load_backbone(exported_folder, engine=engine) for engine in ("onnx", "torch"))
    vectors = ort.embed(PICTURES)
    found = ort.patch_tokens(PICTURES, layers=[0, 1])
    assert np.abs(found - right.patch_tokens(PICTURES, layers=[0, 1])).max() <= 1e-4
    assert np.abs(ort.embed(PICTURES) - vectors).max() <= 1e-5


@pytest.mark.parametrize(
    ("precision", "hint"), [("fp16", r"'fp32', or with engine='torch'"), ("int8", r"'fp32'$")]
)
def test_files_of_other_precisions_are_not_mixed_with_fp32(
    exported_folder: Path, precision: str, hint: str
) -> None:
    backbone = load_backbone(exported_folder, engine="onnx", precision=precision)
    says = rf"the model's {precision} file outputs the last block's tokens only. Load .*{hint}"
    with pytest.raises(UsageError, match=says):
        backbone.patch_tokens(PICTURES, layers=[0])
    assert backbone.patch_tokens(PICTURES, layers=[-1]).shape == (3, 1, 4, 4, 48)


# -- networks that are no DINO ViTs


def folder_of(name: str, path: Path, side: int = 32, **args: Any) -> tuple[Path, Any]:
    from dinokit.runtime.torch import describe_any, weights_of

    torch.manual_seed(0)
    module = lively(timm.create_model(name, num_classes=0, **args))
    see = Preprocessing(resize_px=side, crop_px=(side, side))
    config = BackboneConfig(name, describe_any(module, (side, side)), name, args, see, source="a test")
    return write_model_folder(path, config, weights_of(module)).path, module


@pytest.mark.parametrize(
    ("name", "args", "n_prefix"),
    [
        (
            "xcit_nano_12_p16_224",
            {"embed_dim": 48, "depth": 3, "num_heads": 3},
            0,
        ),  # its class token comes after the blocks
        ("resmlp_12_224", {"img_size": 32}, 0),
        ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3}, 1),
    ],
)
def test_other_networks_of_blocks_give_them_with_torch(
    name: str, args: dict[str, Any], n_prefix: int, tmp_path: Path
) -> None:
    path, module = folder_of(name, tmp_path / "model", **args)
    backbone = load_backbone(path, engine="torch")
    images = np.stack([backbone.transform(one) for one in PICTURES])
    seen, (h, w, dim) = hooked(module, images), backbone.patch_shape
    assert len(seen) >= 3 and (h, w) == (2, 2)
    for norm in (False, True):
        with torch.inference_mode():
            right = [(module.norm(tokens) if norm else tokens)[:, n_prefix:].numpy() for tokens in seen]
        found = backbone.patch_tokens(PICTURES, layers=[2, 0, -1], norm=norm)
        for place, index in enumerate((2, 0, -1)):
            assert np.abs(found[:, place] - right[index].reshape(3, h, w, dim)).max() <= 1e-5
    with pytest.raises(UsageError, match="it has no class token to return; use embed for the vector"):
        backbone.patch_tokens(PICTURES, return_class_token=True)
    with pytest.raises(UsageError, match=rf"{name} has no block 40"):
        backbone.patch_tokens(PICTURES, layers=[40])


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_networks_of_stages_have_no_layers(name: str, tmp_path: Path) -> None:
    path, _ = folder_of(name, tmp_path / "model", side=64)
    backbone = load_backbone(path, engine="torch")
    for how in ({"layers": [0]}, {"norm": False}):
        with pytest.raises(
            UsageError, match=rf"not available for {name}, whose blocks .*module.forward_intermediates"
        ):
            backbone.patch_tokens(PICTURES, **how)
    assert backbone.patch_tokens(PICTURES).shape[0] == 3


def test_without_torch_other_networks_have_their_last_map_only() -> None:
    from dinokit.model_folder.architecture import TimmArchitecture

    fake = backbone_of()
    known = TimmArchitecture(6, 8, (32, 32), token_dim=6, num_prefix_tokens=1, size_multiple=8)
    config = replace(fake.config, architecture=known, timm_architecture="xcit_nano_12_p16_224")
    backbone = Backbone(config, fake._engine, weights_sha256="0" * 64, source="a test")
    assert backbone.patch_tokens(PICTURES).shape == (3, 4, 4, 6)
    with pytest.raises(UsageError, match=r"last feature map only.*XCiT.*engine=\"torch\""):
        backbone.patch_tokens(PICTURES, layers=[0])
