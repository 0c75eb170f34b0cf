"""Writes the teacher of a run as its model folder, the only result that other packages read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from dinokit.card import make_record, record_of_run
from dinokit.errors import ModelError
from dinokit.files.json_files import read_json
from dinokit.model_folder.architecture import Architecture, VitArchitecture, is_vit_name
from dinokit.model_folder.config import BackboneConfig, one_line
from dinokit.model_folder.folder import RECORD_FILE, is_model_folder, write_model_folder
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime.torch import describe_any, weights_of
from dinokit.training.networks.network import Network
from dinokit.training.recipe import Recipe
from dinokit.training.views.normalisation import normalisation, preprocessing_of

__all__ = ["evaluation_preprocessing", "is_behind", "write_teacher"]


def evaluation_preprocessing(recipe: Recipe) -> Preprocessing:
    """The preprocessing of the model that the run writes."""
    return preprocessing_of(recipe.image_hw, *normalisation(recipe))


def write_teacher(
    run: Path, teacher: Network, recipe: Recipe, step: int, n_steps: int, n_images: int
) -> Path:
    """Writes ``run/model``: the teacher's backbone as a model folder, atomically.

    Args:
        run: the run folder.
        teacher: its backbone is written; the projection head stays in the checkpoint.
        recipe: gives sizes, dtype and licence.
        step, n_steps, n_images: how far the run is and on how many pictures, for the record.

    Returns:
        The model folder.
    """
    preprocessing = evaluation_preprocessing(recipe)
    architecture = describe_any(teacher.backbone, preprocessing.crop_px)
    config = BackboneConfig(
        name=one_line(run.resolve().name),
        architecture=architecture,
        timm_architecture=recipe.arch,
        model_args=_model_args(recipe, architecture),
        preprocessing=preprocessing,
        licence=recipe.licence or "other",
        source=f"dinokit train, {recipe.arch}, step {step} of {n_steps} ({n_images} pictures)",
    )
    weights = weights_of(teacher.backbone)
    # The card is written from this record, which outlives the run folder.
    record = None
    with contextlib.suppress(ModelError):  # a lost recipe.yaml must not prevent saving the weights
        record = make_record(record_of_run(run, step=step, n_steps=n_steps, n_images=n_images))
    return write_model_folder(run / "model", config, weights, record=record, dtype=recipe.weights_dtype).path


def is_behind(run: Path, step: int) -> bool:
    """Whether ``run/model`` is missing or older than ``step``: a save was interrupted after its checkpoint."""
    model = run / "model"
    if not is_model_folder(model):
        return True
    try:
        written = read_json(model / RECORD_FILE)["runs"][-1]["step"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False  # it has no record of its step, and is left alone
    return isinstance(written, int) and written < step


def _model_args(recipe: Recipe, architecture: Architecture) -> dict[str, Any]:
    """timm's arguments; a plain ViT gets all its sizes, so that the folder does not depend on timm's defaults."""
    channels = {} if recipe.channels == 3 else {"in_chans": recipe.channels}
    if not is_vit_name(recipe.arch):
        return channels
    args: dict[str, Any] = {
        **channels,
        "img_size": list(architecture.image_size),
        "patch_size": recipe.patch_size,
        "dynamic_img_size": True,
    }
    if isinstance(architecture, VitArchitecture) and architecture.is_dino_v1:
        args |= {
            "embed_dim": architecture.embed_dim,
            "depth": architecture.depth,
            "num_heads": architecture.num_heads,
        }
    if isinstance(architecture, VitArchitecture) and architecture.position == "rope":
        args["global_pool"] = "token"  # timm's own is the mean of the patches
    return args
