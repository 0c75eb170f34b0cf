"""The table of known names, against timm and the original repositories."""

from __future__ import annotations

import importlib.util

import pytest

from dinokit import load_backbone
from dinokit.errors import MissingExtraError, UsageError
from dinokit.loading.foreign import bare_weights_config
from dinokit.loading.zoo import ZOO
from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.model_folder.reference_networks import network_of
from dinokit.model_folder.weights import expected_shapes
from dinokit.pictures.preprocess import Preprocessing

has_torch = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not has_torch, reason="torch is not installed")


@needs_torch
@pytest.mark.parametrize("name", sorted(ZOO))
def test_known_names_against_timm(name: str) -> None:
    """Sizes, parameters, repository and licence, as timm itself has them."""
    timm = pytest.importorskip("timm")
    import torch

    from dinokit.runtime.torch import describe

    known = ZOO[name]
    tagged = known.repo.removeprefix("timm/")
    published = timm.get_pretrained_cfg(tagged)
    assert published.hf_hub_id == known.repo
    assert published.license == known.licence
    assert (published.mean, published.std) == (known.preprocessing.mean, known.preprocessing.std)
    with torch.device("meta"):
        module = timm.create_model(known.timm_architecture, num_classes=0, **known.model_args)
    assert tagged.split(".")[0] == known.timm_architecture
    assert sum(p.numel() for p in module.parameters()) == known.params
    seen, said = describe(module), known.vit
    for size in ("embed_dim", "depth", "num_heads", "patch_size", "image_size", "num_register_tokens"):
        assert getattr(seen, size) == getattr(said, size), size
    for kind in ("layer_norm_eps", "qkv_bias", "ffn", "position"):
        assert getattr(seen, kind) == getattr(said, kind), kind
    assert any(n.endswith(("ls1.gamma", "gamma_1")) for n in module.state_dict()) == said.layer_scale


@pytest.mark.parametrize(
    ("name", "engine", "why"),
    [
        ("dinov2_vits14", "auto", "its ONNX graph cannot be written"),
        ("dino_vits16", "torch", "with engine='torch'"),
    ],
)
def test_a_name_that_needs_torch_says_so_before_it_downloads(
    name: str, engine: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_download(*_: object, **__: object) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("dinokit.loading.locate.hub_file", no_download)
    monkeypatch.setattr("dinokit.loading.load._torch_is_installed", lambda: False)
    if engine == "auto":  # no known name is such any more, but the next family may be
        monkeypatch.setattr("dinokit.loading.zoo.can_write", lambda vit: False)
    with pytest.raises(MissingExtraError, match=rf"{name} .*{why}.*pip install 'dinokit\[train\]'"):
        load_backbone(name, engine=engine)


def test_preprocessing_is_the_original_repositories() -> None:
    """dinov2's data/transforms.py; dinov3's README: squashed by torchvision's default filter."""
    assert ZOO["dinov2_vitl14_reg"].preprocessing == Preprocessing(256, (224, 224), "bicubic")
    assert ZOO["dinov3_vitl16"].preprocessing == Preprocessing((256, 256), (256, 256), "bilinear")


def test_dino_v1_runs_without_torch_and_with_the_official_crop() -> None:
    for name in ("dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"):
        assert "onnx" in ZOO[name].engines
        assert ZOO[name].preprocessing == Preprocessing(256, (224, 224), "bicubic")
        assert ZOO[name].vit.pos_embed_resize == PosEmbedResize(0.1, False)


# -- names that are none


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dino_vits61", r"Did you mean dino_vits16 or "),
        ("dinov3-vitl16-sat", r"Did you mean dinov3_vitl16_sat493m or "),
        ("vit_small_patch16_224.dino", r"It is timm's name for dino_vits16\."),
        ("vit_large_patch14_reg4_dinov2", r"It is timm's name for dinov2_vitl14_reg\."),
        ("vit_base_patch16_224.augreg_in21k", r"as timm/vit_base_patch16_224\.augreg_in21k\."),
        ("vit_base_patch16_224", r"as timm/vit_base_patch16_224\.TAG\."),
        (
            "dino-xcit-small-12-p8",
            r"\(user/model\)\. facebookresearch/dino publishes dino_xcit_small_12_p8 as a file",
        ),
        ("dino_resnet50", r"/dino/dino_resnet50_pretrain/dino_resnet50_pretrain\.pth and name the file"),
        ("resnet50", r"a network of timm's, .* train --set arch=resnet50\. .*/dino_resnet50_pretrain\.pth"),
        ("convnext_tiny.fb_in1k", r"a network of timm's, .* train --set arch=convnext_tiny\. Known"),
        ("holiday", r"\(user/model\)\. Known names: starter, dino_vits16, "),
    ],
)
def test_a_name_that_is_none_is_told_what_it_may_mean(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        load_backbone(name)


def test_the_files_that_are_told_of_are_read() -> None:
    """What stands in their error is a network whose .pth is known by its shapes, under timm's name for it."""
    timm = pytest.importorskip("timm")
    import torch

    from dinokit.loading.unknown_names import _AS_FILES

    for name in _AS_FILES:
        architecture = name.removeprefix("dino_") + ("_224" if "xcit" in name else "")
        with torch.device("meta"):
            weights = timm.create_model(architecture, num_classes=0).state_dict()
        found = network_of({key: tuple(value.shape) for key, value in weights.items()})
        assert found is not None and found[0] == architecture


def test_satellites_have_colours_of_their_own() -> None:
    """dinov3's README, "Image transforms"; a published file says so by its name only."""
    wanted = Preprocessing(
        (256, 256), (256, 256), "bilinear", mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143)
    )
    known = ZOO["dinov3_vitl16_sat493m"]
    assert known.preprocessing == wanted
    shapes = expected_shapes(known.vit)
    assert shapes is not None
    for name, expected in (
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff", wanted),
        ("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd", ZOO["dinov3_vitl16"].preprocessing),
    ):
        assert bare_weights_config(shapes, name=name, source="").preprocessing == expected
