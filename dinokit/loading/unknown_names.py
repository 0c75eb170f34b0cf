"""Hints for an unknown model name: what was probably meant, and how to load it."""

from __future__ import annotations

import difflib
import re

from dinokit.errors import UsageError
from dinokit.loading.foreign import readable_in_timm
from dinokit.loading.zoo import STARTER, ZOO

__all__ = ["unknown_model"]

_FILES = "https://dl.fbaipublicfiles.com/dino"
# What facebookresearch/dino has besides its ViTs (hubconf.py). The Hub does not have them as safetensors.
_AS_FILES = {
    f"dino_{name}": f"{_FILES}/dino_{name}_pretrain/dino_{name}_pretrain.pth"
    for name in (
        "resnet50",
        "xcit_small_12_p16",
        "xcit_small_12_p8",
        "xcit_medium_24_p16",
        "xcit_medium_24_p8",
    )
}
_TIMM_PREFIX = re.compile(r"(hf-hub|hf_hub|local-dir):")
_OTHER_FAMILIES = re.compile(
    r"(?:^|_)(tv|wide|se|lambda)?_?(resnet|resnext|regnet|convnext|efficientnet|mobilenet|densenet|vgg|inception|nfnet|"
    r"swin|xcit|cait|deit|beit|maxvit|coatnet|mixer|eva|vit|clip|siglip)"
)


def unknown_model(name: str) -> UsageError:
    """The error for a name that is neither known, nor a path, nor a Hub id."""
    return UsageError(
        f"{name!r} is not a model: neither a known name, nor a file or folder, nor a Hub id (user/model).{_hint(name)} "
        f"Known names: {', '.join([STARTER, *ZOO])}"
    )


def _hint(name: str) -> str:
    """Suggestions, as sentences with a space before each; empty if nothing is similar."""
    if found := _TIMM_PREFIX.match(name):
        return f" Leave out {found[0]!r}, which is timm's: {name[found.end() :]!r}."
    for model in ZOO.values():
        tagged = model.repo.removeprefix("timm/")
        if name == tagged or (name == model.timm_architecture and "dino" in name):
            return f" It is timm's name for {model.name}."
    close = difflib.get_close_matches(_plain(name), [STARTER, *ZOO, *_AS_FILES], n=3, cutoff=0.6)
    if close and close[0] in _AS_FILES:
        published = (
            f" facebookresearch/dino publishes {close[0]} as a file, which can be loaded where the extra [train] is "
            f"installed: download {_AS_FILES[close[0]]} and name the file."
        )
        return published if "dino" in name.lower() else _of_timm(name) + published
    if readable_in_timm(name):
        return f" The Hub has timm's as timm/{name}{'' if '.' in name else '.TAG'}."
    known = [near for near in close if near not in _AS_FILES]
    if known:
        return f" Did you mean {' or '.join(known)}?"
    return _of_timm(name) if _OTHER_FAMILIES.search(_plain(name)) else ""


def _of_timm(name: str) -> str:
    return (
        " It looks like a network of timm's, and of those the Hub's weights are read only if it is a Vision "
        "Transformer as DINO's are. A network of its own can be trained: dinokit train --set "
        f"arch={name.partition('.')[0]}."
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
