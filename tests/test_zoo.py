"""The table of known names, against timm and the original repositories."""

from __future__ import annotations

import importlib.util

import pytest

from dinokit import load_backbone
from dinokit.architecture import PosEmbedResize
from dinokit.errors import MissingExtraError
from dinokit.preprocess import Preprocessing
from dinokit.zoo import ZOO

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
    assert published.mean == known.preprocessing.mean
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

    monkeypatch.setattr("dinokit.locate.hub_file", no_download)
    monkeypatch.setattr("dinokit.loading._torch_is_installed", lambda: False)
    if engine == "auto":  # no known name is such any more, but the next family may be
        monkeypatch.setattr("dinokit.zoo.can_write", lambda vit: False)
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
