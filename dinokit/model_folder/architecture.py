"""What a backbone is, in numbers.

:class:`VitArchitecture` is a Vision Transformer of the DINO family: enough to build it in any framework, or to write it
as an ONNX graph. :class:`TimmArchitecture` is any other network of timm (ResNet, XCiT, ConvNeXt …): enough to use it;
the network itself comes from timm, or from an ONNX file exported with timm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dinokit.errors import ModelError
from dinokit.files.plain_values import from_plain

__all__ = [
    "Architecture",
    "PosEmbedResize",
    "TimmArchitecture",
    "VitArchitecture",
    "architecture_from_json",
    "is_vit_name",
]

_HEAD_DIM = 64  # all published DINO ViTs (Ti 192/3, S 384/6, B 768/12, L 1024/16, g 1536/24, H+ 1280/20) …
_LARGE = (4096, 128)  # … but for DINOv3's 7B: width, and width of a head
# Beyond every existing network (the 7B has 40 blocks of 4096): a file that states more would only exhaust memory.
_MOST = 1 << 16
_MOST_BLOCKS = 1000
_MOST_MLP_RATIO = 64
_ROPE_GRID = 16  # patches a side at the size that DINOv3 is evaluated at: 256 pixels


@dataclass(frozen=True)
class PosEmbedResize:
    """How the position embedding is resized when a picture has another grid than it was trained on.

    A model keeps what it was trained with, so this is part of the model folder's contract.

    - facebookresearch/dino (`vision_transformer.py`, `interpolate_pos_encoding`): ``offset=0.1``,
      ``antialias=False``: bicubic (a = -0.75) with the *scale* ``(grid + 0.1) / trained grid``.
    - timm (`resample_abs_pos_embed`): ``offset=0``, ``antialias=True`` (then torch uses a = -0.5).
    - DINOv2: as DINO; its models with registers: ``offset=0``, ``antialias=True``.
    """

    offset: float = 0.1
    antialias: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.offset < 1:  # a whole patch more would be another grid
            raise ModelError(
                f"pos_embed_resize.offset={self.offset} is invalid; expected 0 or more and below 1"
            )


@dataclass(frozen=True)
class VitArchitecture:
    """Sizes of a Vision Transformer. All lengths that are pixels end in ``_px`` or are image sizes."""

    embed_dim: int
    """Width D of a token."""
    depth: int
    """Number of blocks."""
    num_heads: int
    patch_size: int
    """Side of a square patch, pixels."""
    image_size: tuple[int, int]
    """(H, W) in pixels that the position embedding belongs to; both multiples of ``patch_size``.

    With ``position="rope"`` nothing belongs to a size; this is the one the network was published with."""
    in_chans: int = 3
    mlp_ratio: float = 4.0
    num_register_tokens: int = 0
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    """Biases of queries, keys and values; with ``position="rope"`` of queries and values only (DINOv3)."""
    layer_scale: bool = False
    """Learned scale after attention and MLP (DINOv2)."""
    ffn: str = "mlp"
    """``mlp`` (Linear, exact GELU, Linear) or ``swiglu`` (``fc2(silu(gate(x)) * up(x))``).

    ``mlp_ratio`` counts the rows of timm's first layer: of gate and up together if they are one matrix
    (``position="learned"``, DINOv2 giant), of each if they are two (``position="rope"``, DINOv3)."""
    position: str = "learned"
    """``learned``: absolute, with an entry for the CLS token unless there are registers (DINO v1, DINOv2);
    ``rope``: queries and keys of the patches are rotated by their position (DINOv3)."""
    pos_embed_resize: PosEmbedResize = PosEmbedResize()

    def __post_init__(self) -> None:
        height, width = self.image_size
        sizes = {
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "image_size": min(height, width),
            "num_register_tokens + 1": self.num_prefix_tokens,
        }
        impossible = [f"{name}={size}" for name, size in sizes.items() if not 1 <= size <= _MOST]
        if impossible or self.depth > _MOST_BLOCKS or max(height, width) > _MOST:
            raise ModelError(f"the sizes of the architecture are invalid: {', '.join(impossible) or self}")
        if height % self.patch_size or width % self.patch_size:
            raise ModelError(
                f"image_size={height}x{width} is not a multiple of patch_size={self.patch_size}; "
                f"use {height // self.patch_size * self.patch_size}x{width // self.patch_size * self.patch_size}"
            )
        if not 0 < self.mlp_ratio <= _MOST_MLP_RATIO:
            raise ModelError(
                f"mlp_ratio={self.mlp_ratio} is invalid; expected above 0 and at most {_MOST_MLP_RATIO}"
            )
        if not 0 < self.layer_norm_eps < 1:
            raise ModelError(f"layer_norm_eps={self.layer_norm_eps} is invalid; expected between 0 and 1")
        if self.embed_dim % self.num_heads:
            raise ModelError(
                f"embed_dim={self.embed_dim} cannot be split into num_heads={self.num_heads} equal heads"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at ``image_size``."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return 1 + self.num_register_tokens

    @property
    def is_dino_v1(self) -> bool:
        """Whether this is the plain pre-norm ViT of DINO v1 (= transformers' dinov2 with layer scale 1)."""
        return (
            self.num_register_tokens == 0
            and not self.layer_scale
            and self.ffn == "mlp"
            and self.position == "learned"
            and self.qkv_bias
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        out = asdict(self)
        out["image_size"] = list(self.image_size)
        return out

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VitArchitecture:
        """The inverse of :meth:`to_json`. Raises ModelError on unknown, missing or wrong keys."""
        return from_plain(cls, values, "the architecture")

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        num_heads: int | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> VitArchitecture:
        """Reads the sizes of a DINO ViT of any generation off the shapes of its weights (timm's names).

        Shapes do not show ``num_heads``; if it is not given, heads are 64 wide (DINOv3's 7B: 128), as in every
        published DINO ViT. Nor do they show ``layer_norm_eps`` and ``pos_embed_resize``, which are those of the
        original repositories. ``image_size`` is (H, W) in pixels; without it, a learned position embedding is
        assumed to be square. Raises ModelError if the weights are not such a ViT, or not of that size.
        """
        rope = "pos_embed" not in shapes and "reg_token" in shapes
        try:
            embed_dim, in_chans, patch_size, _ = shapes["patch_embed.proj.weight"]
            registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
            grid = (
                (_ROPE_GRID, _ROPE_GRID)
                if rope
                else _grid_of(shapes["pos_embed"][1], registers, patch_size, image_size)
            )
            gate = "blocks.0.mlp.fc1_g.weight"
            hidden = shapes[gate if rope and gate in shapes else "blocks.0.mlp.fc1.weight"][0]
            inner = shapes["blocks.0.mlp.fc2.weight"][1]
            depth = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
            mlp_ratio = hidden / embed_dim
        except KeyError as error:
            raise ModelError(
                f"these weights are not a DINO Vision Transformer: {error} is missing"
            ) from error
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise ModelError(
                "these weights are not a DINO Vision Transformer: a name or shape among patch_embed.proj.weight, "
                "pos_embed, reg_token and blocks.* is invalid"
            ) from error
        swiglu = gate in shapes if rope else hidden == 2 * inner
        return cls(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=_usual_heads(embed_dim) if num_heads is None else num_heads,
            patch_size=patch_size,
            image_size=(grid[0] * patch_size, grid[1] * patch_size),
            in_chans=in_chans,
            mlp_ratio=mlp_ratio,
            num_register_tokens=registers,
            layer_norm_eps=1e-5 if rope else 1e-6,
            qkv_bias=("blocks.0.attn.q_bias" if rope else "blocks.0.attn.qkv.bias") in shapes,
            layer_scale=("blocks.0.gamma_1" if rope else "blocks.0.ls1.gamma") in shapes,
            ffn="swiglu" if swiglu else "mlp",
            position="rope" if rope else "learned",
            pos_embed_resize=PosEmbedResize(0.0, antialias=True) if registers else PosEmbedResize(),
        )


@dataclass(frozen=True)
class TimmArchitecture:
    """What users need to know of a network of timm other than a DINO ViT."""

    embed_dim: int
    """Width D of the embedding: timm's pooled features, without classifier."""
    stride: int
    """Side in pixels that one cell of the last feature map, or one patch, covers."""
    image_size: tuple[int, int]
    """(H, W) in pixels that the network was made for."""
    token_dim: int | None = None
    """Width of a token of ``last_hidden_state``, the flattened feature map; None if the network has none."""
    num_prefix_tokens: int = 0
    """Tokens before those of the feature map (XCiT: the class token)."""
    size_multiple: int | None = 1
    """Sides of a picture must be multiples of this; None: it takes ``image_size`` only."""
    in_chans: int = 3
    first_conv: str = ""
    """timm's name of the first layer."""
    classifier: str = ""
    """timm's name of the classifier that was left out."""

    @property
    def takes_any_size(self) -> bool:
        """Whether pictures of other sizes than ``image_size`` are possible."""
        return self.size_multiple is not None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the feature map of a picture; a cell that is cut off counts, as convolutions pad."""
        return -(-height // self.stride), -(-width // self.stride)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; ``kind`` tells it from a Vision Transformer's."""
        return {"kind": "timm", **asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TimmArchitecture:
        """The inverse of :meth:`to_json`. Raises ModelError on unknown, missing or wrong keys."""
        plain = {key: value for key, value in values.items() if key != "kind"}
        made = from_plain(cls, plain, "the architecture")
        sizes = (
            made.embed_dim,
            made.stride,
            made.token_dim,
            made.size_multiple,
            made.in_chans,
            *made.image_size,
        )
        if any(size is not None and size < 1 for size in sizes) or made.num_prefix_tokens < 0:
            raise ModelError(f"the architecture has invalid sizes: {values}")
        return made


Architecture = VitArchitecture | TimmArchitecture

# timm's families of Vision Transformers whose patch size and image size are arguments.
_VIT_NAMES = ("vit_", "deit", "eva", "flexivit_")


def is_vit_name(timm_architecture: str) -> bool:
    """Whether a timm name is that of a Vision Transformer, for which ``patch_size`` means something.

    By the name alone, since a recipe is checked where timm need not be installed.
    """
    return timm_architecture.startswith(_VIT_NAMES)


def architecture_from_json(values: Mapping[str, Any]) -> Architecture:
    """Either kind, from what its ``to_json`` gave. Raises ModelError on what neither understands."""
    kind = values.get("kind", "vit")  # absent for a ViT, the only kind at first
    if kind == "vit":
        return VitArchitecture.from_json(values)
    if kind == "timm":
        return TimmArchitecture.from_json(values)
    raise ModelError(
        f"the architecture has the unknown kind {kind!r}; perhaps a newer dinokit wrote it. Update dinokit."
    )


def _grid_of(
    n_positions: int, registers: int, patch_size: int, image_size: tuple[int, int] | None
) -> tuple[int, int]:
    """(rows, columns) of a learned position embedding, which has an entry for CLS unless there are registers."""
    n_patches = n_positions - (0 if registers else 1)
    if image_size is not None:
        rows, columns = (side // patch_size for side in image_size)
        if rows * columns != n_patches:
            raise ModelError(
                f"pos_embed has {n_patches} patch positions, but an image of {image_size[0]}x{image_size[1]} px has "
                f"{rows}x{columns} patches of {patch_size} px; expected as many positions as patches"
            )
        return rows, columns
    side = math.isqrt(max(0, n_patches))
    if side * side != n_patches:
        raise ModelError(
            f"pos_embed has {n_patches} patch positions, which is not a square grid; "
            "only a square grid can be inferred from the weights alone"
        )
    return side, side


def _usual_heads(embed_dim: int) -> int:
    head_dim = _LARGE[1] if embed_dim == _LARGE[0] else _HEAD_DIM
    if embed_dim % head_dim:
        raise ModelError(
            f"the number of heads cannot be inferred from the weights (width {embed_dim} is not a multiple of "
            f"{head_dim}); give num_heads"
        )
    return embed_dim // head_dim
