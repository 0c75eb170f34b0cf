"""Calibration: second moments of the inputs of a network's products, over photographs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.export.quantisation.products import Product
from dinokit.model_folder.contract import INPUT
from dinokit.pictures.preprocess import Preprocessing

if TYPE_CHECKING:
    import onnx

    from dinokit.pictures.bands import Bands

__all__ = ["calibration_pixels", "second_moments", "watch"]

_MOST_CROPS = 72
_BATCH = 8
_MOST_BYTES = 2**30  # of moments at a time; a larger network is run several times
_FRAMES = (
    (0.0, 0.0, 1.0),
    *((x, y, side) for side in (0.5, 0.7) for y in (0.0, 1.0) for x in (0.0, 1.0)),
)
"""Parts of a photograph: position (as a share of the remaining room, 0 to 1) and size (as a share of the sides)."""


def calibration_pixels(
    photographs: Sequence[Image.Image] | Sequence[Bands], preprocessing: Preprocessing
) -> NDArray[np.float32]:
    """Crops for calibration: the photographs, their mirror images, and parts of both.

    Args:
        photographs: upright RGB pictures, or bands; at least one.
        preprocessing: of the model.

    Returns:
        (N, C, H, W), normalised; at most 72.
    """
    crops = [preprocessing.crop(view) for view in islice(_views(photographs), _MOST_CROPS)]
    return preprocessing.normalise(np.stack(crops))


def _views(photographs: Sequence[Image.Image] | Sequence[Bands]) -> Iterator[Image.Image | Bands]:
    """All photographs, then all mirrored, then parts in the same order."""
    for left, top, side in _FRAMES:
        parts = []
        for picture in photographs:
            width, height = (max(1, round(length * side)) for length in picture.size)
            x, y = round(left * (picture.width - width)), round(top * (picture.height - height))
            parts.append(picture.crop((x, y, x + width, y + height)))
        yield from parts
        yield from (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in parts)


def second_moments(
    model: onnx.ModelProto,
    store: Mapping[str, NDArray[Any]] | None,
    products: Sequence[Product],
    pixels: NDArray[np.float32],
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """For each input of a product, its name and the sum of x xᵀ (K, K) over all tokens of all pictures.

    Args:
        model: float32.
        store: its large weights if they are outside.
        products: of the model.
        pixels: (B, C, H, W) float32, as the model takes them.
    """
    for names in _groups(model, products):
        sums: dict[str, NDArray[np.float32]] = {}
        session = watch(model, store, names)
        for start in range(0, len(pixels), _BATCH):
            found = session.run(list(names), {INPUT: pixels[start : start + _BATCH]})
            for name, values in zip(names, found, strict=True):
                rows = values.reshape(-1, values.shape[-1])
                product = rows.T @ rows
                sums[name] = sums[name] + product if name in sums else product
        yield from sums.items()


def _groups(model: onnx.ModelProto, products: Iterable[Product]) -> Iterator[list[str]]:
    """Groups of inputs whose moments fit in memory together."""
    dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    sizes = {p.source: 4 * dims[p.weight][1 if p.transposed else 0] ** 2 for p in products}
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > _MOST_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def watch(model: onnx.ModelProto, store: Mapping[str, NDArray[Any]] | None, names: Sequence[str]) -> Any:
    """A session of the model on the CPU that also returns these float32 tensors."""
    import onnx

    from dinokit.export.verification.sessions import start_session

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    there = {value.name for value in watched.graph.output}
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in there
    )
    return start_session(watched, store)
