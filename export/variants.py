"""The files an export can write: their names, and how each is made from the float32 graph.

==============================  ===========================================================
``onnx/model.onnx``             float32, standard operators, every size: runs everywhere
``onnx/model_fp16.onnx``        half the bytes; for GPUs
``onnx/model_int8.onnx``        a quarter of the bytes; for CPUs
``onnx/model_cuda_fp16.onnx``   ONNX Runtime's fused operators, for its CUDA kernels
``onnx/embedder….onnx``         uint8 crop in, embedding out
``onnx/…_HxW.onnx``             for one picture size
==============================  ===========================================================

Weights too large for one ONNX file are in a second file beside it, ``….onnx_data``; others on request.

The suffixes are those of Transformers.js. ``model_uint8.onnx`` means quantised weights there, which is why the graph
with uint8 input has another name.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError
from dinokit.export.graphs.embedder import to_embedder
from dinokit.export.graphs.fixed_size import fix_size
from dinokit.export.graphs.fused import to_fused
from dinokit.export.graphs.graph import Store, check_graph
from dinokit.export.graphs.half import to_half
from dinokit.export.quantisation.int8 import Int8Plan
from dinokit.export.quantisation.quantize import to_int8
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.contract import METADATA_KEY, contract, differences, free_sizes
from dinokit.model_folder.folder import ModelFolder

if TYPE_CHECKING:
    import onnx

    from dinokit.pictures.preprocess import Preprocessing

__all__ = [
    "PRECISIONS",
    "TARGETS",
    "Variant",
    "build",
    "differences_in_folder",
    "plan_variants",
    "size_in_name",
]

PRECISIONS = ("fp32", "fp16", "int8")
TARGETS = ("portable", "ort-cuda", "embedder")
_STEMS = {"portable": "model", "ort-cuda": "model_cuda", "embedder": "embedder"}
_USUAL = {"portable": "fp32", "ort-cuda": "fp16", "embedder": "fp32"}


@dataclass(frozen=True)
class Variant:
    """One file to be written."""

    precision: str = "fp32"
    target: str = "portable"
    image_size: tuple[int, int] | None = None
    """(H, W) of a graph for one size; None: every size."""

    @property
    def file(self) -> str:
        """Relative to the model folder."""
        precision = "" if self.precision == "fp32" else f"_{self.precision}"
        size = "_{}x{}".format(*self.image_size) if self.image_size else ""
        return f"onnx/{_STEMS[self.target]}{precision}{size}.onnx"


_SIZED = re.compile(r"_(\d+)x(\d+)\.onnx$")


def size_in_name(file: str | Path) -> tuple[int, int] | None:
    """(H, W) of a file for one size, by its name; None for every size."""
    found = _SIZED.search(Path(file).name)
    return (int(found[1]), int(found[2])) if found else None


def differences_in_folder(file: Path, says: Mapping[str, Any], model: ModelFolder) -> list[str]:
    """:func:`~dinokit.model_folder.contract.differences` of an ONNX file and its model folder.

    A file for one size has the preprocessing of that size.

    Args:
        file: named as :attr:`Variant.file` names it.
        says: its contract.
        model: the folder.
    """
    size, config = size_in_name(file), model.config
    if size is not None:
        config = replace(config, preprocessing=config.preprocessing.with_image_size(size))
    return differences(says, config, model.weights_sha256)


def plan_variants(
    precisions: str | Sequence[str] | None,
    targets: str | Sequence[str],
    image_size: tuple[int, int] | None,
) -> tuple[Variant, ...]:
    """Each target in each precision, except int8 for ort-cuda, since int8 is for CPUs.

    Args:
        precisions: names, in a sequence or comma-separated. None: fp32, and fp16 for ort-cuda.
        targets: likewise.
        image_size: see :class:`Variant`.

    Raises:
        UsageError: a name is not known, or a target has no precision left.
    """
    wanted_t = _names(targets, TARGETS, "target")
    wanted_p = None if precisions is None else _names(precisions, PRECISIONS, "precision")
    variants = []
    for target in wanted_t:
        listed = [_USUAL[target]] if wanted_p is None else wanted_p
        fitting = [p for p in listed if (p, target) != ("int8", "ort-cuda")]
        if not fitting:
            raise UsageError(
                "target 'ort-cuda' cannot be int8, which is for CPUs; expected precision fp16 or fp32"
            )
        variants += [Variant(precision, target, image_size) for precision in fitting]
    return tuple(variants)


def _names(given: Any, known: tuple[str, ...], what: str) -> list[str]:
    if not isinstance(given, Collection) or not all(isinstance(part, str) for part in given):
        raise UsageError(
            f"{what}={given!r} is not valid; expected one of {', '.join(known)}, or a list of several"
        )
    parts = given.split(",") if isinstance(given, str) else list(given)
    names = [part.strip().lower() for part in parts if part.strip()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{what} {name!r} is not known; expected one of {', '.join(known)}{hint}")
    if not names:
        raise UsageError(f"no {what} given; expected one of {', '.join(known)}")
    return [name for name in known if name in names]


def build(
    variant: Variant,
    graph: onnx.ModelProto,
    config: BackboneConfig,
    preprocessing: Preprocessing,
    weights_sha256: str,
    store: Store | None = None,
    plan: Int8Plan | None = None,
    pixels: NDArray[np.float32] | None = None,
) -> onnx.ModelProto:
    """Makes a variant.

    Args:
        variant: what to make.
        graph: float32, every size, as :func:`dinokit.vit_graph.build_vit_graph` writes it; not modified.
        config: of the model folder.
        preprocessing: of this file's pictures; not the folder's if the size is fixed.
        weights_sha256: of the folder's weights.
        store: the graph's large weights if they are outside; new ones are added.
        plan: how to quantise to int8; None: every weight is rounded to the nearest integer.
        pixels: photographs of the variant's size, on which overflows of float16 are looked for; see
            :func:`dinokit.export.graphs.half.to_half`.

    Returns:
        The model with the contract in its metadata; checked, unless its weights are outside.
    """
    chosen = plan or Int8Plan()
    if variant.precision == "int8" and chosen.network is not None:
        graph = chosen.network
        if store is not None:
            store.update(chosen.made)
    if variant.image_size:
        sizes = free_sizes(config.architecture, *variant.image_size)
        graph = fix_size(graph, *variant.image_size, store, sizes)
    if variant.target == "ort-cuda":
        graph = to_fused(graph, store)
    if variant.precision == "fp16":
        graph = to_half(graph, store, pixels)
    elif variant.precision == "int8" and chosen.network is None:
        graph = to_int8(graph, store, rounded=chosen.rounded, once=chosen.once, in_float=chosen.in_float)
    if variant.target == "embedder":
        graph = to_embedder(graph, preprocessing, store)
    made = type(graph)()
    made.CopyFrom(graph)
    del made.metadata_props[:]
    says = contract(
        replace(config, preprocessing=preprocessing),
        weights_sha256,
        precision=variant.precision,
        target=variant.target,
    )
    made.metadata_props.add(key=METADATA_KEY, value=json.dumps(says))
    if store is None:
        check_graph(made)
    return made
