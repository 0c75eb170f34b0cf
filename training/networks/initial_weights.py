"""The initial weights of a run, which ``init_from`` names.

==============================================  =====================================================
a run of ``dinokit train``                      student, teacher, heads, centre
a full checkpoint of facebookresearch/dino or   the same, as far as the file has them
of bytedance/ibot
anything that ``load_backbone`` takes           the backbone of student and teacher; the heads are new
==============================================  =====================================================

The schedules, the optimiser's state and the step count start from the beginning in each case. Parts that only this
run's method has (a centre, a predictor, the mask token) start new; parts that only the source has are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.errors import ModelError, UsageError
from dinokit.loading.locate import locate
from dinokit.model_folder.architecture import VitArchitecture, is_vit_name
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.reference_networks import to_timm_names
from dinokit.model_folder.weights import load_pth_safely
from dinokit.runtime.torch import resize_position_embedding
from dinokit.training.devices.sharding import load_whole
from dinokit.training.networks.first_layer import spread_over_channels
from dinokit.training.objectives.teacher import copy_student
from dinokit.training.recipe import Recipe, load_recipe
from dinokit.training.run import checkpoint
from dinokit.training.run.run_folder import recipe_of
from dinokit.training.run.state import TrainingState, saved_targets
from dinokit.wording import counted

__all__ = ["begin_with", "licence_at_start"]

_State = Mapping[str, Tensor]

# The keys of a recipe that determine names and shapes of the tensors.
_SHAPING = (
    "arch",
    "patch_size",
    "channels",
    "n_prototypes",
    "head_hidden_dim",
    "head_bottleneck_dim",
    "head_layers",
    "head_batch_norm",
)
_REMEDY = "Use its arch, patch_size, channels, n_prototypes and head sizes"


def begin_with(state: TrainingState, source: str, warn: Callable[[str], None] = lambda _: None) -> None:
    """Gives a new run the weights of another.

    Args:
        state: at step 0; changed in place.
        source: ``init_from`` of :class:`dinokit.training.recipe.Recipe`.
        warn: called with each part that the source lacks.

    Raises:
        UsageError: the source has no weights, or its tensors have other shapes than the recipe's network.
        ModelError: the source is found but cannot be read.
    """
    path = Path(source).expanduser()
    if (path / "checkpoint").is_dir():
        _begin_with_run(state, path, warn)
    elif path.suffix in (".pth", ".pt") and path.is_file() and _is_full(content := load_pth_safely(path)):
        _begin_with_reference(state, content, source, warn)
    else:
        _begin_with_backbone(state, source, warn)


def licence_at_start(recipe: Recipe, run: Path | None) -> str | None:
    """The licence of the weights that a run starts or started from; None if unknown, or if they are random."""
    with contextlib.suppress(UsageError, ModelError, OSError):
        if run is not None and (began := recipe_of(run)) is not None:
            return began.licence
        if recipe.init_from is None:
            return None
        path = Path(recipe.init_from).expanduser()
        if (path / "checkpoint").is_dir():
            found = load_recipe(path / "recipe.yaml").licence
        elif path.suffix in (".pth", ".pt"):
            return None
        else:
            found = locate(recipe.init_from).config.licence
        return None if found in ("unknown", "other") else found
    return None  # loading the source reports what is wrong with it


def _begin_with_run(state: TrainingState, run: Path, warn: Callable[[str], None]) -> None:
    saved, _ = checkpoint.load_newest(run / "checkpoint")
    if saved is None:
        raise UsageError(f"init_from={run} has no checkpoint; name the folder of a run of `dinokit train`")
    theirs = _recipe_in(run)
    remedy = _REMEDY if theirs is None else _as_in_run(state, theirs)
    if theirs is not None:
        _must_not_rearrange_positions(state, theirs, saved["student"], run, remedy)
    grid = None if theirs is None else tuple(side // theirs.patch_size for side in theirs.image_hw)
    student, teacher = (_with_fitting_positions(state, saved[name], grid) for name in ("student", "teacher"))
    _load_networks(state, student, teacher, run, "run", warn, remedy)
    if _is_of_other_teachers(state, saved_targets(saved)):
        warn(f"the centre of {run} belongs to other teachers; it starts at 0")
    else:
        _load_center(state.targets, saved_targets(saved), "centre", run, "run", warn)
    if state.masked_patches is not None:
        center = saved.get("masked_patches", {})
        _load_center(state.masked_patches, center, "centre of hidden patches", run, "run", warn)


def _must_not_rearrange_positions(
    state: TrainingState, theirs: Recipe, student: _State, run: Path, remedy: str
) -> None:
    """Networks that do not resize their positions take 4 x 16 of them for 8 x 8: the shapes are the same."""
    fixed = "backbone.pos_embed" in student and not _resizes_positions(state.student.backbone)
    there, here = theirs.image_hw, state.recipe.image_hw
    if fixed and there[0] * there[1] == here[0] * here[1] and there != here:
        raise UsageError(
            f"init_from={run} has positions for {there[0]} x {there[1]} pixels, not {here[0]} x {here[1]}, and "
            f"{state.recipe.arch} cannot resize them. {remedy}"
        )


def _is_of_other_teachers(state: TrainingState, theirs: _State) -> bool:
    """Whether the run had other teachers, of another width: without a head, only the centre shows it."""
    ours = state.targets.state_dict()
    return (
        state.recipe.loss == "relations"
        and ours.keys() == theirs.keys()
        and any(ours[name].shape != theirs[name].shape for name in ours)
    )


def _load_center(
    part: nn.Module, theirs: _State, name: str, source: str | Path, kind: str, warn: Callable[[str], None]
) -> None:
    """Loads the centre if both methods keep the same kind; other targets keep another centre, or none."""
    if part.state_dict().keys() == theirs.keys():
        _load(part, theirs, name, f"{source} is a {kind}")
    elif part.state_dict():
        warn(f"{source} has no {name} of the kind that this recipe needs; it starts at 0")
    else:
        warn(f"the {name} of {source} is left out: the targets of this recipe do not use one")


_OWN_TO_A_METHOD = {
    "head": "projection head",
    "predictor": "predictor",
    "mask_token": "mask token",
    "patch_head": "head for patches",
}


def _load_networks(
    state: TrainingState,
    student: _State,
    teacher: _State,
    source: str | Path,
    kind: str,
    warn: Callable[[str], None],
    remedy: str = _REMEDY,
) -> None:
    """Loads student and teacher: common parts must fit; a part that only one method has starts new or is left out."""
    for name, theirs in (("student", student), ("teacher", teacher)):
        network = getattr(state, name)
        here = network.state_dict()
        taken = spread_over_channels(network, theirs, warn if name == "student" else lambda _: None)
        for part, words in _OWN_TO_A_METHOD.items():
            ours, others = _of_part(here, part), _of_part(theirs, part)
            if others and not ours:
                taken = {key: value for key, value in taken.items() if key not in others}
            elif ours and not others:
                taken |= ours
            if bool(ours) != bool(others) and name == "student":
                warn(
                    f"{source} has no {words}; a new one starts"
                    if ours
                    else f"the {words} of {source} is left out"
                )
        _load(network, taken, name, f"{source} is a {kind}", remedy)


def _of_part(tensors: _State, part: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.split(".", 1)[0] == part}


def _is_full(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(content.get(name), Mapping) for name in ("student", "teacher")
    )


def _begin_with_reference(
    state: TrainingState, content: Mapping[str, Any], source: str, warn: Callable[[str], None]
) -> None:
    """Source: facebookresearch/dino `main_dino.py`, `save_dict`; ``module.`` comes from distributed training."""
    networks: dict[str, _State] = {}
    for name in ("student", "teacher"):
        theirs: _State = {key.removeprefix("module."): value for key, value in content[name].items()}
        if not any(key.startswith("head.") for key in theirs):
            raise UsageError(
                f"init_from={source}: its {name} has no projection head, so it is not a full checkpoint; name a "
                "checkpoint file with student and teacher, or a model"
            )
        # As all published networks, it saw square pictures.
        theirs = _with_timms_names(_with_fitting_positions(state, theirs, None))
        if "ibot_loss" in content:
            theirs = _ibots_parts(theirs, separate_head=state.recipe.ibot_separate_head)
        networks[name] = theirs
    remedy = _as_in_checkpoint(state, networks["student"])
    _load_networks(state, networks["student"], networks["teacher"], source, "checkpoint", warn, remedy)
    saved = content.get("dino_loss", content.get("ibot_loss"))
    saved = saved if isinstance(saved, Mapping) else {}
    center = {"center": saved["center"]} if "center" in saved else {}
    _load_center(state.targets, center, "centre", source, "checkpoint", warn)
    if state.masked_patches is not None:
        center = {"targets.center": saved["center2"][0]} if "center2" in saved else {}
        _load_center(state.masked_patches, center, "centre of hidden patches", source, "checkpoint", warn)


def _with_timms_names(theirs: _State) -> _State:
    """The XCiTs that come with DINO have other names than timm's, and one matrix for queries, keys and values."""
    prefix, count = "backbone.", "num_batches_tracked"
    arrays = {
        key.removeprefix(prefix): value.float().numpy()
        for key, value in theirs.items()
        if key.startswith(prefix) and not key.endswith(count)
    }
    renamed = to_timm_names(arrays)
    if renamed is None:
        return theirs
    others = {key: value for key, value in theirs.items() if key.removeprefix(prefix) not in arrays}
    return others | {prefix + key: torch.from_numpy(array) for key, array in renamed.items()}


def _ibots_parts(theirs: _State, *, separate_head: bool) -> dict[str, Tensor]:
    """bytedance/ibot `models/head.py`, `iBOTHead`: one MLP, and one last layer each for the CLS token and for patches,
    which may be shared. A separate last layer becomes a head for patches; a shared one is left out unless
    ``separate_head``."""
    found = {key: value for key, value in theirs.items() if "last_layer2" not in key}
    if "backbone.masked_embed" in found:
        found["mask_token"] = found.pop("backbone.masked_embed")
    own = {key.replace("last_layer2", "last_layer"): theirs[key] for key in theirs if "last_layer2" in key}
    if own and (separate_head or any(not torch.equal(value, theirs[key]) for key, value in own.items())):
        own |= {key: value for key, value in found.items() if key.startswith("head.mlp.")}
        found |= {f"patch_{key}": value for key, value in own.items()}
    return found


def _begin_with_backbone(state: TrainingState, source: str, warn: Callable[[str], None]) -> None:
    path = Path(source).expanduser()
    if path.is_dir() and not any((path / where / "config.json").is_file() for where in ("", "model")):
        raise UsageError(
            f"init_from={source} has no checkpoint and is not a model folder; name the folder of a run of "
            "`dinokit train`, or of a model"
        )
    try:
        located = locate(source)
    except UsageError as error:
        raise UsageError(
            f"init_from={source} is not a run, checkpoint or model: {error}. Name the folder of a run, a .pth file of "
            "facebookresearch/dino, a model folder, a Hub id, or one of `dinokit models`"
        ) from error
    if located.load_weights is None:
        raise UsageError(
            f"init_from={source} is an ONNX file, which cannot be trained; name its model folder"
        )
    theirs = {name: torch.from_numpy(array) for name, array in located.load_weights().items()}
    # A model folder leaves out BatchNorm's counts of batches: they are not used in any computation.
    here = state.student.backbone.state_dict()
    theirs |= {name: value for name, value in here.items() if name.endswith("num_batches_tracked")}
    architecture = located.config.architecture
    if "pos_embed" in theirs and isinstance(architecture, VitArchitecture):
        theirs["pos_embed"] = _fitting_positions(state, theirs["pos_embed"], architecture.grid)
    theirs = spread_over_channels(state.student.backbone, theirs, warn)
    remedy = _as_in_model(state.recipe, located.config)
    _load(state.student.backbone, theirs, "backbone", f"{source} is a model", remedy)
    copy_student(state.student, state.teacher)
    if state.recipe.loss == "relations":
        return  # there is no head
    if state.recipe.freeze_backbone_epochs > 0:
        return  # only the head learns at first
    if state.recipe.freeze_last_layer_epochs == 0 and state.recipe.epochs > 1:
        warn(
            f"{source} has no projection head, so a new one starts on trained features; "
            "freeze_last_layer_epochs=1 protects them from its first steps"
        )


def _with_fitting_positions(state: TrainingState, theirs: _State, grid: tuple[int, ...] | None) -> _State:
    return {
        key: _fitting_positions(state, value, grid) if key == "backbone.pos_embed" else value
        for key, value in theirs.items()
    }


def _fitting_positions(state: TrainingState, pos_embed: Tensor, grid: tuple[int, ...] | None) -> Tensor:
    """The position embedding at the recipe's grid, resized as the network itself resizes it.

    Args:
        state: of the run.
        pos_embed: of the source.
        grid: its (rows, columns); None for a square. Their product alone does not tell 4 x 16 from 8 x 8.
    """
    backbone: Any = state.student.backbone
    if not _resizes_positions(backbone) or pos_embed.ndim != 3:
        return pos_embed  # other positions: `_load` compares the shapes
    n_prefix = backbone.pos_embed.shape[1] - backbone.patch_embed.num_patches
    side = round(max(pos_embed.shape[1] - n_prefix, 0) ** 0.5)
    rows, columns = grid or (side, side)
    if n_prefix + rows * columns != pos_embed.shape[1]:
        return pos_embed  # of another network: `_load` compares the shapes
    resize = backbone.pos_embed_resize
    return resize_position_embedding(
        pos_embed, backbone.patch_embed.grid_size, (rows, columns), n_prefix, resize
    )


def _resizes_positions(backbone: Any) -> bool:
    return hasattr(backbone, "patch_embed") and hasattr(backbone, "pos_embed_resize")


def _recipe_in(run: Path) -> Recipe | None:
    try:
        return load_recipe(run / "recipe.yaml")
    except (UsageError, OSError):
        return None


def _as_in_run(state: TrainingState, theirs: Recipe) -> str:
    """How to change the recipe so that a run's networks fit."""
    recipe = state.recipe
    keys = [key for key in _SHAPING if not _is_no_choice(recipe, key)]
    there = {key: getattr(theirs, key) for key in keys}
    here = {key: getattr(recipe, key) for key in keys}
    if not _resizes_positions(state.student.backbone):
        # By default it is the size of the global crop.
        there["image_size_px"] = theirs.image_size_px or theirs.global_crop_px
        here["image_size_px"] = recipe.image_size_px or recipe.global_crop_px
    return _as_there(there, here)


def _as_in_checkpoint(state: TrainingState, theirs: _State) -> str:
    """How to change the recipe so that a checkpoint's networks fit, by the shapes of its tensors; it has no recipe."""
    recipe = state.recipe
    first, last = theirs.get("head.mlp.0.weight"), theirs.get("head.last_layer.weight_v")
    if first is None or last is None:
        return _REMEDY
    mlp = [value for key, value in theirs.items() if key.startswith("head.mlp.") and key.endswith(".weight")]
    patches = theirs.get("backbone.patch_embed.proj.weight")
    there: dict[str, Any] = {
        "n_prototypes": last.shape[0],
        "head_hidden_dim": first.shape[0],
        "head_bottleneck_dim": last.shape[1],
        "head_layers": sum(weight.ndim == 2 for weight in mlp),
        "head_batch_norm": any(weight.ndim == 1 for weight in mlp),
    }
    if patches is not None and is_vit_name(recipe.arch):
        there["patch_size"] = patches.shape[2]
        if patches.shape[1] != 3:  # three channels become any number
            there["channels"] = patches.shape[1]
    there = {key: value for key, value in there.items() if not _is_no_choice(recipe, key)}
    remedy = _as_there(there, {key: getattr(recipe, key) for key in there})
    if remedy == _REMEDY or first.shape[1] == state.student.embed_dim:
        return remedy
    return f"{remedy} and its arch, whose embeddings have width {first.shape[1]}"


def _is_no_choice(recipe: Recipe, key: str) -> bool:
    """Whether the recipe does not use a key: without a head those of heads, and with frozen teachers ``n_prototypes``,
    which follows from them."""
    if recipe.loss == "relations" and (key == "n_prototypes" or key.startswith("head_")):
        return True
    return recipe.distill_from is not None and key == "n_prototypes"


def _as_in_model(recipe: Recipe, config: BackboneConfig) -> str:
    """How to change the recipe so that a model's backbone fits; positions are resized to any image size."""
    there: dict[str, Any] = {"arch": config.timm_architecture or recipe.arch, "patch_size": recipe.patch_size}
    if is_vit_name(there["arch"]):
        there["patch_size"] = config.patch_size
    return _as_there(there, {key: getattr(recipe, key) for key in there})


def _as_there(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    others = [f"--set {key}={_shown(value)}" for key, value in there.items() if value != here[key]]
    return f"Use its settings: {' '.join(others)}" if others else _REMEDY


def _shown(value: Any) -> str:
    return f"'[{value[0]}, {value[1]}]'" if isinstance(value, tuple) else str(value).replace("True", "true")


def _load(module: nn.Module, theirs: _State, part: str, what: str, remedy: str = _REMEDY) -> None:
    here = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    there = {key: tuple(value.shape) for key, value in theirs.items()}
    if here != there:
        wrong = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        raise UsageError(
            f"init_from={what} of another shape: {wrong[0]} of the {part} is {there.get(wrong[0])} there "
            f"and {here.get(wrong[0])} here ({counted(len(wrong), 'tensor')} in all). {remedy}"
        )
    load_whole(module, theirs)
