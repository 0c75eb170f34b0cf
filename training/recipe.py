"""The recipe: every setting of a run, as one flat YAML file.

A recipe is read (`load_recipe`), changed by ``key=value`` (`with_overrides`), and completed for the number of
pictures (`dinokit.training.adapt`). What was run is saved beside the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from dinokit.architecture import is_vit_name
from dinokit.bands import is_photographic
from dinokit.errors import UsageError

__all__ = [
    "Recipe",
    "bundled_recipes",
    "height_and_width",
    "least_std",
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
    """3: red, green and blue; 1: every picture is made grey. Any other number: .npy and TIFF files of so many."""
    mean: tuple[float, ...] | str | None = None
    """Of each channel in 0…1, which is taken away: ImageNet's if left open; auto measures it on the pictures, which is
    done for other than 1 or 3 channels, too: ImageNet has none."""
    std: tuple[float, ...] | str | None = None
    """Standard deviation of each channel in 0…1, by which is divided; as mean."""

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
    """Epochs at the start during which the prototypes stay as they are."""

    # -- the method: its parts (`training/targets.py`, `losses.py`, `teacher.py`, `predictor.py`)
    loss: str = "cross_entropy"
    """cross_entropy (DINO, SwAV), squared_error (BYOL), info_nce (MoCo) or similarity (SEED)."""
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
    or a list of such. Their embeddings are the targets; with loss squared_error, info_nce or similarity
    (`recipes/distill.yaml`)."""

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

    # -- patches hidden from the student (`training/masks.py`, `masked_patches.py`)
    ibot_weight: float = 0.0
    """Weight of the loss on hidden patches (iBOT and DINOv2: 1); 0 hides none, as DINO does. For plain ViTs."""
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
    """Epochs of the linear warm-up of the learning rate; a fraction for short runs."""
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
    licence: str = "other"
    """Licence of the weights, as the Hub spells it."""
    weights_dtype: str = "float32"
    """float32, or float16 for half the size (computed in float32 all the same)."""

    def __post_init__(self) -> None:
        _check(self)

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


def least_std(channels: int) -> float:
    """The least deviation by which is divided: of 256 levels a quarter of one; of bands, which may have 16 bits and be
    dark, less than one of their 65536."""
    return 1e-3 if is_photographic(channels) else 1e-5


def _check(recipe: Recipe) -> None:
    """Refuses values that cannot be and contradictions."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UsageError(message)

    positive = (
        "patch_size n_prototypes head_hidden_dim head_bottleneck_dim head_layers "
        "epochs batch_size save_every_epochs keep_checkpoints log_every_steps accumulate devices num_nodes "
        "knn_every_epochs queue_length"
    )
    for key in positive.split():
        value = getattr(recipe, key)
        need(value is None or value >= 1, f"{key}={value} must be at least 1")
    for key in (
        "n_local_crops",
        "freeze_last_layer_epochs",
        "lr",
        "min_lr",
        "weight_decay",
        "clip_grad",
        "seed",
        "koleo_weight",
        "ibot_weight",
        "patch_embed_lr_mult",
    ):
        value = getattr(recipe, key)
        need(value >= 0, f"{key}={value} must not be negative")
    for key in ("teacher_momentum", "center_momentum", "drop_path_rate"):
        value = getattr(recipe, key)
        need(value is None or 0.0 <= value <= 1.0, f"{key}={value} must lie between 0 and 1")
    for key in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
        value = getattr(recipe, key)
        need(value is None or value > 0, f"{key}={value} must be above 0, for instance 0.04")
    for key in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(recipe, key)
        need(0 < low <= high <= 1, f"{key}=[{low}, {high}] must be two rising shares of the area, 0 to 1")
    pieces = recipe.accumulate * recipe.devices * recipe.num_nodes
    need(
        recipe.batch_size % pieces == 0,
        f"batch_size={recipe.batch_size} is not a multiple of accumulate · devices · num_nodes = {pieces}",
    )
    need(
        recipe.koleo_weight == 0 or recipe.batch_size // pieces >= 2,
        "koleo_weight needs at least 2 pictures in each piece of the batch: it compares them with each other",
    )
    if recipe.ibot_weight:
        _check_hidden_patches(recipe, need)
    need(recipe.knn_images >= 2, f"knn_images={recipe.knn_images} must be at least 2")
    need(
        recipe.labelled_queries is None or recipe.labelled is not None,
        "labelled_queries needs labelled: the pictures whose labels the queries get",
    )
    need(
        0 <= recipe.color_jitter_strength <= 2.5,
        f"color_jitter_strength={recipe.color_jitter_strength} must lie between 0 (no change) and 2.5 (where a crop "
        "may become black); 1 is the reference's",
    )
    need(
        0 <= recipe.grey_probability <= 1,
        f"grey_probability={recipe.grey_probability} must lie between 0 and 1",
    )
    need(
        1 <= recipe.channels <= 1000,
        f"channels={recipe.channels} must be 3 (colour), 1 (grey), or how many the .npy or TIFF files have, to 1000",
    )
    for key in ("mean", "std"):
        value = getattr(recipe, key)
        if isinstance(value, tuple):
            n = recipe.channels
            need(
                len(value) == n,
                f"{key} has {len(value)} numbers and channels={n}; give one a channel, in 0…1: "
                f"[{', '.join(['0.5', '0.45', '0.4'][:n])}{', …' if n > 3 else ''}]",
            )
            least = 0.0 if key == "mean" else least_std(n)
            wrong = [v for v in value if not least <= v <= 1]
            need(
                not wrong,
                f"{key}={list(value)} must lie between {least:g} and 1: pictures count from 0 (black) to 1 (white). "
                "Divide numbers that were measured in 0…255 by 255",
            )
        else:
            need(
                value in (None, "auto"),
                f"{key}={value!r} is not known; give a number for each channel, or auto",
            )
    low, high = recipe.blur_radius_px
    need(0 <= low <= high, f"blur_radius_px=[{low}, {high}] must be two rising radii")
    for key in ("global_crop_px", "local_crop_px", "image_size_px"):
        given = getattr(recipe, key)
        for size in () if given is None else dict.fromkeys(height_and_width(given)):
            shown = f"{key}={given if isinstance(given, int) else list(given)}"
            need(size >= 1, f"{shown} must be at least 1")
            patch = recipe.patch_size if is_vit_name(recipe.arch) else 1
            below = max(size // patch, 1) * patch
            need(
                size % patch == 0,
                f"{shown} is not a multiple of patch_size={patch}; use {below} or {below + patch}"
                + ("" if isinstance(given, int) else f" instead of {size}"),
            )
    _one_of("loss", recipe.loss, ("cross_entropy", "squared_error", "info_nce", "similarity"))
    _one_of("target_normalisation", recipe.target_normalisation, ("centering", "sinkhorn", "none"))
    _one_of("teacher", recipe.teacher, ("momentum", "student", "previous_epoch"))
    need(
        recipe.loss == "cross_entropy" or recipe.target_normalisation != "sinkhorn",
        f"target_normalisation=sinkhorn makes probabilities, and loss={recipe.loss} compares directions; use "
        "centering or none",
    )
    need(
        recipe.distill_from is None or recipe.loss != "cross_entropy",
        "distill_from gives embeddings as targets, which loss=cross_entropy has no prototypes for; use --recipe "
        "distill, or loss=similarity, squared_error or info_nce",
    )
    _one_of("optimizer", recipe.optimizer, ("adamw", "sgd", "lars"))
    _one_of("initialisation", recipe.initialisation, ("reference", "xavier"))
    _one_of("crops", recipe.crops, ("auto", "pillow", "batched"))
    _one_of("precision", recipe.precision, ("auto", "fp32", "bf16", "fp16"))
    _one_of("strategy", recipe.strategy, ("ddp", "fsdp"))
    if recipe.strategy == "fsdp":
        need(
            not recipe.compile,
            "compile=true is not written for strategy=fsdp; use compile=false or strategy=ddp",
        )
        need(
            recipe.precision != "fp16",
            "precision=fp16 scales gradients, which is not written for strategy=fsdp; use bf16, fp32 or strategy=ddp",
        )
    _one_of("weights_dtype", recipe.weights_dtype, ("float32", "float16"))


def _check_hidden_patches(recipe: Recipe, need: Callable[[bool, str], None]) -> None:
    need(
        is_vit_name(recipe.arch),
        f"ibot_weight={recipe.ibot_weight:g} hides patches, which {recipe.arch} has none of; use a vit_* such as "
        "vit_small_patch16_224, or ibot_weight=0",
    )
    need(
        recipe.loss == "cross_entropy",
        f"ibot_weight={recipe.ibot_weight:g} names patches by prototypes, which loss={recipe.loss} has none of; use "
        "loss=cross_entropy, or ibot_weight=0",
    )
    for key, why in (
        ("predictor", "guesses the teacher's outputs for whole crops only"),
        ("head_batch_norm", "would take its statistics over crops and patches together"),
        ("compile", "would compile anew at each step, since the number of hidden patches differs"),
    ):
        need(
            not getattr(recipe, key),
            f"{key}=true {why}; use {key}=false with ibot_weight={recipe.ibot_weight:g}, or ibot_weight=0",
        )
    low, high = recipe.ibot_mask_ratio
    need(
        0 < low <= high < 1,
        f"ibot_mask_ratio=[{low}, {high}] must be two rising shares of the patches, above 0 and below 1, for "
        "instance [0.1, 0.5]",
    )
    need(
        0 < recipe.ibot_mask_probability <= 1,
        f"ibot_mask_probability={recipe.ibot_mask_probability} must be above 0 and at most 1; ibot_weight=0 hides "
        "nothing",
    )
    rows, columns = (side // recipe.patch_size for side in recipe.global_crop_hw)
    need(
        min(rows, columns) >= 2,
        f"a global crop has {rows} x {columns} patches, and ibot_weight={recipe.ibot_weight:g} needs 2 or more each "
        f"way to hide some; use global_crop_px={4 * recipe.patch_size} or more",
    )


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{key}={value!r} is not known; use one of {', '.join(known)}")


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
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"the recipe {path} must be flat `key: value` lines, not a {type(values).__name__}")
    return _from_values(values, where=f"the recipe {path.name}")


def with_overrides(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """Applies ``key=value`` strings, the values written as in YAML.

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
    return replace(recipe, **_typed(changes, where="--set"))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe as YAML that :func:`load_recipe` reads back to an equal one."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _from_values(values: Mapping[str, Any], *, where: str) -> Recipe:
    return Recipe(**_typed(values, where=where))


def _typed(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Checks keys and turns YAML's values into the fields' types."""
    hints = get_type_hints(Recipe)
    known = [f.name for f in fields(Recipe)]
    typed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
            raise UsageError(f"{where} has an unknown key {key!r}; {hint}")
        typed[key] = _as_type(key, value, hints[key], where)
    return typed


def _as_type(key: str, value: Any, hint: Any, where: str) -> Any:
    if key in ("mean", "std"):  # where auto is a wish of its own
        values = [value] if _is_number(value) else value
        if isinstance(values, (list, tuple)) and values and all(_is_number(v) for v in values):
            return tuple(float(v) for v in values)
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
        if value and all(isinstance(name, str) for name in value):
            return tuple(value)
        raise UsageError(f"{where}: {key}={value!r} must be the name of a model, or a list of such")
    if tuple[int, int] in get_args(hint) and isinstance(value, (list, tuple)):
        if len(value) == 2 and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return value[0] if value[0] == value[1] else (value[0], value[1])
        raise UsageError(
            f"{where}: {key}={value!r} must be one whole number, or two: [height, width], for instance [128, 256]"
        )
    if hint == tuple[float, float]:
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(v) for v in value):
            return float(value[0]), float(value[1])
        raise UsageError(f"{where}: {key}={value!r} must be two numbers, for instance [0.4, 1.0]")
    wanted = next(t for t in (get_args(hint) or (hint,)) if t is not type(None))
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted is float:
        # YAML reads 5e-4 (without a point) as text
        try:
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError):
            pass
    if wanted is str and isinstance(value, str):
        return value
    raise UsageError(f"{where}: {key}={value!r} must be of type {wanted.__name__}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


assert all(f.default is not MISSING for f in fields(Recipe)), "every key of a recipe has a default"
