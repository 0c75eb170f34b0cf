"""A DINO Vision Transformer as an ONNX graph, written straight from its weights: no torch, no tracing.

    model = build_vit_graph(vit, weights)             # onnx.ModelProto, opset 20, standard operators only
    model, weights = split_vit_graph(vit, weights)    # its large weights outside, for models of any size

It covers DINO v1, DINOv2 with and without registers, and DINOv3's ViTs. ``writer.py`` collects operators and weights;
``tokens.py``, ``rope.py`` and ``blocks.py`` have one function for each part of the network; this file composes them;
``storage.py`` decides where the bytes of the weights go. A tensor is passed around by its name, and a comment on the
line gives its shape: B batch, T tokens (CLS, then R registers, then patches), N patches, D width, h heads, d = D / h.

The graph's input and outputs are those of :mod:`dinokit.model_folder.contract`; the tokens of inner blocks
(``block_output``) are outputs only on request.

The mathematics is that of facebookresearch's ``dino``, ``dinov2`` and ``dinov3``; only the order of operations differs:

- q, k and v have a matrix each, stored as (in, out), so that no weight is transposed at inference, and the
  attention's scale 1/sqrt(d) is folded into q's weights (exact for d = 64, a power of four; otherwise it rounds the
  last bit);
- the patch embedding is a matrix product over flattened patches. If a picture's sides are not multiples of the patch,
  the runtime raises an error, where a convolution would silently crop.

All outputs are slices of what the network computes anyway: requesting all of them costs nothing, except that the tokens
of an inner block are kept and pass through the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError
from dinokit.model_folder.architecture import Architecture, VitArchitecture
from dinokit.model_folder.contract import ATTENTION, INPUT, POOLED, TOKENS, block_output, declared_shapes
from dinokit.model_folder.weights import check_weights, expected_shapes
from dinokit.vit_graph.blocks import block
from dinokit.vit_graph.rope import rotation
from dinokit.vit_graph.storage import LARGEST_FILE, MemoryStorage, inside
from dinokit.vit_graph.tokens import (
    patch_embedding,
    patch_grid,
    position_embedding,
    prepend_cls_and_registers,
)
from dinokit.vit_graph.writer import OPSET, GraphWriter

if TYPE_CHECKING:
    import onnx

__all__ = ["OPSET", "build_vit_graph", "can_write", "split_vit_graph"]


# -------------------- what can be written


def can_write(architecture: Architecture) -> bool:
    """Whether :func:`build_vit_graph` knows this architecture."""
    return isinstance(architecture, VitArchitecture) and not _unsupported(architecture)


def _unsupported(vit: VitArchitecture) -> list[str]:
    """The parts of the architecture that cannot be written here, in words."""
    head_dim = vit.embed_dim // vit.num_heads
    checks = {
        f"the feed-forward network {vit.ffn!r}": vit.ffn not in ("mlp", "swiglu"),
        f"the position embedding {vit.position!r}": vit.position not in ("learned", "rope"),
        f"rotated heads of width {head_dim}, not a multiple of 4": vit.position == "rope"
        and head_dim % 4 != 0,
    }
    return [name for name, present in checks.items() if present]


def _check_weights(vit: VitArchitecture, weights: Mapping[str, NDArray[Any]]) -> None:
    """Raises ModelError unless the weights are exactly those of the architecture."""
    expected = expected_shapes(vit)
    assert expected is not None  # every architecture that can be written has a table of shapes
    found = {name: tuple(values.shape) for name, values in weights.items()}
    if problems := check_weights(found, expected, "the checkpoint"):
        raise ModelError(
            f"the weights do not fit the architecture: {'; '.join(problems)}. "
            "Check that config.json and the weights belong together"
        )


# -------------------- the model, its weights inside or in memory


def build_vit_graph(
    vit: VitArchitecture,
    weights: Mapping[str, NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    blocks: Collection[str] = (),
) -> onnx.ModelProto:
    """The ONNX model of a Vision Transformer; :mod:`dinokit.model_folder.contract` lists its input and outputs.

    Args:
        vit: the sizes, and how a learned position embedding is resized at other picture sizes.
        weights: timm's names (those of facebookresearch/dino for DINO v1; :mod:`dinokit.model_folder.weight_names`
            translates others), any float dtype; the graph holds them as float32.
        metadata: texts for the file's ``metadata_props``, such as the model folder's contract.
        blocks: further outputs, named by :func:`dinokit.model_folder.contract.block_output`: tokens of inner blocks.

    Raises:
        ModelError: the architecture has parts that cannot be written (see :func:`can_write`), the weights do not
            belong to it or are too large for one ONNX file, or there is no such block.
    """
    g = _write(vit, weights, blocks)
    if g.size >= LARGEST_FILE:
        raise ModelError(
            f"the weights take {g.size / 2**30:.1f} GiB as float32; one ONNX file holds less than 2 GiB. "
            "Use split_vit_graph, which keeps them outside the model"
        )
    return _finish(g, vit, metadata, inside, blocks)


def split_vit_graph(
    vit: VitArchitecture,
    weights: Mapping[str, NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    blocks: Collection[str] = (),
) -> tuple[onnx.ModelProto, dict[str, NDArray[np.float32]]]:
    """The model without its large weights, and these weights by their names in the model.

    ``SessionOptions.add_external_initializers`` passes them to a session without serialising them, so their size is
    not limited. Arguments and errors as in :func:`build_vit_graph`.
    """
    memory = MemoryStorage()
    return _finish(_write(vit, weights, blocks), vit, metadata, memory, blocks), memory.weights


# -------------------- the whole network


def _write(
    vit: VitArchitecture, weights: Mapping[str, NDArray[Any]], blocks: Collection[str] = ()
) -> GraphWriter:
    """All operators from the input to the three outputs and the requested outputs of inner blocks."""
    if missing := _unsupported(vit):
        raise ModelError(
            f"the ONNX graph of this Vision Transformer cannot be written: it has {', '.join(missing)}. "
            "Use the torch engine (engine='torch', extra [train])"
        )
    _check_weights(vit, weights)
    there = {block_output(index, norm=norm) for index in range(vit.depth) for norm in (False, True)}
    if unknown := sorted(set(blocks) - there):
        raise ModelError(
            f"a Vision Transformer of {vit.depth} blocks has no output {', '.join(map(repr, unknown))}; expected "
            f"'blocks.0' to 'blocks.{vit.depth - 1}', each with or without '.norm'"
        )

    g = GraphWriter({name: np.asarray(values, np.float32) for name, values in weights.items()})
    with g.scope("embeddings"):
        grid = patch_grid(g, vit)  # (2,)
        x = patch_embedding(g, vit, grid)  # (B, N, D)
        if vit.position == "learned":
            x = g.op("Add", x, position_embedding(g, vit, grid))
        x = prepend_cls_and_registers(g, vit, x)  # (B, T, D)
        tables = rotation(g, vit, grid) if vit.position == "rope" else None
    for index in range(vit.depth):
        with g.scope(f"blocks.{index}"):
            x, attention = block(g, vit, f"blocks.{index}", x, tables)  # (B, T, D), (B, h, T, T)
            _outputs_of_block(g, vit, index, x, blocks)
    with g.scope("outputs"):
        tokens = g.layer_norm("norm", x, epsilon=vit.layer_norm_eps, output=TOKENS)
        g.op("Gather", tokens, g.scalar(0), axis=1, output=POOLED)
        cls_row = g.op("Gather", attention, g.scalar(0), axis=2)  # (B, h, T)
        first, end = g.ints(vit.num_prefix_tokens), g.ints(np.iinfo(np.int64).max)
        g.op("Slice", cls_row, first, end, g.ints(2), output=ATTENTION)
    return g


def _outputs_of_block(
    g: GraphWriter, vit: VitArchitecture, index: int, x: str, blocks: Collection[str]
) -> None:
    raw, normed = (block_output(index, norm=norm) for norm in (False, True))
    if raw in blocks:
        # A copy: if the sum x were an output itself, ONNX Runtime would no longer fuse it with the next block's norm,
        # and the last bits of the embedding would change.
        g.op("Identity", x, output=raw)
    if normed in blocks:
        g.layer_norm("norm", x, epsilon=vit.layer_norm_eps, output=normed)


def _finish(
    g: GraphWriter,
    vit: VitArchitecture,
    metadata: Mapping[str, str] | None,
    store: Callable[[onnx.TensorProto, NDArray[Any]], None],
    blocks: Collection[str] = (),
) -> onnx.ModelProto:
    shapes = declared_shapes(vit)
    shapes |= dict.fromkeys(blocks, shapes[TOKENS])
    return g.finish(
        inputs={INPUT: shapes.pop(INPUT)},
        outputs=shapes,
        metadata=metadata or {},
        store=store,
    )
