"""Writes the ONNX graph from a model's weights and opens it: at load, and again when inner blocks are requested."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dinokit.errors import ModelError, UsageError
from dinokit.loading.locate import Located, locate
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import METADATA_KEY, contract
from dinokit.runtime.cpu import return_freed_memory
from dinokit.vit_graph import can_write

if TYPE_CHECKING:
    from dinokit.runtime import Engine
    from dinokit.runtime.onnx import OnnxEngine

__all__ = ["with_layers", "write_engine"]


def write_engine(located: Located, device: str, blocks: Sequence[str] = ()) -> OnnxEngine:
    """Writes the graph of a Vision Transformer and opens it.

    Args:
        located: a model whose graph can be written (:func:`dinokit.vit_graph.can_write`).
        device: as for ``OnnxEngine``.
        blocks: further outputs, named by :func:`dinokit.model_folder.contract.block_output`.
    """
    from dinokit.runtime.onnx import OnnxEngine
    from dinokit.vit_graph import split_vit_graph

    assert located.load_weights is not None  # None for a single ONNX file only
    metadata = {METADATA_KEY: json.dumps(contract(located.config, located.weights_sha256))}
    # The weights are passed beside the graph: serialising would take twice their memory, and protobuf is limited to
    # 2 GiB.
    graph, weights = split_vit_graph(
        located.config.vit, located.load_weights(), metadata=metadata, blocks=blocks
    )
    engine = OnnxEngine(graph.SerializeToString(), weights=weights, device=device)
    del graph, weights  # the session has copies
    return_freed_memory()
    return engine


def with_layers(engine: OnnxEngine, located: Located, name: str, device: str) -> Engine:
    """Wraps an engine so that its graph is written again when tokens of inner blocks are requested.

    If that is impossible, a request for them raises UsageError with the reason.

    Args:
        engine: runs a written graph, or a file.
        located: the model. Its weights are not kept, so that memory holds them once; they are read again.
        name: by which :func:`dinokit.loading.locate.locate` finds the model from any current folder.
        device: as requested.
    """
    if not isinstance(located.config.architecture, VitArchitecture):
        return engine
    from dinokit.runtime.onnx_layers import OnnxEngineWithLayers

    why_not = _why_no_layers(located, engine.precision)
    device = engine.device if device == "auto" else device
    write = functools.partial(_again, name, located.revision, located.weights_sha256, device, why_not)
    return OnnxEngineWithLayers(engine, write)


def _why_no_layers(located: Located, precision: str) -> str | None:
    if located.kind == "onnx":
        return (
            f"{located.source} is a single ONNX file, which outputs the last block's tokens only. Load the model "
            "folder it was exported from, or its weights"
        )
    if precision != "fp32":
        or_torch = ", or with engine='torch'" if precision == "fp16" else ""
        return (
            f"the model's {precision} file outputs the last block's tokens only. Load {located.config.name} with "
            f"precision='fp32'{or_torch}"
        )
    if not can_write(located.config.architecture):
        return (
            f"the ONNX graph of {located.config.name} cannot be written from its weights. Use engine='torch'"
        )
    return None


def _again(
    name: str, revision: str | None, sha256: str, device: str, why_not: str | None, blocks: Sequence[str]
) -> OnnxEngine:
    if why_not is not None:
        raise UsageError(
            f"tokens of inner blocks (layers, norm=False, what='cls:4') are not available: {why_not}"
        )
    located = locate(name, revision=revision)
    if located.weights_sha256 != sha256:
        raise ModelError(
            f"{name} no longer has the weights this backbone was loaded with "
            f"({located.weights_sha256[:12]}, not {sha256[:12]}); load it again"
        )
    return write_engine(located, device, blocks)
