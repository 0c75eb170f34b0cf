"""Tokens of inner blocks: reads a request for them, names the engine's outputs, and arranges what they return.

As ``get_intermediate_layers`` of facebookresearch/dinov2 (``models/vision_transformer.py``) and
``forward_intermediates`` of timm: blocks are counted from 0, and the last one's tokens after the final norm are what
the network outputs. transformers' ``hidden_states`` begin with the input of the first block, so block i is i + 1.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.contract import TOKENS, block_output
from dinokit.runtime import Engine

__all__ = ["TokenRequest", "read_token_request", "block_numbers"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TokenRequest:
    """A request for tokens, of a network with an (h, w) grid of patches and tokens of width D."""

    config: BackboneConfig
    patch_shape: tuple[int, int, int]
    """(h, w, D)"""
    outputs: tuple[str, ...] = (TOKENS,)
    """The engine's output for each of the L layers, in their order."""
    layer_axis: bool = False
    """Whether the result has an axis for the L layers; otherwise L is 1."""
    class_token: bool = False
    """Whether the CLS token precedes the patches' tokens, which are then not on a grid."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one picture's result: (h, w, D) or (1 + h·w, D), with ``layer_axis`` (L, …)."""
        h, w, dim = self.patch_shape
        one = (1 + h * w, dim) if self.class_token else self.patch_shape
        return (len(self.outputs), *one) if self.layer_axis else one

    def arrange(self, found: Mapping[str, Floats], crops: tuple[int, ...]) -> Floats:
        """Arranges the outputs of a run as (B, \\*shape).

        Args:
            found: the arrays of :attr:`outputs`.
            crops: (B, H, W, C), the shape of the network's input.
        """
        layers = [self._layer(found[name], name, crops) for name in self.outputs]
        return np.stack(layers, axis=1) if self.layer_axis else layers[0]

    def split(self, both: Floats) -> tuple[Floats, Floats]:
        """Splits a result with ``class_token`` into views: patches (…, h, w, D) and CLS (…, D)."""
        return both[..., 1:, :].reshape(*both.shape[:-2], *self.patch_shape), both[..., 0, :]

    def _layer(self, tokens: Floats, output: str, crops: tuple[int, ...]) -> Floats:
        """(B, h, w, D) or (B, 1 + h·w, D)"""
        has_prefix = output == TOKENS or isinstance(self.config.architecture, VitArchitecture)
        patches = tokens[:, self.config.num_prefix_tokens :] if has_prefix else tokens
        h, w, dim = self.patch_shape
        if patches.shape[1] != h * w:
            raise UsageError(
                f"{self.config.name} makes {patches.shape[1]} cells of {crops[1]}x{crops[2]} px, not {h}x{w}; use an "
                f"image size that is a multiple of {self.config.patch_size}"
            )
        if self.class_token:
            return np.concatenate([tokens[:, :1], patches], axis=1)
        return patches.reshape(-1, h, w, dim)


def read_token_request(
    config: BackboneConfig,
    engine: Engine,
    patch_shape: tuple[int, int, int],
    *,
    layers: Iterable[int] | None,
    norm: bool,
    class_token: bool,
) -> TokenRequest:
    """Reads a request for tokens.

    Args:
        config: describes the network.
        engine: computes it.
        patch_shape: (h, w, D).
        layers: numbers of blocks, as for :func:`block_numbers`; None: the last one, without an axis for it.
        norm: tokens go through the network's final norm.
        class_token: return the CLS tokens, too.

    Raises:
        UsageError: there are no such blocks or tokens, or this engine does not output those of inner blocks.
    """
    is_vit = isinstance(config.architecture, VitArchitecture)
    if class_token and not is_vit:
        raise UsageError(
            f"{config.name} is not a Vision Transformer of the DINO family, so it has no class token to return; "
            "use embed for the vector of a picture"
        )
    if layers is None and norm:
        return TokenRequest(config, patch_shape, class_token=class_token)
    depth: int | None = config.vit.depth if is_vit else getattr(engine, "n_blocks", None)
    if depth is None:
        raise UsageError(_why_no_blocks(config.name, engine))
    numbers = block_numbers([-1] if layers is None else layers, depth, config.name)
    # Every engine and file outputs a ViT's last block after the norm. Other networks may have more after it.
    names = tuple(
        TOKENS if is_vit and norm and number == depth - 1 else block_output(number, norm=norm)
        for number in numbers
    )
    return TokenRequest(config, patch_shape, names, layers is not None, class_token)


def block_numbers(layers: Any, depth: int, name: str) -> list[int]:
    """The numbers in ``layers``, all counted from 0.

    Args:
        layers: a list, or another iterable, of whole numbers; negative ones count from the end.
        depth: the number of blocks.
        name: of the model, for errors.

    Raises:
        UsageError: it is not such a list, it is empty, or there is no such block.
    """
    in_order = isinstance(layers, Iterable) and not isinstance(
        layers, str | bytes | set | frozenset | Mapping
    )
    if not in_order:
        hint = ""
        if isinstance(layers, int) and 0 < layers <= depth:  # dinov2's and timm's n=4
            hint = f", or {list(range(-layers, 0))} for the last {layers}"
        raise UsageError(
            f"layers={layers!r} is not a list of blocks; expected one such as [{depth - 1}]{hint}"
        )
    layers = list(layers)
    try:
        numbers = [operator.index(number) for number in layers]
    except TypeError:
        raise UsageError(f"layers={layers!r} must be integers, for example [{depth - 1}]") from None
    if not numbers:
        raise UsageError(f"layers=[] is empty; expected one or more blocks, such as [{depth - 1}]")
    if wrong := [number for number in numbers if not -depth <= number < depth]:
        raise UsageError(
            f"{name} has no block {wrong[0]} (layers={layers!r}) but {depth} blocks, 0 to {depth - 1}; -1 is the last, "
            f"-{depth} the first"
        )
    return [number % depth for number in numbers]


def _why_no_blocks(name: str, engine: Engine) -> str:
    if engine.name == "torch":
        return (
            f"layers and norm=False are not available for {name}, whose blocks have maps of different sizes; use "
            "timm's backbone.module.forward_intermediates for the maps of its stages"
        )
    return (
        f"layers and norm=False are not available for {name} on ONNX Runtime: it is not a Vision Transformer of the "
        "DINO family, and its graph outputs the last feature map only. If all its blocks have maps of one size, as an "
        'XCiT\'s, use load_backbone(…, engine="torch")'
    )
