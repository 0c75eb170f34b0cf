"""The recipe: every setting of a run, as one flat YAML file.

A recipe is read (`load_recipe`), changed by ``key=value`` (`with_overrides`), and completed for the number of
pictures (`dinokit.training.adapt`). What was run is saved beside the run. What cannot be is refused as soon as it is
said (`recipe_rules.py`).
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib import resources
from numbers import Integral
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from dinokit.errors import UsageError
from dinokit.files.outputs import atomic
from dinokit.training.recipe_rules import LEAST_STD, check_recipe

__all__ = [
    "LEAST_STD",
    "Recipe",
    "bundled_recipes",
    "height_and_width",
    "load_recipe",
    "save_recipe",
    "with_overrides",
]


@dataclass(frozen=True)
class Recipe:
    """Settings of one DINO run. ``None`` is filled in from the number of pictures (``dinokit.training.adapt``).

    Defaults are facebookresearch/dino's (`main_dino.py`) where it has one.
    """

    # -- backbone
    arch: str = "vit_small_patch16_224"
    """timm's name of a Vision Transformer, or of any other network of timm: resnet50, xcit_small_12_p16_224 …"""
    patch_size: int = 16
    """Side of a patch in pixels; for Vision Transformers only."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the student, rising linearly to this over the blocks."""
    initialisation: str = "reference"
    """reference, or xavier: MoCo v3's start, with which a short run of a small network learns sooner."""

    # -- pixels
    channels: int = 3
    """3: red, green and blue; 1: every picture is made grey. Any other number: .npy and TIFF files with that many."""
    mean: tuple[float, ...] | str | None = None
    """Per-channel mean in [0, 1], subtracted from the pixels: ImageNet's if left open; auto measures it, which
    also happens for channels other than 1 and 3: ImageNet has none."""
    std: tuple[float, ...] | str | None = None
    """Per-channel standard deviation in [0, 1]; same options as mean."""

    # -- crops
    global_crop_px: int | tuple[int, int] = 224
    """Side of the two global crops, or [height, width]."""
    image_size_px: int | tuple[int, int] | None = None
    """Input size of the exported model, which the position embedding belongs to; global_crop_px if left open."""
    local_crop_px: int | tuple[int, int] = 96
    """Side of the local crops, or [height, width]."""
    n_local_crops: int = 8
    """How many local crops a picture gives."""
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the picture's area that a global crop takes."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the picture's area that a local crop takes."""
    blur_radius_px: tuple[float, float] = (0.1, 2.0)
    """Radius of the random Gaussian blur; 2 belongs to crops of 224 pixels."""
    color_jitter_strength: float = 1.0
    """Of the random changes of brightness, contrast, saturation, hue; less where colour is the signal, 0 for none."""
    grey_probability: float = 0.2
    """How often a crop is made grey."""
    crops: str = "auto"
    """How they are made: pillow (in the workers), batched (on the device) or auto (batched on CUDA)."""

    # -- projection head
    n_prototypes: int | None = None
    """K, outputs of the head (the reference: 65536)."""
    head_hidden_dim: int = 2048
    """Width of the head's MLP."""
    head_bottleneck_dim: int = 256
    """Width of the L2-normalised bottleneck."""
    head_layers: int = 3
    """Layers of the head's MLP."""
    head_batch_norm: bool = False
    """Batch normalisation in the head's MLP (the reference: use_bn_in_head)."""
    norm_last_layer: bool = True
    """Fix the length of the student's prototypes at 1."""
    freeze_last_layer_epochs: int = 1
    """Epochs at the start during which the prototypes stay as they are; none where the run has no more."""
    freeze_backbone_epochs: int = 0
    """Epochs at the start during which the head alone learns: with ``init_from`` it is new, and its first gradients
    would undo what the backbone knows."""

    # -- the method: its parts (`training/objectives/targets.py`, `losses.py`, `teacher.py`, `predictor.py`)
    loss: str = "cross_entropy"
    """cross_entropy (DINO, SwAV), squared_error (BYOL), info_nce (MoCo), similarity (SEED), or relations (CompRess:
    of the embeddings themselves, without a head)."""
    target_normalisation: str = "centering"
    """centering (DINO), sinkhorn (SwAV, DINOv2) or none."""
    teacher: str = "momentum"
    """momentum (a moving average of the student), student (a copy of it) or previous_epoch (a copy once an epoch)."""
    predictor: bool = False
    """A further MLP for the student alone, which guesses the teacher's output (BYOL)."""
    queue_length: int = 65536
    """Targets of earlier batches: info_nce tells the right one from them, similarity compares with them."""
    distill_from: str | tuple[str, ...] | None = None
    """A finished model that is the teacher instead, and stays as it is: what load_backbone takes, of any architecture;
    hog, edges by direction (`oriented_gradients.py`); or a list of such; one named twice counts twice. Their embeddings
    are the targets; with loss squared_error, info_nce, similarity or relations (`recipes/distill.yaml`)."""
    distill_pictures: tuple[str | None, ...] | None = None
    """For each of distill_from the pictures it teaches: a pattern of their names, such as \"*/plants/*\", or null for
    all; with loss relations (`teaching.py`). By default each teaches all."""

    # -- teacher and targets
    teacher_momentum: float | None = None
    """Start of the cosine to 1 (the reference: 0.996). Higher is slower."""
    warmup_teacher_temp: float | None = None
    """Teacher temperature in the first epoch (the reference: 0.04)."""
    teacher_temp: float | None = None
    """Teacher temperature after its warm-up (the reference: 0.04, best runs 0.07)."""
    warmup_teacher_temp_epochs: int | None = None
    """Epochs of its linear warm-up."""
    student_temp: float = 0.1
    """Student temperature."""
    center_momentum: float = 0.9
    """Share of the old centre kept at each step."""
    koleo_weight: float = 0.0
    """Weight of the KoLeo regulariser on the student's global crops (DINOv2: 0.1); 0 leaves it out, as DINO does."""

    foreground_weight: float = 0.0
    """Weight of the KL divergence between what the last block looks at and what stands out from the picture's border
    (`foreground.py`; 1 for a run of its own); 0 leaves it out, as DINO does. For plain ViTs."""

    # -- patches hidden from the student (`training/objectives/masks.py`, `masked_patches.py`)
    ibot_weight: float = 0.0
    """Weight of the loss on hidden patches (iBOT and DINOv2: 1); 0 hides none, as DINO does. For ViTs."""
    ibot_mask_probability: float = 0.5
    """How often a global crop has hidden patches."""
    ibot_mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of its patches that are hidden then."""
    ibot_separate_head: bool = False
    """A head of its own for patches (DINOv2's largest models), instead of the CLS token's (iBOT)."""

    # -- optimisation
    optimizer: str = "adamw"
    """adamw, sgd or lars."""
    epochs: int = 100
    """Passes over the pictures."""
    batch_size: int = 64
    """Pictures a step, over all processes and pieces."""
    accumulate: int = 1
    """Pieces that a process's share of the batch is computed in, for less memory; the step stays one.
    Only BatchNorm, where a network has it, looks at each piece for itself."""
    lr: float = 5e-4
    """Learning rate after the warm-up for 256 pictures a step; scaled linearly with batch_size."""
    min_lr: float = 1e-6
    """Learning rate at the end; not scaled."""
    patch_embed_lr_mult: float = 1.0
    """Share of the learning rate for the patch embedding (DINOv2: 0.2; 0 freezes it, as MoCo v3 does)."""
    warmup_epochs: float | None = None
    """Epochs of the linear warm-up of the learning rate; a fraction for short runs. More than half of the run become a
    tenth."""
    weight_decay: float = 0.04
    """Weight decay at the start of its cosine."""
    weight_decay_end: float = 0.4
    """Weight decay at its end."""
    clip_grad: float = 3.0
    """Largest gradient norm; 0 turns clipping off."""
    clip_per_parameter: bool = False
    """Clip each parameter's gradient by its own norm, as the reference does, instead of all together."""

    # -- run
    precision: str = "auto"
    """bf16, fp16, fp32 or auto (bf16 where the processor has it)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    compile: bool = False
    """Let torch.compile fuse the networks' passes: minutes at the start, for a faster step on a GPU."""
    gradient_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass, not keep them: less memory, for one more
    pass of the student a step. The weights that come out are the same; it may change when a run goes on."""
    devices: int = 1
    """Processes on each node, one a GPU; under torchrun or srun the launcher says it."""
    num_nodes: int = 1
    """Nodes."""
    strategy: str = "ddp"
    """ddp: each process has the whole network; fsdp: each has its part of weights, gradients and optimiser state, for
    networks too large for one GPU."""
    reduced_decoding: bool = False
    """Decode a JPEG at a half, a quarter or an eighth of its size where every crop is still made smaller from that."""
    workers: int | None = None
    """Processes that decode and crop; by default one a core, at most 16."""
    seed: int = 0
    """Seed of weights, order and crops."""
    save_every_epochs: int = 1
    """Checkpoint and model folder after every so many epochs, and at the end."""
    save_every_minutes: float = 10.0
    """And also after so many minutes within an epoch; 0 turns it off."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk."""
    log_every_steps: int = 10
    """A line of metrics.jsonl after so many steps."""
    labelled: str | None = None
    """Labelled pictures for k-NN during training: a folder a class, a CSV, shards with labels. They judge, no more."""
    labelled_queries: str | None = None
    """Other labelled pictures, to be labelled by these; without them each is labelled by all the others."""
    knn_every_epochs: int = 1
    """k-NN after so many epochs, and at the end."""
    knn_images: int = 2000
    """At most so many labelled pictures, and as many queries; they are kept in memory."""
    tensorboard: bool | None = None
    """TensorBoard events beside metrics.jsonl; left open, where tensorboard is installed."""

    init_from: str | None = None
    """What the weights begin with: a run folder or a full checkpoint of facebookresearch/dino (student, teacher, heads,
    centre), or any model that load_backbone takes (its backbone; the heads are new). The schedules start anew."""

    # -- the model folder that comes out
    licence: str | None = None
    """Licence of the weights, as the Hub spells it; left open, that of what ``init_from`` names, or "other"."""
    weights_dtype: str = "float32"
    """float32, or float16 for half the size (computed in float32 all the same)."""

    def __post_init__(self) -> None:
        # In Python too, so that the recipe that is saved reads back as an equal one.
        for key, value in _typed(vars(self), where="Recipe").items():
            object.__setattr__(self, key, value)
        check_recipe(self)

    @property
    def global_crop_hw(self) -> tuple[int, int]:
        """(H, W) of the global crops."""
        return height_and_width(self.global_crop_px)

    @property
    def local_crop_hw(self) -> tuple[int, int]:
        """(H, W) of the local crops."""
        return height_and_width(self.local_crop_px)

    @property
    def image_hw(self) -> tuple[int, int]:
        """(H, W) of the exported model's input."""
        return height_and_width(self.image_size_px or self.global_crop_px)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The finished models that teach, in the order given."""
        named = self.distill_from
        return () if named is None else (named,) if isinstance(named, str) else named

    @property
    def scaled_lr(self) -> float:
        """The learning rate after warm-up for this batch size: ``lr · batch_size / 256``."""
        return self.lr * self.batch_size / 256


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W); one number stands for both."""
    return (size, size) if isinstance(size, int) else size


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with dinokit: name to file."""
    folder = Path(str(resources.files("dinokit.training"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Reads a bundled recipe by its name, or a YAML file.

    Raises:
        UsageError: no such recipe, not a flat YAML mapping, an unknown key or a value of the wrong type.
    """
    bundled = bundled_recipes()
    path = bundled.get(str(name_or_path), Path(name_or_path))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = difflib.get_close_matches(str(name_or_path), bundled, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"there is no recipe {str(name_or_path)!r}. {hint}"
            f"Bundled are {', '.join(bundled)}; or give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the recipe {path} is no text in UTF-8 ({error.reason}); expected `key: value` lines"
        ) from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"the recipe {path} must be flat `key: value` lines, not a {type(values).__name__}")
    return _from_values(values, where=f"the recipe {path.name}")


def with_overrides(recipe: Recipe, assignments: Sequence[str], **named: Any) -> Recipe:
    """Applies ``key=value`` strings, the values written as in YAML.

    Args:
        recipe: stays as it is.
        assignments: the strings; of one key the last counts.
        named: keys and values that win over the strings, of the fields' own types or as YAML has them.

    Raises:
        UsageError: no ``=``, an unknown key or a value of the wrong type.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(
                f"--set {assignment!r} has no '='; write it as key=value, for instance epochs=50"
            )
        try:
            changes[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {assignment!r}: the value is not valid YAML") from error
    return replace(recipe, **{**_typed(changes, where="--set"), **_typed(named, where="with_overrides")})


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe as YAML that :func:`load_recipe` reads back to an equal one."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
    with atomic(path) as file:  # what is left of one, on a full disk, would be another recipe
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _from_values(values: Mapping[str, Any], *, where: str) -> Recipe:
    return Recipe(**_typed(values, where=where))


def _typed(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Checks keys and turns YAML's values into the fields' types."""
    hints = _hints()
    known = [f.name for f in fields(Recipe)]
    typed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise UsageError(f"{where} has an unknown key {key!r}; {_keys_like(str(key), known)}")
        typed[key] = _as_type(key, value, hints[key], where)
    return typed


@functools.cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Recipe)


def _keys_like(key: str, known: Sequence[str]) -> str:
    """What may have been meant: the nearest key, or else those that contain it, as with ``freeze``, or else all."""
    near = difflib.get_close_matches(key, known, n=1)
    if not near and len(key) > 2:
        near = [name for name in known if key.lower() in name]
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"known keys are {', '.join(known)}"


def _as_type(key: str, value: Any, hint: Any, where: str) -> Any:
    if key in ("mean", "std"):  # where auto is a wish of its own
        values = value if isinstance(value, (list, tuple)) else [value]
        numbers = [_number(v) for v in values]
        if numbers and None not in numbers:
            return tuple(numbers)
        if value is None or value == "auto":
            return value
        raise UsageError(
            f"{where}: {key}={value!r} must be a list with a number for each channel, for instance "
            "[0.485, 0.456, 0.406], or auto"
        )
    if value is None or value == "auto":
        default = next(f.default for f in fields(Recipe) if f.name == key)
        if default is None or default == "auto":
            return default
    if key == "distill_from" and isinstance(value, (list, tuple)):
        if value and all(isinstance(name, str | os.PathLike) for name in value):
            return tuple(os.fspath(name) for name in value)
        raise UsageError(f"{where}: {key}={value!r} must be the name of a model, or a list of such")
    if key == "distill_pictures":
        if isinstance(value, (list, tuple)) and all(v is None or isinstance(v, str) for v in value):
            return tuple(value)
        raise UsageError(
            f"{where}: {key}={value!r} must be a list with a pattern of picture names, or null, for each of "
            'distill_from, for instance [null, "*/plants/*"]'
        )
    if tuple[int, int] in get_args(hint) and isinstance(value, (list, tuple)):
        if len(value) == 2 and all(_is_whole(v) for v in value):
            return int(value[0]) if value[0] == value[1] else (int(value[0]), int(value[1]))
        raise UsageError(
            f"{where}: {key}={value!r} must be one whole number, or two: [height, width], for instance [128, 256]"
        )
    if hint == tuple[float, float]:
        numbers = [_number(v) for v in value] if isinstance(value, (list, tuple)) else []
        if len(numbers) == 2 and None not in numbers:
            return tuple(numbers)
        raise UsageError(f"{where}: {key}={value!r} must be two numbers, for instance [0.4, 1.0]")
    wanted = next(t for t in (get_args(hint) or (hint,)) if t is not type(None))
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is int and _is_whole(value):
        return int(value)
    if wanted is float and (number := _number(value)) is not None:
        return number
    if wanted is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    raise UsageError(f"{where}: {key}={value!r} must be of type {wanted.__name__}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    """YAML reads 5e-4, which has no point, as text."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


assert all(f.default is not MISSING for f in fields(Recipe)), "every key of a recipe has a default"
