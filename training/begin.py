"""What a run begins with: the weights that ``init_from`` names.

==============================================  =====================================================
a run of ``dinokit train``                      student, teacher, heads, centre: it goes on with them
a full checkpoint of facebookresearch/dino      the same, as far as the file has them
anything that ``load_backbone`` takes           the backbone of student and teacher; the heads are new
==============================================  =====================================================

The schedules, the optimiser's state and the count of steps start anew in each case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.errors import UsageError
from dinokit.locate import locate
from dinokit.runtime.torch import resize_position_embedding
from dinokit.training import checkpoint
from dinokit.training.state import TrainingState, saved_targets
from dinokit.training.teacher import copy_student
from dinokit.weights import load_pth_safely

__all__ = ["begin_with"]

_State = Mapping[str, Tensor]


def begin_with(state: TrainingState, source: str, warn: Callable[[str], None] = lambda _: None) -> None:
    """Gives a new run the weights of another.

    Args:
        state: at step 0; changed in place.
        source: what :class:`dinokit.training.recipe.Recipe` calls ``init_from``.
        warn: told what the source has not got.

    Raises:
        UsageError: it has no weights, or its tensors have other shapes than the recipe's network.
        ModelError: it is found and cannot be read.
    """
    path = Path(source).expanduser()
    if (path / "checkpoint").is_dir():
        _begin_with_run(state, path)
    elif path.suffix in (".pth", ".pt") and path.is_file() and _is_full(content := load_pth_safely(path)):
        _begin_with_reference(state, content, source, warn)
    else:
        _begin_with_backbone(state, source, warn)


def _begin_with_run(state: TrainingState, run: Path) -> None:
    saved, _ = checkpoint.load_newest(run / "checkpoint")
    if saved is None:
        raise UsageError(f"init_from={run} has no checkpoint; name the folder of a run of `dinokit train`")
    parts = {"student": saved["student"], "teacher": saved["teacher"], "targets": saved_targets(saved)}
    for name, theirs in parts.items():
        _load(getattr(state, name), theirs, name, f"{run} is a run")


def _is_full(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(content.get(name), Mapping) for name in ("student", "teacher")
    )


def _begin_with_reference(
    state: TrainingState, content: Mapping[str, Any], source: str, warn: Callable[[str], None]
) -> None:
    """Source: facebookresearch/dino `main_dino.py`, `save_dict`; ``module.`` comes from distributed training."""
    for name in ("student", "teacher"):
        network = getattr(state, name)
        theirs = {key.removeprefix("module."): value for key, value in content[name].items()}
        here = network.state_dict()
        if not any(key.startswith("head.") for key in theirs):
            raise UsageError(
                f"init_from={source}: its {name} has no projection head, so it is no full checkpoint"
            )
        theirs = {
            key: _fitting_positions(state, value) if key == "backbone.pos_embed" else value
            for key, value in theirs.items()
        }
        # The reference has no predictor; a new one stays as it is.
        kept = {key: value for key, value in here.items() if key.startswith("predictor.")}
        _load(network, {**kept, **theirs}, name, f"{source} is a checkpoint")
    center = content.get("dino_loss")
    if not isinstance(center, Mapping) or "center" not in center:
        warn(f"{source} has no centre (dino_loss); it starts at 0")
        return
    _load(state.targets, center, "targets", f"{source} is a checkpoint")


def _begin_with_backbone(state: TrainingState, source: str, warn: Callable[[str], None]) -> None:
    path = Path(source).expanduser()
    if path.is_dir() and not any((path / where / "config.json").is_file() for where in ("", "model")):
        raise UsageError(
            f"init_from={source} has no checkpoint and is no model folder; name the folder of a run of "
            "`dinokit train`, or of a model"
        )
    try:
        located = locate(source)
    except UsageError as error:
        raise UsageError(
            f"init_from={source} is no run, checkpoint or model: {error}. Name the folder of a run, a .pth file of "
            "facebookresearch/dino, a model folder, a Hub id, or one of `dinokit models`"
        ) from error
    if located.load_weights is None:
        raise UsageError(
            f"init_from={source} is an ONNX file, which cannot be trained; name its model folder"
        )
    theirs = {name: torch.from_numpy(array) for name, array in located.load_weights().items()}
    # BatchNorm's counts of batches, which a model folder leaves out: nothing is computed with them.
    here = state.student.backbone.state_dict()
    theirs |= {name: value for name, value in here.items() if name.endswith("num_batches_tracked")}
    if "pos_embed" in theirs:
        theirs["pos_embed"] = _fitting_positions(state, theirs["pos_embed"])
    _load(state.student.backbone, theirs, "backbone", f"{source} is a model")
    copy_student(state.student, state.teacher)
    if state.recipe.freeze_last_layer_epochs == 0:
        warn(
            f"{source} has no projection head, so a new one begins on trained features; "
            "freeze_last_layer_epochs=1 spares them its first steps"
        )


def _fitting_positions(state: TrainingState, pos_embed: Tensor) -> Tensor:
    """The position embedding at the grid of the recipe, resized as the network resizes it at other sizes."""
    backbone: Any = state.student.backbone
    patch_embed = getattr(backbone, "patch_embed", None)
    if patch_embed is None or pos_embed.ndim != 3:
        return pos_embed
    n_prefix = backbone.pos_embed.shape[1] - patch_embed.num_patches
    side = round((pos_embed.shape[1] - n_prefix) ** 0.5)
    if n_prefix + side * side != pos_embed.shape[1]:
        return pos_embed  # not square: the shapes are compared below
    return resize_position_embedding(
        pos_embed, patch_embed.grid_size, (side, side), n_prefix, backbone.pos_embed_resize
    )


def _load(module: nn.Module, theirs: _State, part: str, what: str) -> None:
    here = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    there = {key: tuple(value.shape) for key, value in theirs.items()}
    if here != there:
        wrong = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        raise UsageError(
            f"init_from={what} of another shape: {wrong[0]} of the {part} is {there.get(wrong[0])} there "
            f"and {here.get(wrong[0])} here ({len(wrong)} tensors differ). Use its arch, patch_size, "
            "image_size_px, n_prototypes and head sizes"
        )
    module.load_state_dict(theirs)
