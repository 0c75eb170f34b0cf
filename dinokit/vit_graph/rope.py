"""DINOv3's rotary position embedding: rotates queries and keys of the patches by angles that depend on their position.

A head's d channels form d / 2 pairs (channel c with channel c + d / 2), and each pair is rotated in its plane: d / 4
pairs by the row, d / 4 by the column. CLS and registers have no position and are not rotated. The coordinates are those
of the patch centres, -1 … 1 over the picture, so nothing has to be resized for another picture size (Siméoni et al.,
DINOv3, arXiv:2508.10104).
"""

from __future__ import annotations

import math

import numpy as np

from dinokit.model_folder.architecture import VitArchitecture
from dinokit.vit_graph.writer import GraphWriter

__all__ = ["ROPE_THETA", "rotation", "turn"]

ROPE_THETA = 100.0
"""The base of the geometric series of periods, the same in all published DINOv3 models.

facebookresearch/dinov3 stores the periods in bfloat16; transformers and timm compute them in float32, as here.
"""


def rotation(g: GraphWriter, vit: VitArchitecture, grid: str) -> tuple[str, str]:
    """(T, 1, d / 2) each: cosines and sines of the tokens' angles; 1 and 0 for CLS and registers."""
    head_dim = vit.embed_dim // vit.num_heads
    quarter, prefix = head_dim // 4, (vit.num_prefix_tokens, 1, head_dim // 2)
    periods = np.float32(ROPE_THETA) ** (np.arange(quarter, dtype=np.float32) * np.float32(4 / head_dim))
    frequencies = g.weight("rope.frequencies", np.float32(1) / periods)
    shape = g.op("Concat", grid, g.ints(quarter), axis=0)
    by_axis = []
    for axis in range(2):  # 0: by the row of a patch, 1: by its column
        turns = g.op("Mul", _coordinates(g, grid, axis), g.floats(2 * math.pi))
        turns = g.op("Unsqueeze", turns, g.ints(*({0, 1, 2} - {axis})))  # (rows, 1, 1) or (1, columns, 1)
        by_axis.append(g.op("Expand", g.op("Mul", turns, frequencies), shape))  # (rows, columns, d / 4)
    angles = g.op("Reshape", g.op("Concat", *by_axis, axis=-1), g.ints(-1, 1, head_dim // 2))  # (N, 1, d / 2)
    ones = g.weight("rope.prefix_cos", np.ones(prefix, np.float32))
    zeros = g.weight("rope.prefix_sin", np.zeros(prefix, np.float32))
    return (
        g.op("Concat", ones, g.op("Cos", angles), axis=0),
        g.op("Concat", zeros, g.op("Sin", angles), axis=0),
    )


def _coordinates(g: GraphWriter, grid: str, axis: int) -> str:
    """(rows,) or (columns,): the patch centres along one axis, -1 … 1 from border to border."""
    from onnx import TensorProto

    count = g.op("Gather", grid, g.scalar(axis), axis=0)
    numbers = g.op("Cast", g.op("Range", g.scalar(0), count, g.scalar(1)), to=TensorProto.FLOAT)
    middles = g.op("Div", g.op("Add", numbers, g.floats(0.5)), g.op("Cast", count, to=TensorProto.FLOAT))
    return g.op("Sub", g.op("Mul", middles, g.floats(2.0)), g.floats(1.0))


def turn(g: GraphWriter, x: str, tables: tuple[str, str]) -> str:
    """(B, T, h, d) rotated: each pair (a, b) becomes (a cos - b sin, b cos + a sin)."""
    cos, sin = tables
    a, b = g.halves(x)
    turned_a = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
    turned_b = g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin))
    return g.op("Concat", turned_a, turned_b, axis=-1)
