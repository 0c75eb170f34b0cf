"""The recipe: every setting of a run, as one flat YAML file.

A recipe is read (`load_recipe`), changed by ``key=value`` (`with_overrides`), and completed for the number of
pictures (`dinokit.training.adapt`). The complete recipe is saved with the run. Invalid values are refused as soon as
they are set (`recipe_rules.py`).
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

from dinokit.card.run_files import flat_yaml
from dinokit.errors import UsageError
from dinokit.files.outputs import atomic
from dinokit.training.recipe_rules import LEAST_STD, check_recipe

__all__ = [
    "LEAST_STD",
    "MAY_CHANGE",
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

    Defaults are those of facebookresearch/dino (`main_dino.py`), if it has one.
    """

    # -- backbone
    arch: str = "vit_small_patch16_224"
    """timm's name of a Vision Transformer, or of any other network of timm: resnet50, xcit_small_12_p16_224 …"""
    patch_size: int = 16
    """Side of a patch in pixels; for Vision Transformers only."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the student, rising linearly to this over the blocks."""
    initialisation: str = "reference"
    """reference, or xavier: MoCo v3's initialisation, with which a short run of a small network learns sooner."""

    # -- pixels
    channels: int = 3
    """3: red, green and blue; 1: grey, converted if need be; any other number: .npy and TIFF files with that many."""
    mean: tuple[float, ...] | str | None = None
    """Per-channel mean in [0, 1], subtracted from the pixels: by default ImageNet's; auto measures it, which
    is the default for channels other than 1 and 3, for which ImageNet has no values."""
    std: tuple[float, ...] | str | None = None
    """Per-channel standard deviation in [0, 1]; same options as mean."""

    # -- crops
    global_crop_px: int | tuple[int, int] = 224
    """Side of the two global crops, or [height, width]."""
    image_size_px: int | tuple[int, int] | None = None
    """Input size of the exported model and of its position embedding; by default global_crop_px."""
    local_crop_px: int | tuple[int, int] = 96
    """Side of the local crops, or [height, width]."""
    n_local_crops: int = 8
    """Number of local crops per picture."""
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """Range of a global crop's share of the picture's area."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Range of a local crop's share of the picture's area."""
    blur_radius_px: tuple[float, float] = (0.1, 2.0)
    """Range of the radius of the random Gaussian blur; 2 is for crops of 224 pixels."""
    color_jitter_strength: float = 1.0
    """Strength of random brightness, contrast, saturation and hue; lower if colour is the signal, 0 for none."""
    grey_probability: float = 0.2
    """Probability that a crop is converted to grey."""
    crops: str = "auto"
    """How crops are made: pillow (in the workers), batched (on the device) or auto (batched on CUDA)."""

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
    """Keep the student's prototypes L2-normalised."""
    freeze_last_layer_epochs: int = 1
    """Epochs at the start during which the prototypes stay fixed; 0 if the run is not longer."""
    freeze_backbone_epochs: int = 0
    """Epochs at the start during which only the head learns: with ``init_from`` it is new, and its first gradients
    would damage the backbone's features."""

    # -- the method: its parts (`training/objectives/targets.py`, `losses.py`, `teacher.py`, `predictor.py`)
    loss: str = "cross_entropy"
    """cross_entropy (DINO, SwAV), squared_error (BYOL), info_nce (MoCo), similarity (SEED), or relations (CompRess:
    of the embeddings themselves, without a head)."""
    target_normalisation: str = "centering"
    """centering (DINO), sinkhorn (SwAV, DINOv2) or none."""
    teacher: str = "momentum"
    """momentum (a moving average of the student), student (a copy of it) or previous_epoch (a copy once an epoch)."""
    predictor: bool = False
    """An additional MLP on the student that predicts the teacher's output (BYOL)."""
    queue_length: int = 65536
    """Number of targets kept from earlier batches: info_nce's negatives; similarity and relations compare with them."""
    distill_from: str | tuple[str, ...] | None = None
    """Frozen pretrained model as the teacher: anything load_backbone takes, of any architecture; or hog, histograms of
    oriented gradients (`oriented_gradients.py`); or a list of these, in which one named twice counts twice. Their
    embeddings are the targets; with loss squared_error, info_nce, similarity or relations (`recipes/distill.yaml`)."""
    distill_pictures: tuple[str | None, ...] | None = None
    """For each of distill_from the pictures it teaches: a pattern of their names, such as \"*/plants/*\", or null for
    all; with loss relations (`assignment.py`). By default each teaches all pictures."""

    # -- teacher and targets
    teacher_momentum: float | None = None
    """Start of the teacher's momentum on its cosine to 1 (the reference: 0.996). Higher is slower."""
    warmup_teacher_temp: float | None = None
    """Teacher temperature in the first epoch (the reference: 0.04)."""
    teacher_temp: float | None = None
    """Teacher temperature after its warm-up (the reference: 0.04, best runs 0.07)."""
    warmup_teacher_temp_epochs: int | None = None
    """Epochs of the teacher temperature's linear warm-up."""
    student_temp: float = 0.1
    """Student temperature."""
    center_momentum: float = 0.9
    """Share of the previous centre kept at each step."""
    koleo_weight: float = 0.0
    """Weight of the KoLeo regulariser on the student's global crops (DINOv2: 0.1); 0, as in DINO, turns it off."""

    foreground_weight: float = 0.0
    """Weight of the KL divergence between the last block's attention and what differs from the picture's border
    (`foreground.py`; 1 in the recipe foreground); 0, as in DINO, turns it off. For plain ViTs."""

    # -- patches hidden from the student (`training/objectives/masks.py`, `masked_patches.py`)
    ibot_weight: float = 0.0
    """Weight of the loss on hidden patches (iBOT and DINOv2: 1); 0, as in DINO, hides none. For ViTs."""
    ibot_mask_probability: float = 0.5
    """Probability that a global crop has hidden patches."""
    ibot_mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Range of the share of its patches that are hidden then."""
    ibot_separate_head: bool = False
    """Use a separate head for patches (DINOv2's largest models), instead of the CLS token's (iBOT)."""

    # -- optimisation
    optimizer: str = "adamw"
    """adamw, sgd or lars."""
    epochs: int = 100
    """Passes over the pictures."""
    batch_size: int = 64
    """Pictures per step, over all processes and pieces."""
    accumulate: int = 1
    """Pieces in which a process computes its share of the batch, to save memory; they make one step. Only KoLeo,
    Sinkhorn, stochastic depth and BatchNorm treat each piece separately."""
    lr: float = 5e-4
    """Learning rate after the warm-up for 256 pictures per step; scaled linearly with batch_size."""
    min_lr: float = 1e-6
    """Learning rate at the end; not scaled."""
    patch_embed_lr_mult: float = 1.0
    """Factor on the learning rate of the patch embedding (DINOv2: 0.2; 0 freezes it, as in MoCo v3)."""
    warmup_epochs: float | None = None
    """Epochs of the linear warm-up of the learning rate; a fraction for short runs. More than half of the run is
    reduced to a tenth of it."""
    weight_decay: float = 0.04
    """Weight decay at the start of its cosine."""
    weight_decay_end: float = 0.4
    """Weight decay at the end of its cosine."""
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
    """Compile the networks with torch.compile: takes minutes at the start, for a faster step on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass instead of keeping them: less memory, for one more
    pass of the student per step. The resulting weights are the same; it may change when a run resumes."""
    devices: int = 1
    """Processes on each node, one per GPU; under torchrun or srun the launcher decides."""
    num_nodes: int = 1
    """Number of nodes."""
    strategy: str = "ddp"
    """ddp: each process has the whole network; fsdp: each has a shard of weights, gradients and optimiser state, for
    networks too large for one GPU."""
    reduced_decoding: bool = False
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size if no crop has to be enlarged from that."""
    workers: int | None = None
    """Processes that decode and crop; by default one per core, at most 16."""
    seed: int = 0
    """Random seed of weights, order and crops."""
    save_every_epochs: int = 1
    """Write checkpoint and model folder every so many epochs, and at the end."""
    save_every_minutes: float = 10.0
    """Save also after so many minutes within an epoch; 0 turns it off."""
    keep_checkpoints: int = 2
    """Number of checkpoints kept on disk."""
    log_every_steps: int = 10
    """Write a line of metrics.jsonl every so many steps."""
    labelled: str | None = None
    """Labelled pictures for k-NN during training: one subfolder per class, a CSV, or shards with labels. Nothing is
    learned from them."""
    labelled_queries: str | None = None
    """Labelled pictures to classify by these; without them each picture is classified by all the others."""
    knn_every_epochs: int = 1
    """Evaluate k-NN every so many epochs, and at the end."""
    knn_images: int = 2000
    """Maximum number of labelled pictures, and of queries; they are kept in memory."""
    tensorboard: bool | None = None
    """Write TensorBoard events beside metrics.jsonl; by default if tensorboard is installed."""

    init_from: str | None = None
    """Initial weights: a run folder or a full checkpoint of facebookresearch/dino (student, teacher, heads, centre), or
    any model that load_backbone takes (its backbone; the heads are new). The schedules start from the beginning."""

    # -- the resulting model folder
    licence: str | None = None
    """Licence of the weights, as the Hub spells it; by default that of ``init_from``, or "other"."""
    weights_dtype: str = "float32"
    """float32, or float16 for half the size (still computed in float32)."""

    def __post_init__(self) -> None:
        # Also for a recipe made in Python, so that the saved recipe reads back as an equal one.
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
        """The frozen teachers, in the order given."""
        named = self.distill_from
        return () if named is None else (named,) if isinstance(named, str) else named

    @property
    def scaled_lr(self) -> float:
        """The learning rate after warm-up for this batch size: ``lr · batch_size / 256``."""
        return self.lr * self.batch_size / 256


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W); one number is used for both."""
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
    if path.is_dir() and (path / "recipe.yaml").is_file():
        raise UsageError(f"{path} is a folder; for the recipe of that run name {path / 'recipe.yaml'}")
    try:
        values = flat_yaml(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        near = difflib.get_close_matches(str(name_or_path), bundled, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"there is no recipe {str(name_or_path)!r}. {hint}"
            f"Bundled are {', '.join(bundled)}; or give the path of a YAML file"
        ) from error
    except OSError as error:
        raise UsageError(f"the recipe {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the recipe {path} is not UTF-8 text ({error.reason}); expected `key: value` lines"
        ) from error
    except ValueError as error:
        raise UsageError(f"the recipe {path} cannot be used: {error}") from error
    return Recipe(**_typed(values, where=f"the recipe {path}"))


def with_overrides(recipe: Recipe, assignments: Sequence[str], **named: Any) -> Recipe:
    """Applies ``key=value`` strings, the values written as in YAML.

    Args:
        recipe: not changed.
        assignments: the strings; if a key comes twice, the last counts.
        named: keys and values that take precedence over the strings, of the fields' own types or as YAML has them.

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
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-02-30
            raise UsageError(f"--set {assignment!r}: the value is not valid YAML") from error
    return replace(recipe, **{**_typed(changes, where="--set"), **_typed(named, where="with_overrides")})


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe as YAML that :func:`load_recipe` reads back to an equal one."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
    with atomic(path) as file:  # a truncated file, on a full disk, would be another recipe
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


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
    """A suggestion: the nearest key, else those that contain it, as with ``freeze``, else all keys."""
    near = difflib.get_close_matches(key.lower(), known, n=1)
    if not near and len(key) > 2:
        near = [name for name in known if key.lower() in name]
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"known keys are {', '.join(known)}"


def _as_type(key: str, value: Any, hint: Any, where: str) -> Any:
    if key in ("mean", "std"):  # whose default is None, and auto is another value
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
        raise UsageError(f"{where}: {key}={value!r} must be the name of a model, or a list of names")
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
    raise UsageError(f"{where}: {key}={value!r} must be {_KINDS[wanted]}")


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
"""What is expected of a value, for errors."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    """YAML reads 5e-4 as text, since it has no decimal point."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


MAY_CHANGE = frozenset(
    {
        "save_every_epochs",
        "save_every_minutes",
        "keep_checkpoints",
        "log_every_steps",
        "labelled",
        "labelled_queries",
        "knn_every_epochs",
        "knn_images",
        "tensorboard",
        "workers",
        "device",
        "devices",
        "num_nodes",
        "strategy",
        "accumulate",
        "gradient_checkpointing",
    }
)
"""Keys that may differ when a run resumes: they change how it is monitored or where it runs, not what it computes."""

assert all(f.default is not MISSING for f in fields(Recipe)), "every key of a recipe has a default"
assert {f.name for f in fields(Recipe)} >= MAY_CHANGE
