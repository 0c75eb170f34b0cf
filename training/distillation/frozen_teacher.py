"""Distillation: frozen pretrained models as teachers of a smaller or different network.

A descriptor without weights (`oriented_gradients.py`) can also teach, alone or beside models.

The teachers see the student's global crops, and their embeddings are the targets; they do not change. The moving
average of the student is kept as in any run, and the model folder gets it. The embeddings of several teachers are
concatenated with equal weight, so that the cosine of two targets is the mean of the teachers' cosines.

Source: Fang et al. 2021 (SEED), §3; Oquab et al. 2023 (DINOv2), §5, "Knowledge distillation": a larger frozen model
replaces the teacher, and a moving average of the student is the resulting model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.errors import UsageError
from dinokit.loading.locate import Located, locate
from dinokit.model_folder.architecture import TimmArchitecture, VitArchitecture
from dinokit.runtime.timm_networks import features
from dinokit.runtime.torch import TorchEngine
from dinokit.training.distillation.oriented_gradients import HOG, OrientedGradients
from dinokit.training.recipe import Recipe
from dinokit.training.views.normalisation import normalisation

__all__ = ["FoundTeacher", "FrozenTeacher", "FrozenTeachers", "find_teachers", "width_of"]

FoundTeacher = Located | Literal["hog"]
"""A model, or the descriptor without weights."""


def find_teachers(recipe: Recipe) -> list[FoundTeacher]:
    """Locates the teachers that ``distill_from`` names, without building them; an empty list if it names none.

    Raises:
        UsageError: there is no such model, or it cannot teach this student.
        ModelError: a model is found but cannot be read.
    """
    if not recipe.teachers:
        if recipe.loss in ("similarity", "relations"):
            raise UsageError(
                f"loss={recipe.loss} learns from a pretrained model: name it with --distill-from MODEL (a model "
                "folder, a run, a Hub id, one of `dinokit models`, or hog)"
            )
        return []
    found: list[FoundTeacher] = ["hog" if name == HOG else _find(name, recipe) for name in recipe.teachers]
    width = width_of(found)
    if recipe.n_prototypes not in (None, width):
        raise UsageError(
            f"n_prototypes={recipe.n_prototypes}, but the targets, the embeddings of "
            f"distill_from={', '.join(recipe.teachers)}, have width {width}; leave n_prototypes open: "
            "--set n_prototypes=null"
        )
    return found


def width_of(found: Sequence[FoundTeacher]) -> int:
    """Total width of their embeddings; 0 without teachers."""
    return sum(_width(one) for one in found)


def _width(found: FoundTeacher) -> int:
    return found.config.architecture.embed_dim if isinstance(found, Located) else OrientedGradients.embed_dim


def _find(name: str, recipe: Recipe) -> Located:
    try:
        located = locate(name)
    except UsageError as error:
        raise UsageError(
            f"distill_from={name} is not a model: {error}. Name a model folder, a run, a Hub id, one of "
            "`dinokit models`, or hog"
        ) from error
    if located.load_weights is None:
        raise UsageError(
            f"distill_from={name} is an ONNX file, which training cannot run; name its model folder"
        )
    channels = located.config.preprocessing.channels
    if channels != recipe.channels:
        raise UsageError(
            f"distill_from={name} takes pictures of {channels} channels, and the student's have "
            f"{recipe.channels}; use channels={channels}, or a teacher of {recipe.channels}"
        )
    return located


class FrozenTeacher(nn.Module):
    """(T, B, C, H, W) crops as the student gets them to the teacher's embeddings (T, B, D).

    Stays in evaluation mode, and replaces the student's normalisation of the pixels by its own. Crops of a size that it
    does not accept are resized to the next size that it does.

    Args:
        located: see :func:`find_teachers`.
        recipe: complete settings of the student.
        device: where it computes.
    """

    def __init__(self, located: Located, recipe: Recipe, device: torch.device) -> None:
        super().__init__()
        assert located.load_weights is not None
        config = located.config
        engine = TorchEngine(config, located.load_weights(), device=str(device), precision="fp32")
        self.network = engine.module.requires_grad_(False)
        if not isinstance(config.architecture, VitArchitecture):
            self.network.to(memory_format=torch.channels_last)
        self.architecture = config.architecture
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in normalisation(recipe))
        own = config.preprocessing
        own_mean, own_std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (own.mean, own.std))
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        self.sha256 = located.weights_sha256

    scale: Tensor
    shift: Tensor

    @torch.no_grad()
    def forward(self, crops: Tensor) -> Tensor:
        """
        Args:
            crops: (T, B, C, H, W) float, normalised as the student's.

        Returns:
            (T, B, D): a ViT's CLS embedding after the final norm, or the pooled features of another network.
        """
        pixels = crops.flatten(0, 1) * self.scale + self.shift
        size = self.takes(tuple(pixels.shape[-2:]))
        if size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        if isinstance(self.architecture, VitArchitecture):
            network: Any = self.network
            embeddings: Tensor = network.forward_features(pixels)[:, 0]
        else:
            embeddings, _ = features(self.network, pixels)
        return embeddings.view(*crops.shape[:2], -1)

    def takes(self, size: Sequence[int]) -> tuple[int, int]:
        """The (H, W) to which a crop of (H, W) is resized: the next multiples of its patch, or its only size."""
        known = self.architecture
        multiple = known.size_multiple if isinstance(known, TimmArchitecture) else known.patch_size
        if multiple is None:
            return known.image_size
        height, width = (-(-side // multiple) * multiple for side in size)
        return height, width

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in evaluation mode: BatchNorm's trained statistics, no dropout."""
        return super().train(False)


class FrozenTeachers(nn.Module):
    """One or more of :class:`FrozenTeacher` and :class:`OrientedGradients`.

    Args:
        found: see :func:`find_teachers`.
        recipe, device: see :class:`FrozenTeacher`.
    """

    def __init__(self, found: Sequence[FoundTeacher], recipe: Recipe, device: torch.device) -> None:
        super().__init__()
        # A teacher named twice counts twice but is computed once.
        names = [one.weights_sha256 if isinstance(one, Located) else one for one in found]
        self.positions = tuple(list(dict.fromkeys(names)).index(name) for name in names)
        self.each = nn.ModuleList(
            FrozenTeacher(one, recipe, device)
            if isinstance(one, Located)
            else OrientedGradients(recipe, device)
            for one in dict(zip(names, found, strict=True)).values()
        )
        self.widths = tuple(_width(one) for one in found)
        self.sha256 = "+".join(
            one.weights_sha256 if isinstance(one, Located) else OrientedGradients.sha256 for one in found
        )

    def forward(self, crops: Tensor) -> Tensor:
        """(T, B, C, H, W) crops to (T, B, D): the teachers' embeddings side by side, D the sum of their widths."""
        embeddings = [teacher(crops).float() for teacher in self.each]
        return torch.cat([embeddings[position] for position in self.positions], dim=-1)

    def train(self, mode: bool = True) -> FrozenTeachers:
        """Stays in evaluation mode."""
        return super().train(False)
