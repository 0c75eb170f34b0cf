"""An engine that computes something simple that can be checked by hand, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EMBED_DIM, HEADS, PATCH = 6, 2, 8


class FakeEngine:
    """Embedding: mean and spread of each channel. Tokens: the same of each patch. Attention: brightness."""

    name, device, precision = "fake", "cpu", "fp32"

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(
        self, pixel_values: NDArray[np.float32], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        self.shapes.append(pixel_values.shape)
        b, c, h, w = pixel_values.shape
        grid = pixel_values.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).transpose(0, 2, 4, 1, 3, 5)
        patches = grid.reshape(b, -1, c, PATCH * PATCH)
        tokens = np.concatenate([patches.mean(-1), patches.std(-1)], -1)
        flat = pixel_values.reshape(b, c, -1)
        cls = np.concatenate([flat.mean(-1), flat.std(-1)], -1)
        bright = np.exp(patches.mean((2, 3)))
        attention = bright / (bright.sum(-1, keepdims=True) + 1)
        out = {
            "pooler_output": cls,
            "last_hidden_state": np.concatenate([cls[:, None], tokens], 1),
            "attention": np.stack([attention, attention[:, ::-1]], 1),
        }
        return {name: out[name].astype(np.float32) for name in outputs}
