"""Crops of two sizes through one pass give what timm's own pass gives for each size."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import timm
from torch import nn

from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.runtime.torch import create_vit
from dinokit.training.networks.network import Network
from dinokit.training.networks.shared_layers import can_share_layers, embed_sizes_together

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def small_vit(**more: Any) -> Any:
    torch.manual_seed(0)
    return create_vit("vit_tiny_patch16_224", {**SMALL, **more}, PosEmbedResize())


def crops() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 32, 32, generator=generator), torch.randn(6, 3, 16, 16, generator=generator)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("more", [{}, {"init_values": 0.5, "reg_tokens": 2}])
def test_embeddings_and_gradients_are_those_of_a_pass_for_each_size(
    fused: bool, more: dict[str, Any]
) -> None:
    vit, sizes = small_vit(**more), crops()
    for block in vit.blocks:
        block.attn.fused_attn = fused
    assert can_share_layers(vit)

    def gradients(embeddings: Any) -> dict[str, Any]:
        vit.zero_grad()
        # A weight for each number, so that no two can change places unseen.
        weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2))
        (embeddings * weights).sum().backward()
        return {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}

    apart = torch.cat([vit(size) for size in sizes])
    expected = gradients(apart)
    together, _ = embed_sizes_together(vit, sizes)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    found = gradients(together)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4, msg=name)


class WithoutSecond(nn.Module):
    """Stochastic depth that always leaves out the second crop, and tells tokens from crops by the dimensions."""

    def forward(self, x: Any) -> Any:
        assert x.ndim == 3
        kept = torch.ones(len(x), 1, 1)
        kept[1] = 0.0
        return x * kept


def test_stochastic_depth_leaves_out_whole_crops() -> None:
    vit, sizes = small_vit(), crops()
    for block in vit.blocks:
        block.drop_path1, block.drop_path2 = WithoutSecond(), WithoutSecond()
    apart = torch.cat([vit(size) for size in sizes])
    torch.testing.assert_close(embed_sizes_together(vit, sizes)[0], apart, atol=1e-5, rtol=0)


def test_other_networks_take_a_pass_for_each_size() -> None:
    # A mean over tokens, an attention of its own, no ViT at all.
    assert not can_share_layers(small_vit(global_pool="avg"))
    assert not can_share_layers(small_vit(qk_norm=True))
    assert not can_share_layers(timm.create_model("resnet10t", num_classes=0))


def test_a_distilled_vit_is_trained_on_the_mean_of_its_two_tokens() -> None:
    torch.manual_seed(0)
    vit = create_vit("deit_tiny_distilled_patch16_224", SMALL, PosEmbedResize()).eval()
    sizes = crops()
    found = Network(vit, nn.Identity())([size[:, None] for size in sizes]).embeddings.flatten(0, 1)
    torch.testing.assert_close(found, torch.cat([vit(size) for size in sizes]))


def test_the_network_uses_it_for_several_sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def spy(backbone: Any, sizes: Any, **options: Any) -> Any:
        calls.append(len(sizes))
        return embed_sizes_together(backbone, sizes, **options)

    monkeypatch.setattr("dinokit.training.networks.network.embed_sizes_together", spy)
    network = Network(small_vit(), nn.Linear(24, 5))
    one, two = crops()
    output = network([one.view(2, 2, 3, 32, 32), two.view(3, 2, 3, 16, 16)])
    assert calls == [2]
    assert output.logits.shape == (5, 2, 5) and output.embeddings.shape == (5, 2, 24)
    network([one.view(2, 2, 3, 32, 32)])
    assert calls == [2]
