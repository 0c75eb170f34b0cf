"""An engine that computes something simple that can be checked by hand, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from small_models import config_for

from dinokit.features.backbone import Backbone
from dinokit.model_folder.architecture import VitArchitecture

EMBED_DIM, HEADS, PATCH = 6, 2, 8
FAKE_VIT = VitArchitecture(
    embed_dim=EMBED_DIM, depth=1, num_heads=HEADS, patch_size=PATCH, image_size=(32, 32)
)


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


class InterruptedEngine(FakeEngine):
    """As if Ctrl-C were pressed during the n-th run of the network."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def run(
        self, pixel_values: NDArray[np.float32], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        if len(self.shapes) == self.at:
            raise KeyboardInterrupt
        return super().run(pixel_values, outputs)


def backbone_of(engine: Any = None, sha: str = "a" * 64, **options: Any) -> Backbone:
    """A backbone that this engine computes."""
    return Backbone(
        config_for(FAKE_VIT, "fake"), engine or FakeEngine(), weights_sha256=sha, source="a test", **options
    )
