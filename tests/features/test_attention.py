"""Masks of attention mass against facebookresearch/dino's own and against its formula in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinokit.errors import UsageError
from dinokit.features.attention import mass_masks, upsample_nearest

GOLDEN = Path(__file__).parents[1] / "golden" / "features.npz"
SIZES = ["32x32", "16x16", "48x32", "32x72", "96x64"]


@pytest.mark.parametrize("size", SIZES)
def test_masks_equal_the_reference(size: str) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        np.testing.assert_array_equal(mass_masks(golden[f"attention.{size}"], 0.6), golden[f"mask60.{size}"])


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.6, 0.9, 1.0])
def test_masks_equal_the_formula_in_torch(mass: float) -> None:
    torch = pytest.importorskip("torch")
    random = torch.Generator().manual_seed(0)
    attention = torch.softmax(4 * torch.randn(200, 6, 49, generator=random), -1)
    ascending, order = torch.sort(attention, stable=True)
    ascending = ascending / ascending.sum(-1, keepdim=True)
    kept = torch.cumsum(ascending, -1) > 1 - mass
    expected = torch.gather(kept, -1, torch.argsort(order))
    agree = mass_masks(attention.numpy(), mass) == expected.numpy()
    # Sums of 49 numbers differ in the last bit between the two, so one patch in a hundred thousand may flip.
    assert agree.mean() > 0.9999


def test_a_known_case() -> None:
    attention = np.array([0.1, 0.4, 0.2, 0.3], np.float32)
    assert mass_masks(attention, 0.5).tolist() == [False, True, False, True]
    assert mass_masks(attention * 7, 0.5).tolist() == [False, True, False, True]  # need not sum to 1
    assert mass_masks(attention, 1.0).all()
    assert mass_masks(attention, 1e-6).tolist() == [False, True, False, False]


def test_kept_mass_is_enough_and_not_more_than_needed() -> None:
    attention = np.random.default_rng(0).dirichlet(np.ones(64), (5, 3)).astype(np.float32)
    kept = mass_masks(attention, 0.6)
    sums = (attention * kept).sum(-1)
    assert (sums >= 0.6 - 1e-5).all()
    smallest = np.where(kept, attention, np.inf).min(-1)
    assert (sums - smallest < 0.6 + 1e-5).all()


@pytest.mark.parametrize("mass", [0, -0.1, 1.5, float("nan"), "0.6"])
def test_impossible_mass(mass: Any) -> None:
    with pytest.raises(UsageError, match="expected 0 < mass <= 1"):
        mass_masks(np.ones((2, 4), np.float32), mass)


def test_one_patch_at_least_is_kept() -> None:
    attention = np.random.default_rng(0).random((3, 9)).astype(np.float32)
    kept = mass_masks(attention, 1e-9)
    assert (kept.sum(axis=-1) == 1).all() and (kept.argmax(axis=-1) == attention.argmax(axis=-1)).all()


def test_upsampling_makes_flat_squares() -> None:
    maps = np.arange(6).reshape(1, 2, 3)
    np.testing.assert_array_equal(upsample_nearest(maps, 4), np.kron(maps, np.ones((1, 4, 4), int)))


def test_without_any_attention_one_patch_is_kept() -> None:
    assert mass_masks(np.zeros(4, np.float32), 0.6).sum() == 1
