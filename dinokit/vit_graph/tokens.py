"""From pixels to tokens: patches, the learned position embedding, CLS and registers."""

from __future__ import annotations

from typing import Any

from dinokit.model_folder.architecture import PosEmbedResize, VitArchitecture
from dinokit.model_folder.contract import INPUT
from dinokit.vit_graph.writer import GraphWriter

__all__ = ["patch_embedding", "patch_grid", "position_embedding", "prepend_cls_and_registers"]


def patch_grid(g: GraphWriter, vit: VitArchitecture) -> str:
    """(2,) int64: rows and columns of patches in the input pictures."""
    return g.op("Div", g.op("Shape", INPUT, start=2, end=4), g.ints(vit.patch_size))


def patch_embedding(g: GraphWriter, vit: VitArchitecture, grid: str) -> str:
    """(B, N, D): every patch, flattened, through one linear layer."""
    p, channels = vit.patch_size, vit.in_chans
    rows = g.op("Slice", grid, g.ints(0), g.ints(1))
    columns = g.op("Slice", grid, g.ints(1), g.ints(2))
    split = g.op("Concat", g.ints(0, channels), rows, g.ints(p), columns, g.ints(p), axis=0)  # 0 keeps B
    x = g.op("Reshape", INPUT, split)  # (B, C, rows, p, columns, p)
    x = g.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])  # (B, rows, columns, C, p, p)
    x = g.op("Reshape", x, g.ints(0, -1, channels * p * p))  # (B, N, C p p)
    kernel = g.checkpoint["patch_embed.proj.weight"].reshape(vit.embed_dim, -1)  # (D, C p p)
    return g.affine("patch_embed.proj", kernel.T, g.checkpoint["patch_embed.proj.bias"], x)


def position_embedding(g: GraphWriter, vit: VitArchitecture, grid: str) -> str:
    """(1, N, D): the patches' learned position embedding, resized to the pictures' grid.

    At the trained grid it is unchanged, at any other it is resized by the rule ``vit.pos_embed_resize``.
    facebookresearch/dino leaves it unchanged if the number of patches is the trained one *and* the picture is square,
    which is the same condition for its square trained grids.
    """
    rows, columns = vit.grid
    of_patches = g.checkpoint["pos_embed"][:, _positions_of_cls(vit) :]
    planes = of_patches.reshape(1, rows, columns, vit.embed_dim).transpose(0, 3, 1, 2)
    trained = g.weight("pos_embed.patches", planes)  # (1, D, rows, columns): Resize works on planes
    resized = _resize(g, trained, vit.grid, grid, vit.pos_embed_resize)
    flat = g.op("Reshape", resized, g.ints(0, 0, -1))  # (1, D, N)
    return g.op("Transpose", flat, perm=[0, 2, 1])


def prepend_cls_and_registers(g: GraphWriter, vit: VitArchitecture, patches: str) -> str:
    """(B, T, D): the CLS token with its position embedding added, the registers, then the patches."""
    token = g.checkpoint["cls_token"]  # (1, 1, D)
    if vit.position == "learned" and _positions_of_cls(vit):
        token = token + g.checkpoint["pos_embed"][:, :1]
    prefix = [g.weight("cls_token", token)]
    if vit.num_register_tokens:
        prefix.append(g.weight("reg_token", g.checkpoint["reg_token"]))  # (1, R, D)
    batch = g.op("Shape", INPUT, start=0, end=1)
    shape = g.op("Concat", batch, g.ints(1, 1), axis=0)  # a dimension of 1 keeps R and D
    return g.op("Concat", *(g.op("Expand", token, shape) for token in prefix), patches, axis=1)


def _positions_of_cls(vit: VitArchitecture) -> int:
    # With registers, timm adds the CLS token's position to the token itself.
    return 0 if vit.num_register_tokens else 1


def _resize(g: GraphWriter, planes: str, trained: tuple[int, int], grid: str, rule: PosEmbedResize) -> str:
    """``planes`` (1, D, *trained) resized to another grid as by ``torch.nn.functional.interpolate``."""
    from onnx import TensorProto

    kernel: dict[str, Any] = {
        "mode": "cubic",
        "coordinate_transformation_mode": "half_pixel",
        # torch has two bicubic kernels: OpenCV's, which repeats the border, and with antialias Pillow's,
        # which ignores what lies outside.
        "cubic_coeff_a": -0.5 if rule.antialias else -0.75,
        "antialias": int(rule.antialias),
        "exclude_outside": int(rule.antialias),
    }
    if not rule.offset:  # at the trained grid this is the identity anyway
        sizes = g.op("Concat", g.op("Shape", planes, start=0, end=2), grid, axis=0)
        return g.op("Resize", planes, "", "", sizes, **kernel)
    # The sampling step comes from (grid + offset) / trained, not from the sizes, so it would move the positions a
    # little even at the trained grid. There the offset is dropped: the scale is exactly 1 and the resize the identity.
    # This avoids an If, which CUDA graphs and several runtimes do not support.
    equal = g.op("Cast", g.op("Equal", grid, g.ints(*trained)), to=TensorProto.FLOAT)  # (2,) of 0 and 1
    differs = g.op("Sub", g.floats(1.0), g.op("ReduceMin", equal))  # (1,): 0 if rows and columns are equal
    offset = g.op("Mul", differs, g.floats(rule.offset))
    scale = g.op("Add", g.op("Cast", grid, to=TensorProto.FLOAT), offset)
    scale = g.op("Div", scale, g.floats(*map(float, trained)))
    return g.op("Resize", planes, "", g.op("Concat", g.floats(1.0, 1.0), scale, axis=0), **kernel)
