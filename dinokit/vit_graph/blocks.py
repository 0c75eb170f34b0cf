"""One pre-norm Transformer block of any DINO generation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.model_folder.architecture import VitArchitecture
from dinokit.vit_graph.rope import turn
from dinokit.vit_graph.writer import GraphWriter

__all__ = ["block"]

_LAYER_SCALE = {"learned": "ls{}.gamma", "rope": "gamma_{}"}  # timm's names in its two families


def block(
    g: GraphWriter, vit: VitArchitecture, name: str, x: str, tables: tuple[str, str] | None
) -> tuple[str, str]:
    """One block.

    Args:
        g: where it is written.
        vit: the sizes.
        name: its prefix in the checkpoint, ``blocks.0``.
        x: (B, T, D).
        tables: cosines and sines of :func:`dinokit.vit_graph.rope.rotation`, or None.

    Returns:
        The tokens (B, T, D), and the attention (B, h, T, T) whose rows sum to 1.
    """
    mixed, attention = _self_attention(
        g, vit, name, g.layer_norm(f"{name}.norm1", x, epsilon=vit.layer_norm_eps), tables
    )
    x = g.op("Add", x, _layer_scale(g, vit, name, 1, mixed))
    mixed = _feed_forward(g, vit, name, g.layer_norm(f"{name}.norm2", x, epsilon=vit.layer_norm_eps))
    return g.op("Add", x, _layer_scale(g, vit, name, 2, mixed)), attention


def _layer_scale(g: GraphWriter, vit: VitArchitecture, name: str, index: int, x: str) -> str:
    # It could be folded into the layer before, but its values may be as small as 1e-5, where half precision has few
    # digits left for the product.
    if not vit.layer_scale:
        return x
    scale = f"{name}.{_LAYER_SCALE[vit.position].format(index)}"
    return g.op("Mul", x, g.weight(scale, g.checkpoint[scale]))


# -- attention


def _self_attention(
    g: GraphWriter, vit: VitArchitecture, name: str, x: str, tables: tuple[str, str] | None
) -> tuple[str, str]:
    """softmax(q kT / sqrt(d)) v in h heads, then the projection.

    Returns:
        The mixed tokens (B, T, D), and the softmax (B, h, T, T).
    """
    queries, keys, values = (_heads(g, vit, name, part, x) for part in "qkv")  # (B, T, h, d) each
    if tables is not None:
        queries, keys = turn(g, queries, tables), turn(g, keys, tables)
    queries = g.op("Transpose", queries, perm=[0, 2, 1, 3])  # (B, h, T, d)
    keys = g.op("Transpose", keys, perm=[0, 2, 3, 1])  # (B, h, d, T)
    values = g.op("Transpose", values, perm=[0, 2, 1, 3])  # (B, h, T, d)
    attention = g.op("Softmax", g.op("MatMul", queries, keys), axis=-1)
    mixed = g.op("Transpose", g.op("MatMul", attention, values), perm=[0, 2, 1, 3])  # (B, T, h, d)
    merged = g.op("Reshape", mixed, g.ints(0, 0, vit.embed_dim))
    return g.linear(f"{name}.attn.proj", merged), attention


def _heads(g: GraphWriter, vit: VitArchitecture, name: str, part: str, x: str) -> str:
    """(B, T, h, d): queries (scaled by 1/sqrt(d)), keys or values of the tokens; ``part`` is "q", "k" or "v"."""
    start = "qkv".index(part) * vit.embed_dim
    kernel = g.checkpoint[f"{name}.attn.qkv.weight"][start : start + vit.embed_dim]
    bias = _bias(g, vit, name, part)
    head_dim = vit.embed_dim // vit.num_heads
    if part == "q":
        scale = np.float32(head_dim**-0.5)
        kernel, bias = kernel * scale, None if bias is None else bias * scale
    x = g.affine(f"{name}.attn.{part}", kernel.T, bias, x)
    return g.op("Reshape", x, g.ints(0, 0, vit.num_heads, head_dim))


def _bias(g: GraphWriter, vit: VitArchitecture, name: str, part: str) -> NDArray[Any] | None:
    """One vector of three parts for DINO v1 and DINOv2; separate ones for DINOv3, whose keys have none."""
    if not vit.qkv_bias or (vit.position == "rope" and part == "k"):
        return None
    if vit.position == "rope":
        return g.checkpoint[f"{name}.attn.{part}_bias"]
    return np.split(g.checkpoint[f"{name}.attn.qkv.bias"], 3)["qkv".index(part)]


# -- the feed-forward network


def _feed_forward(g: GraphWriter, vit: VitArchitecture, name: str, x: str) -> str:
    if vit.ffn == "swiglu":
        return _swiglu(g, vit, f"{name}.mlp", x)
    # exact GELU, with erf: torch's default
    return g.linear(f"{name}.mlp.fc2", g.op("Gelu", g.linear(f"{name}.mlp.fc1", x)))


def _swiglu(g: GraphWriter, vit: VitArchitecture, name: str, x: str) -> str:
    """fc2(silu(gate(x)) * up(x)), silu(a) = a sigmoid(a). DINOv2 stores gate and up in one matrix, gate first."""
    if vit.position == "rope":
        gate, up = g.linear(f"{name}.fc1_g", x), g.linear(f"{name}.fc1_x", x)
    else:
        parts = [np.split(g.checkpoint[f"{name}.fc1.{kind}"], 2) for kind in ("weight", "bias")]
        gate, up = (
            g.affine(f"{name}.fc1_{which}", kernel.T, bias, x)
            for which, kernel, bias in zip("gx", *parts, strict=True)
        )
    gate = g.op("Mul", gate, g.op("Sigmoid", gate))
    return g.linear(f"{name}.fc2", g.op("Mul", gate, up))
