"""Networks of timm other than DINO ViTs (ResNet, RegNet, XCiT, ConvNeXt …): build, describe, run.

No network is known by name here. Only what timm guarantees for a feature extractor is used: ``forward_features``,
``forward_head`` and ``num_features``; the rest is found out by running it on an empty picture.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dinokit.errors import UsageError
from dinokit.model_folder.architecture import TimmArchitecture

__all__ = [
    "check_arguments",
    "create_network",
    "describe_network",
    "evaluation_mode",
    "features",
    "has_batch_norm",
    "must_take",
    "reason_of",
]

_OPENS_FILES = frozenset(
    (
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "features_only",
    )
)
_MOST_PREFIX_TOKENS = 16  # class tokens and registers; more would be patches that were counted wrongly


def create_network(
    timm_architecture: str, model_args: Mapping[str, Any], *, drop_path_rate: float = 0.0
) -> nn.Module:
    """Builds a network of timm without classifier.

    Args:
        timm_architecture: a name that ``timm.list_models`` knows, such as ``resnet50``.
        model_args: keywords for it.
        drop_path_rate: stochastic depth (the student's only); not every network has it.

    Raises:
        UsageError: timm does not know the name or refuses the arguments.
    """
    if not timm.is_model(timm_architecture):
        near = difflib.get_close_matches(timm_architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see timm.list_models()"
        raise UsageError(f"timm {timm.__version__} has no model {timm_architecture!r}; {hint}")
    check_arguments(model_args)
    args = {**model_args, **({"drop_path_rate": drop_path_rate} if drop_path_rate else {})}
    try:
        module: nn.Module = timm.create_model(timm_architecture, pretrained=False, num_classes=0, **args)
    except Exception as error:  # the arguments may be anybody's, and timm checks few of them
        hint = ". Set drop_path_rate=0 if that is what it does not know" if drop_path_rate else ""
        raise UsageError(
            f"timm cannot build {timm_architecture!r} with {args}: {reason_of(error)}{hint}"
        ) from error
    return module


def reason_of(error: Exception) -> str:
    """The message of an error of timm or torch, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_arguments(model_args: Mapping[str, Any]) -> None:
    """UsageError for keywords with which ``timm.create_model`` would open or fetch files instead of building a network.

    They come from config.json, which may be anybody's.
    """
    if wrong := sorted(_OPENS_FILES.intersection(model_args)):
        raise UsageError(f"model_args has {', '.join(wrong)}, which does not describe the network; remove it")


def features(module: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a network of timm computes from pictures.

    Args:
        module: without classifier.
        pixels: (B, C, H, W).

    Returns:
        The pooled features (B, D), and the feature map as tokens (B, prefix + h·w, D'), row by row; None if it
        has none.
    """
    network: Any = module
    raw = network.forward_features(pixels)
    # A classifier, if there is one, is not used.
    pooled: Tensor = network.forward_head(raw, pre_logits=True)
    if not isinstance(raw, Tensor) or raw.ndim not in (3, 4):
        return pooled, None
    if raw.ndim == 3:
        return pooled, raw
    if getattr(module, "output_fmt", "NCHW") == "NHWC":
        return pooled, raw.flatten(1, 2)
    return pooled, raw.flatten(2).transpose(1, 2)


def describe_network(module: nn.Module, image_size: tuple[int, int]) -> TimmArchitecture:
    """What is needed to use a network, found by running it on empty pictures.

    Args:
        module: without classifier; it is run in evaluation mode and left as it was.
        image_size: (H, W) that it is for.

    Raises:
        UsageError: it is not a feature extractor of timm, or it cannot take pictures of this size.
    """
    if not (hasattr(module, "forward_features") and hasattr(module, "forward_head")):
        raise UsageError(
            f"a {type(module).__name__} is not a feature extractor of timm (it has no forward_features and "
            "forward_head); use one made by timm.create_model(…, num_classes=0)"
        )
    height, width = image_size
    in_chans = _channels(module)
    cfg: dict[str, Any] = dict(getattr(module, "pretrained_cfg", None) or {})
    with evaluation_mode(module):
        pooled, tokens = _try(module, in_chans, height, width)
        if pooled.ndim != 2:
            raise UsageError(
                f"a {type(module).__name__} gives an array of shape {tuple(pooled.shape)} per picture, not a vector; "
                "it needs its global pooling (timm.create_model(…, num_classes=0) has it)"
            )
        stride = _stride(module, tokens, height)
        architecture = TimmArchitecture(
            embed_dim=pooled.shape[1], stride=stride, image_size=image_size, in_chans=in_chans
        )
        return TimmArchitecture(
            embed_dim=pooled.shape[1],
            stride=stride,
            image_size=image_size,
            size_multiple=_size_multiple(module, in_chans, height, width, stride),
            in_chans=in_chans,
            first_conv=_one_name(cfg.get("first_conv")),
            classifier=_one_name(cfg.get("classifier")),
            **_tokens_of(tokens, architecture),
        )


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Sets evaluation mode, and restores each part's mode afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, flag in modes:
            part.training = flag


def must_take(module: nn.Module, size: tuple[int, int]) -> None:
    """Runs a network on an empty picture of (H, W) in evaluation mode, and leaves it as it was.

    Raises:
        UsageError: it cannot take pictures of this size.
    """
    with evaluation_mode(module):
        _try(module, _channels(module), *size)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether its output in training depends on the other pictures of the batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def _try(module: nn.Module, in_chans: int, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    weight = next(module.parameters())
    pixels = torch.zeros(1, in_chans, height, width, device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            return features(module, pixels)
    except torch.OutOfMemoryError:  # a RuntimeError, and no answer
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        raise UsageError(
            f"a {type(module).__name__} cannot take a picture of {height}x{width} px ({reason_of(error)}); use another "
            "size"
        ) from error


def _channels(module: nn.Module) -> int:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return int(part.in_channels)
    return 3


def _stride(module: nn.Module, tokens: Tensor | None, height: int) -> int:
    """timm's own word for it; otherwise the height of the picture over that of a square map."""
    found: Any = getattr(module, "feature_info", None)
    try:
        return int(found[-1]["reduction"])
    except (TypeError, KeyError, IndexError, ValueError):
        cells = 1 if tokens is None else tokens.shape[1]
        return max(1, height // max(1, math.isqrt(cells)))


def _tokens_of(tokens: Tensor | None, architecture: TimmArchitecture) -> dict[str, int]:
    """``token_dim`` and ``num_prefix_tokens``, if the tokens form a map of the expected size."""
    if tokens is None:
        return {}
    rows, columns = architecture.grid(*architecture.image_size)
    prefix = tokens.shape[1] - rows * columns
    if not 0 <= prefix <= _MOST_PREFIX_TOKENS:
        return {}
    return {"token_dim": tokens.shape[2], "num_prefix_tokens": prefix}


def _size_multiple(module: nn.Module, in_chans: int, height: int, width: int, stride: int) -> int | None:
    """1 if sides may be anything, the stride if they must be multiples of it, None for one size only."""
    # Cells more than the own size has, as a row of pixels more may end in the same cells; for 1, sides of no multiple.
    sizes = {
        1: (height + 1 + 2 * stride, width + 2 + 2 * stride),
        stride: ((height // stride + 2) * stride, width + 2 * stride),
    }
    for multiple, size in sizes.items():
        try:
            _try(module, in_chans, *size)
        except UsageError:
            continue
        return multiple
    return None


def _one_name(names: Any) -> str:
    """timm names one layer or several; one is what a loader can act on."""
    return names if isinstance(names, str) else ""
