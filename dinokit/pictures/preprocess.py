"""From an upright picture to the network's input, exactly as the model folder specifies.

The reference is facebookresearch/dino's evaluation transform (`eval_knn.py`): Pillow bicubic resize of the
short side, centre crop, mean and standard deviation; torchvision's rounding is kept (its `Resize`
truncates the long side, its `CenterCrop` rounds half to even).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.errors import ModelError
from dinokit.files.plain_values import from_plain
from dinokit.pictures.bands import Bands, decode_bands, is_photographic
from dinokit.pictures.images import Extent

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "picture_of"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pillow's filters and the numbers transformers writes for them.
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# How many times larger than its resize a JPEG must stay when it is decoded at a half, a quarter or an eighth of its
# size. libjpeg averages pixels; the more is left to the filter, the less this shows: at 1, crops differ by 0.43
# grey levels in the mean and 14 at most, at 2 by 0.19 and 3, at 3 by 0.14 and 2 (`benchmarks/reduced_decoding.py`,
# 224 px).
_LEAST_GAP = 2

# Cropping and resizing keep the type.
Picture = TypeVar("Picture", Image.Image, Bands)

_MOST_SIDE_PX = 1 << 16

# If enlarging would exceed this (64 MiB in Pillow), only the crop's part of a very long, thin picture is resized.
# With a short side of 256, that needs a long side 256 times as long.
_MOST_RESIZED_PIXELS = 1 << 24


def picture_of(crop: NDArray[Any]) -> Image.Image:
    """A crop (H, W, C) as an RGB picture for display: 3 channels in colour, 1 in grey.

    Other numbers show the mean of the channels, stretched so that its minimum is black and its maximum white. Crops
    that are finer than 8 bits and darker than a quarter of white everywhere, such as 12 bits stored in 16, are
    stretched in the same way.
    """
    channels = crop.shape[2]
    if channels not in (1, 3):
        crop = _stretched(crop.mean(axis=2, dtype=np.float32, keepdims=True))
    elif crop.dtype != np.uint8:
        crop = _stretched(crop) if crop.max() < _DARK else np.rint(crop).clip(0, 255).astype(np.uint8)
    return Image.fromarray(crop if crop.shape[2] == 3 else np.repeat(crop, 3, axis=2))


_DARK = 64.0


def _stretched(levels: NDArray[Any]) -> NDArray[np.uint8]:
    """Scaled so that the minimum is black and the maximum white."""
    low, high = float(levels.min()), float(levels.max())
    stretched: NDArray[np.uint8] = np.rint((levels - low) * (255 / (high - low) if high > low else 0)).astype(
        np.uint8
    )
    return stretched


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalisation of one model. Sizes are pixels, height before width."""

    resize_px: tuple[int, int] | int = 256
    """An int: the short side is resized to it, keeping the aspect ratio. A pair: squashed to (H, W)."""
    crop_px: tuple[int, int] = (224, 224)
    """(H, W) of the centre crop, the input of the network."""
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.interpolation not in _FILTERS:
            raise ModelError(
                f"interpolation={self.interpolation!r} is not known; expected one of {sorted(_FILTERS)}"
            )
        resized_h, resized_w = self.resize_px if isinstance(self.resize_px, tuple) else (self.resize_px,) * 2
        if resized_h < self.crop_px[0] or resized_w < self.crop_px[1]:
            raise ModelError(
                f"resize_px={self.resize_px} is smaller than crop_px={self.crop_px}; the crop would exceed "
                "the picture. Make resize_px at least as large"
            )
        if min(self.crop_px) < 1 or max(resized_h, resized_w) > _MOST_SIDE_PX:
            raise ModelError(
                f"resize_px={self.resize_px}, crop_px={self.crop_px} are invalid; each side must be 1 to "
                f"{_MOST_SIDE_PX} pixels"
            )
        if not self.mean or len(self.mean) != len(self.std):
            raise ModelError(
                f"mean has {len(self.mean)} channels, std {len(self.std)}; expected the same number, at least 1"
            )
        # Pixels are in 0…1, so anything outside these limits is wrong; within them float32 does not overflow.
        if not all(1e-6 <= value <= 1e6 for value in self.std) or not all(
            abs(value) <= 1e6 for value in self.mean
        ):
            raise ModelError(
                f"mean={self.mean}, std={self.std} are invalid for pixels in 0…1; each std must be above 0, since "
                "pixels are divided by it"
            )

    @property
    def channels(self) -> int:
        """C, the number of channels of the network's input."""
        return len(self.mean)

    @property
    def least_px(self) -> int:
        """Least short side to which a JPEG may be downscaled while decoding: the resize still halves it, or more."""
        return _LEAST_GAP * (self.resize_px if isinstance(self.resize_px, int) else max(self.resize_px))

    def crop(self, image: Image.Image | Bands, extent: Extent | None = None) -> NDArray[Any]:
        """Resizes and crops one upright picture, converted to grey (ITU-R 601) first for a network of one channel.

        Args:
            image: as :func:`dinokit.pictures.bands.open_picture` returns it for this number of channels: mode RGB for 1
                and 3; if it is finer than 8 bits, and for other channels,
                :class:`~dinokit.pictures.bands.Bands`, each of which is resized separately.
            extent: of the full picture, if the image was downscaled while decoding: the same part of it is cropped.

        Returns:
            (H, W, C) uint8; for bands that are finer than 8 bits float32, on the same scale and not rounded.

        Raises:
            ImageError: the picture does not have the channels of the network.
        """
        if isinstance(image, Bands) or not is_photographic(self.channels):
            return self._cropped(decode_bands(image, self.channels), extent).array
        if self.channels == 1 and image.mode != "L":
            image = image.convert("L")  # this does not change the values of a grey picture
        pixels = np.asarray(self._cropped(image, extent))
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def _cropped(self, image: Picture, extent: Extent | None) -> Picture:
        width, height = extent.size if extent else image.size  # PIL: width first
        crop_h, crop_w = self.crop_px
        if isinstance(self.resize_px, int):
            short, long = min(width, height), max(width, height)
            # torchvision: int(size * long / short), truncated, never below the crop
            new_long = max(self.resize_px, int(self.resize_px * long / short))
            new_w, new_h = (self.resize_px, new_long) if width <= height else (new_long, self.resize_px)
        else:
            new_h, new_w = self.resize_px
        top = round((new_h - crop_h) / 2.0)
        left = round((new_w - crop_w) / 2.0)
        window = (left, top, left + crop_w, top + crop_h)
        if (new_w, new_h) == image.size:
            return image.crop(window)
        if new_w * new_h <= max(image.width * image.height, _MOST_RESIZED_PIXELS):
            # A downscaled image is still larger than the resize, so it is always resized here.
            box = extent.box if extent else None
            return image.resize((new_w, new_h), _FILTERS[self.interpolation], box).crop(window)
        return self._resize_window(image, (new_w, new_h), window)

    def _resize_window(
        self, image: Picture, size: tuple[int, int], window: tuple[int, int, int, int]
    ) -> Picture:
        """``image.resize(size).crop(window)`` when enlarging, without computing the rest; to within one grey level.

        A picture of 1 x 60000 pixels would become 256 x 15 million. Pillow keeps a box in float32, so the
        source is first cut near the window, where float32 is fine enough. The two passes are written out,
        columns first as Pillow does when it enlarges: with a box it may choose the other order, and the
        rounding to 8 bits between the passes makes that differ by up to 28 levels (measured on noise).
        """
        resample = _FILTERS[self.interpolation]
        cut, box = [], []
        for source, target, start, stop in zip(image.size, size, window[:2], window[2:], strict=True):
            scale = source / target
            margin = 4  # bicubic sees 2 source pixels to each side
            first = max(0, math.floor(start * scale - margin))
            cut.append((first, min(source, math.ceil(stop * scale + margin))))
            box.append((start * scale - first, stop * scale - first))
        (x0, x1), (y0, y1) = cut
        near = image.crop((x0, y0, x1, y1))
        rows, crop_w, crop_h = y1 - y0, window[2] - window[0], window[3] - window[1]
        wide = near.resize((crop_w, rows), resample, box=(box[0][0], 0, box[0][1], rows))
        return wide.resize((crop_w, crop_h), resample, box=(0, box[1][0], crop_w, box[1][1]))

    def normalise(self, crops: NDArray[Any]) -> NDArray[np.float32]:
        """(B, H, W, C) in 0…255 to (B, C, H, W) float32: ``(x / 255 - mean) / std``, C-contiguous."""
        mean = np.asarray(self.mean, np.float32)
        std = np.asarray(self.std, np.float32)
        # One multiply and one add on the small dtype's values instead of three passes.
        scale, shift = 1.0 / (255.0 * std), -mean / std
        planes = np.ascontiguousarray(crops.transpose(0, 3, 1, 2)).astype(np.float32)
        planes *= scale.astype(np.float32)[:, None, None]
        planes += shift.astype(np.float32)[:, None, None]
        return planes

    def with_image_size(self, image_size: int | tuple[int, int]) -> Preprocessing:
        """The same preprocessing at another input size, with the same ratio of crop to resize.

        At a size that is not square, pictures are squashed to it, as by models whose input is not square: if the short
        side had to cover the longer side of the crop, only a small part of each picture would be visible.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        shares = [resize / crop for resize, crop in zip(self._resized, self.crop_px, strict=True)]
        if isinstance(self.resize_px, int):
            shares = [min(shares)] * 2
            if height == width:
                return replace(self, resize_px=round(height * shares[0]), crop_px=(height, width))
        # Truncated, as timm does, so that one crop_pct expresses the same for timm.
        squashed = (int(height * shares[0] + 1e-6), int(width * shares[1] + 1e-6))
        return replace(self, resize_px=squashed, crop_px=(height, width))

    def with_white(self, white: float) -> Preprocessing:
        """The same for pictures with another white level: 4095 / 65535 if a 12-bit camera writes 16-bit files.

        No new key is needed: ``(x / white - mean) / std`` is ``(x - white · mean) / (white · std)``, so the model
        folder stays readable everywhere. The pictures must be as fine as that: 8-bit ones would keep few levels.

        Args:
            white: share of the maximum value of the files, above 0 and at most 1.

        Raises:
            ModelError: another number.
        """
        if not 0 < white <= 1:
            raise ModelError(
                f"white={white} must be above 0 and at most 1, as a share of the files' maximum: 4095 / 65535"
            )
        mean, std = (tuple(white * value for value in values) for values in (self.mean, self.std))
        return replace(self, mean=mean, std=std)

    # -- as stored in a model folder

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_json`. Raises ModelError on unknown or wrong keys."""
        return from_plain(cls, values, "the preprocessing")

    def to_processor_config(self) -> dict[str, Any]:
        """transformers' ``preprocessor_config.json`` (BitImageProcessor)."""
        size = (
            {"shortest_edge": self.resize_px}
            if isinstance(self.resize_px, int)
            else {"height": self.resize_px[0], "width": self.resize_px[1]}
        )
        return {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": size,
            "resample": int(_FILTERS[self.interpolation]),
            "do_center_crop": True,
            "crop_size": {"height": self.crop_px[0], "width": self.crop_px[1]},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": self.channels == 3,
        }

    def to_pretrained_cfg(self) -> dict[str, Any]:
        """The keys of timm's ``pretrained_cfg`` that concern pixels."""
        return {
            "input_size": [len(self.mean), *self.crop_px],
            "fixed_input_size": False,
            "interpolation": self.interpolation,
            "crop_pct": self._crop_pct,
            "crop_mode": "center" if isinstance(self.resize_px, int) else "squash",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_pretrained_cfg(
        cls, cfg: Mapping[str, Any], *, image_size: tuple[int, int] | None = None
    ) -> Preprocessing:
        """The preprocessing that ``timm.data.create_transform`` builds from a ``pretrained_cfg``.

        Args:
            cfg: with ``input_size``, ``crop_pct``, ``interpolation``, ``mean`` and ``std``.
            image_size: (H, W) instead of that of ``input_size``.

        Raises:
            ModelError: a key is missing or invalid, or dinokit does not support the crop mode.
        """
        try:
            height, width = image_size or cfg["input_size"][1:]
            share, mode = float(cfg["crop_pct"]), cfg.get("crop_mode") or "center"
            short = math.floor(max(height, width) / share)
            squashed = (math.floor(height / share), math.floor(width / share))
            plain = {
                "resize_px": squashed if mode == "squash" else short,
                "crop_px": (height, width),
                **{key: cfg[key] for key in ("interpolation", "mean", "std")},
            }
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ModelError(
                f"its pretrained_cfg does not describe the whole preprocessing ({error!r})"
            ) from error
        if mode not in ("center", "squash"):
            raise ModelError(
                f"its pretrained_cfg has the crop mode {mode!r}; dinokit supports 'center' and 'squash'"
            )
        return cls.from_json(plain)

    @property
    def timm_agrees(self) -> bool:
        """Whether timm resizes to the same size, which needs the same crop share for both sides.

        For a crop that is not square, timm resizes the short side differently.
        """
        if isinstance(self.resize_px, int) and self.crop_px[0] != self.crop_px[1]:
            return False
        return self._timm_resize(self._crop_pct) == self._resized

    @property
    def _resized(self) -> tuple[int, int]:
        """The resize of both sides; a single number, for the short side, is repeated."""
        return self.resize_px if isinstance(self.resize_px, tuple) else (self.resize_px, self.resize_px)

    @property
    def _crop_pct(self) -> float:
        """The share that timm crops, chosen so that its ``floor(crop / share)`` is the resize."""
        sides = self._timm_sides
        shares = [side / resized for side, resized in zip(sides, self._resized, strict=True)]
        tried = [*shares, *(math.nextafter(share, 0) for share in shares)]
        return next((share for share in tried if self._timm_resize(share) == self._resized), shares[0])

    @property
    def _timm_sides(self) -> tuple[int, int]:
        longer = max(self.crop_px)
        return self.crop_px if isinstance(self.resize_px, tuple) else (longer, longer)

    def _timm_resize(self, share: float) -> tuple[int, ...]:
        """As timm's ``transforms_imagenet_eval``."""
        return tuple(math.floor(side / share) for side in self._timm_sides)
