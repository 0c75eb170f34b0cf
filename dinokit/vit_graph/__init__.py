"""A DINO Vision Transformer as an ONNX graph, written straight from its weights: no torch, no tracing.

    model = build_vit_graph(vit, weights)        # onnx.ModelProto, opset 20, standard operators only
    save_vit_graph("model.onnx", vit, weights)   # a file; beside it model.onnx_data from 2 GiB on

DINO v1, DINOv2 with and without registers, and DINOv3's ViTs. How to read this package: ``writer.py`` collects
operators and weights; ``tokens.py``, ``rope.py`` and ``blocks.py`` have one function for each part of the
network; this file composes them; ``storage.py`` says where the weights' bytes go. A tensor is passed around as
its name, and the comment at a line gives its shape: B batch, T tokens (CLS, then R registers, then patches),
N patches, D width, h heads, d = D / h.

The graph's input and outputs are those of :mod:`dinokit.model_folder.contract`; the tokens of inner blocks
(``block_output``) are outputs only where they are asked for.

The mathematics is that of facebookresearch's ``dino``, ``dinov2`` and ``dinov3``; only the order of work differs:

- q, k and v have a matrix each, stored as (in, out), so that no weight is transposed at inference, and the
  attention's scale 1/sqrt(d) is multiplied into q's weights (exact for d = 64, a power of four, and a
  rounding in the last bit otherwise);
- the patch embedding is a matrix product over flattened patches. A picture whose sides are no multiples of
  the patch is then an error of the runtime, where a convolution would silently crop it.

All outputs are slices of what the network computes anyway: asking for all of them costs nothing, but that an inner
block's tokens are kept and go through the final norm.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError
from dinokit.model_folder.architecture import Architecture, VitArchitecture
from dinokit.model_folder.contract import ATTENTION, INPUT, POOLED, TOKENS, block_output, declared_shapes
from dinokit.model_folder.weights import check_weights, expected_shapes
from dinokit.vit_graph.blocks import block
from dinokit.vit_graph.rope import rotation
from dinokit.vit_graph.storage import LARGEST_FILE, FileStorage, MemoryStorage, data_file, inside
from dinokit.vit_graph.tokens import (
    patch_embedding,
    patch_grid,
    position_embedding,
    prepend_cls_and_registers,
)
from dinokit.vit_graph.writer import OPSET, GraphWriter

if TYPE_CHECKING:
    import onnx

__all__ = ["OPSET", "build_vit_graph", "can_write", "save_vit_graph", "split_vit_graph"]


# -------------------- what can be written


def can_write(architecture: Architecture) -> bool:
    """Whether :func:`build_vit_graph` knows this architecture."""
    return isinstance(architecture, VitArchitecture) and not _unsupported(architecture)


def _unsupported(vit: VitArchitecture) -> list[str]:
    """What of the architecture has no part here, in words."""
    head_dim = vit.embed_dim // vit.num_heads
    checks = {
        f"the feed-forward network {vit.ffn!r}": vit.ffn not in ("mlp", "swiglu"),
        f"the position embedding {vit.position!r}": vit.position not in ("learned", "rope"),
        f"rotated heads of width {head_dim}, no multiple of 4": vit.position == "rope" and head_dim % 4 != 0,
    }
    return [name for name, present in checks.items() if present]


def _check_weights(vit: VitArchitecture, weights: Mapping[str, NDArray[Any]]) -> None:
    """ModelError unless the weights are those of the architecture, no more and no less."""
    expected = expected_shapes(vit)
    assert expected is not None  # all that can be written has a table
    found = {name: tuple(values.shape) for name, values in weights.items()}
    if problems := check_weights(found, expected, "the checkpoint"):
        raise ModelError(
            f"the weights do not fit the architecture: {'; '.join(problems)}. "
            "Check that config.json and the weights belong together"
        )


# -------------------- the model, its weights inside, in a file, or in memory


def build_vit_graph(
    vit: VitArchitecture,
    weights: Mapping[str, NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    blocks: Collection[str] = (),
) -> onnx.ModelProto:
    """The ONNX model of a Vision Transformer; its input and outputs stand in :mod:`dinokit.model_folder.contract`.

    Args:
        vit: the sizes, and how a learned position embedding is resized at other picture sizes.
        weights: timm's names (those of facebookresearch/dino for DINO v1; :mod:`dinokit.model_folder.weight_names`
            translates others), any float dtype; the graph holds them as float32.
        metadata: texts for the file's ``metadata_props``, such as the model folder's contract.
        blocks: further outputs, named by :func:`dinokit.model_folder.contract.block_output`: tokens of inner blocks.

    Raises:
        ModelError: the architecture has parts that are not written here (see :func:`can_write`), or the
            weights do not belong to it, or they are too large for one ONNX file, or there is no such block.
    """
    g = _write(vit, weights, blocks)
    if g.size >= LARGEST_FILE:
        raise ModelError(
            f"the weights take {g.size / 2**30:.1f} GiB as float32; one ONNX file holds less than 2 GiB. "
            "Write it with save_vit_graph, which puts them into a second file"
        )
    return _finish(g, vit, metadata, inside, blocks)


def split_vit_graph(
    vit: VitArchitecture,
    weights: Mapping[str, NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    blocks: Collection[str] = (),
) -> tuple[onnx.ModelProto, dict[str, NDArray[np.float32]]]:
    """The model without its large weights, and these under the names that the model has for them.

    A session is given them by ``SessionOptions.add_external_initializers``: nothing is serialised, and no size
    is too large. Arguments and errors as in :func:`build_vit_graph`.
    """
    memory = MemoryStorage()
    return _finish(_write(vit, weights, blocks), vit, metadata, memory, blocks), memory.weights


def save_vit_graph(
    path: str | os.PathLike[str],
    vit: VitArchitecture,
    weights: Mapping[str, NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes the model to a file, and its weights to a second one beside it if one cannot hold them.

    Arguments and errors as in :func:`build_vit_graph`, and OSError where nothing can be written.

    Returns:
        The files written: ``path``, and ``<path>_data`` from 2 GiB on. They belong together: whoever moves one
        moves the other.
    """
    path = Path(path)
    data = data_file(path)
    g = _write(vit, weights)
    if g.size < LARGEST_FILE:
        path.write_bytes(_finish(g, vit, metadata, inside).SerializeToString())
        return [path]
    with data.open("wb") as file:
        model = _finish(g, vit, metadata, FileStorage(file, data.name))
    path.write_bytes(model.SerializeToString())
    return [path, data]


# -------------------- the whole network


def _write(
    vit: VitArchitecture, weights: Mapping[str, NDArray[Any]], blocks: Collection[str] = ()
) -> GraphWriter:
    """All operators, between the input and the three outputs, and those of inner blocks that are asked for."""
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
            f"'blocks.0' to 'blocks.{vit.depth - 1}', each with '.norm' or without"
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
        # A copy, since ONNX Runtime would no longer fuse the sum x with the next block's norm were it an output itself,
        # and the embedding would change in its last bits.
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
