"""From the teacher of a run to its model folder: the only thing that training hands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinokit.model_config import BackboneConfig
from dinokit.model_folder import write_model_folder
from dinokit.preprocess import Preprocessing
from dinokit.runtime.torch import describe
from dinokit.training.network import Network
from dinokit.training.recipe import Recipe

__all__ = ["evaluation_preprocessing", "write_teacher"]

_CROP_SHARE = 224 / 256  # of the short side, facebookresearch/dino's evaluation


def evaluation_preprocessing(recipe: Recipe) -> Preprocessing:
    """How the finished model sees a picture: short side to 256/224 of the input size, centre crop."""
    size = recipe.image_size_px or recipe.global_crop_px
    return Preprocessing(resize_px=round(size / _CROP_SHARE), crop_px=(size, size))


def write_teacher(
    run: Path, teacher: Network, recipe: Recipe, step: int, n_steps: int, n_images: int
) -> Path:
    """Writes ``run/model``: the teacher's backbone as a model folder, atomically.

    Args:
        run: the run folder.
        teacher: its backbone is written; the projection head stays in the checkpoint.
        recipe: says sizes, dtype and licence.
        step, n_steps, n_images: how far the run is and on how many pictures, for the record.

    Returns:
        The model folder.
    """
    vit = describe(teacher.backbone)
    config = BackboneConfig(
        name=run.resolve().name,
        vit=vit,
        timm_architecture=recipe.arch,
        model_args=_model_args(recipe, vit),
        preprocessing=evaluation_preprocessing(recipe),
        licence=recipe.licence,
        source=f"dinokit train, {recipe.arch}, step {step} of {n_steps} ({n_images} pictures)",
    )
    weights = {name: tensor.float().cpu().numpy() for name, tensor in teacher.backbone.state_dict().items()}
    return write_model_folder(run / "model", config, weights, dtype=recipe.weights_dtype).path


def _model_args(recipe: Recipe, vit: Any) -> dict[str, Any]:
    """timm's arguments; a plain ViT gets all its sizes, so that the folder does not lean on timm's defaults."""
    args: dict[str, Any] = {
        "img_size": list(vit.image_size),
        "patch_size": recipe.patch_size,
        "dynamic_img_size": True,
    }
    if vit.is_dino_v1:
        args |= {"embed_dim": vit.embed_dim, "depth": vit.depth, "num_heads": vit.num_heads}
    return args
