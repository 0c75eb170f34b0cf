"""Checks of a recipe: invalid values, and settings that contradict each other.

Checks that need the pictures are in `adapt.py`, and checks that need timm's network in `network.py`, so that a recipe
can be read without either.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dinokit.errors import UsageError
from dinokit.model_folder.architecture import is_vit_name

if TYPE_CHECKING:
    from dinokit.training.recipe import Recipe

__all__ = ["LEAST_STD", "check_recipe"]

LEAST_STD = 1e-5
"""The least standard deviation to divide by: below one of the 65536 levels of 16 bits, since pictures may be dark."""
_MOST_PIECES = 10_000
"""Most pieces of a batch that an error suggests."""
_SEEDS = 2**63
"""torch takes seeds below 2^64; each process adds its rank."""


def check_recipe(recipe: Recipe) -> None:
    """Refuses invalid values and contradictions.

    Raises:
        UsageError: names the key, its value, what was expected and what to do.
    """
    for check in (
        _finite,
        _ranges,
        _batch,
        _hidden_patches,
        _foreground,
        _labels,
        _colours,
        _pixels,
        _crops,
        _method,
        _run,
    ):
        check(recipe)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{key}={value!r} is not known; use one of {', '.join(known)}")


def _finite(recipe: Recipe) -> None:
    for key, value in vars(recipe).items():
        numbers = value if isinstance(value, tuple) else (value,)
        _need(
            all(math.isfinite(number) for number in numbers if isinstance(number, float)),
            f"{key}={value} must be finite, not nan or infinite",
        )


def _ranges(recipe: Recipe) -> None:
    positive = (
        "patch_size n_prototypes head_hidden_dim head_bottleneck_dim head_layers "
        "epochs batch_size save_every_epochs keep_checkpoints log_every_steps accumulate devices num_nodes "
        "knn_every_epochs queue_length"
    )
    for key in positive.split():
        value = getattr(recipe, key)
        _need(value is None or value >= 1, f"{key}={value} must be at least 1")
    for key in (
        "n_local_crops",
        "freeze_last_layer_epochs",
        "freeze_backbone_epochs",
        "lr",
        "min_lr",
        "weight_decay",
        "clip_grad",
        "seed",
        "koleo_weight",
        "ibot_weight",
        "foreground_weight",
        "patch_embed_lr_mult",
        "weight_decay_end",
        "warmup_epochs",
        "warmup_teacher_temp_epochs",
        "save_every_minutes",
        "workers",
    ):
        value = getattr(recipe, key)
        _need(value is None or value >= 0, f"{key}={value} must not be negative")
    _need(
        recipe.workers is None or recipe.workers <= 1000,
        f"workers={recipe.workers} would start as many processes; use as many as this machine has processors at most",
    )
    for key in ("teacher_momentum", "center_momentum", "drop_path_rate"):
        value = getattr(recipe, key)
        _need(value is None or 0.0 <= value <= 1.0, f"{key}={value} must lie between 0 and 1")
    _need(recipe.seed < _SEEDS, f"seed={recipe.seed} must be below 2^63; use a smaller number")
    for key in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
        value = getattr(recipe, key)
        _need(value is None or value > 0, f"{key}={value} must be above 0, for instance 0.04")
    for key in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(recipe, key)
        _need(
            0 < low <= high <= 1,
            f"{key}=[{low}, {high}] must be two increasing shares of the area, above 0 and at most 1",
        )


def _batch(recipe: Recipe) -> None:
    pieces = recipe.accumulate * recipe.devices * recipe.num_nodes
    _need(
        recipe.batch_size % pieces == 0,
        f"batch_size={recipe.batch_size} is not a multiple of accumulate · devices · num_nodes = {pieces}; it can be "
        f"divided into {_nearest_divisors(recipe.batch_size, pieces)} equal pieces",
    )
    _need(
        recipe.koleo_weight == 0 or recipe.batch_size // pieces >= 2,
        "koleo_weight needs at least 2 pictures in each piece of the batch, as it compares them with each other; use a "
        "larger batch_size (it is never more than there are pictures), or koleo_weight=0",
    )


def _nearest_divisors(number: int, wanted: int) -> str:
    """``3 or 5``: the numbers of equal pieces nearest to the wanted one."""
    divisors = [d for d in range(1, min(number, _MOST_PIECES) + 1) if number % d == 0]
    below, above = [d for d in divisors if d < wanted][-1:], [d for d in divisors if d > wanted][:1]
    return " or ".join(map(str, below + above))


def _hidden_patches(recipe: Recipe) -> None:
    if not recipe.ibot_weight:
        return
    _need(
        is_vit_name(recipe.arch),
        f"ibot_weight={recipe.ibot_weight:g} hides patches, and {recipe.arch} has no patches; use a vit_* such as "
        "vit_small_patch16_224, or ibot_weight=0",
    )
    _need(
        recipe.loss == "cross_entropy",
        f"ibot_weight={recipe.ibot_weight:g} assigns prototypes to patches, and loss={recipe.loss} has no prototypes; "
        "use loss=cross_entropy, or ibot_weight=0",
    )
    for key, why in (
        ("predictor", "predicts the teacher's outputs for whole crops only"),
        ("head_batch_norm", "would take its statistics over crops and patches together"),
    ):
        _need(
            not getattr(recipe, key),
            f"{key}=true {why}; use {key}=false with ibot_weight={recipe.ibot_weight:g}, or ibot_weight=0",
        )
    low, high = recipe.ibot_mask_ratio
    _need(
        0 < low <= high < 1,
        f"ibot_mask_ratio=[{low}, {high}] must be two increasing shares of the patches, above 0 and below 1, for "
        "instance [0.1, 0.5]",
    )
    _need(
        0 < recipe.ibot_mask_probability <= 1,
        f"ibot_mask_probability={recipe.ibot_mask_probability} must be above 0 and at most 1; ibot_weight=0 hides "
        "nothing",
    )
    rows, columns = (side // recipe.patch_size for side in recipe.global_crop_hw)
    _need(
        min(rows, columns) >= 2,
        f"a global crop has {rows} x {columns} patches, and ibot_weight={recipe.ibot_weight:g} needs 2 or more in "
        f"each direction to hide some; use global_crop_px={4 * recipe.patch_size} or more",
    )


def _foreground(recipe: Recipe) -> None:
    _need(
        not recipe.foreground_weight or is_vit_name(recipe.arch),
        f"foreground_weight={recipe.foreground_weight:g} trains the attention of a ViT, and {recipe.arch} is not a "
        "ViT; use a vit_* such as vit_small_patch16_224, or foreground_weight=0",
    )


def _labels(recipe: Recipe) -> None:
    _need(recipe.knn_images >= 2, f"knn_images={recipe.knn_images} must be at least 2")
    _need(
        recipe.labelled_queries is None or recipe.labelled is not None,
        "labelled_queries needs labelled: the pictures whose labels the queries get",
    )


def _colours(recipe: Recipe) -> None:
    _need(
        0 <= recipe.color_jitter_strength <= 2.5,
        f"color_jitter_strength={recipe.color_jitter_strength} must lie between 0 (no change) and 2.5 (where a crop "
        "may become black); 1 is the reference's",
    )
    _need(
        0 <= recipe.grey_probability <= 1,
        f"grey_probability={recipe.grey_probability} must lie between 0 and 1",
    )


def _pixels(recipe: Recipe) -> None:
    _need(
        1 <= recipe.channels <= 1000,
        f"channels={recipe.channels} must be 3 (colour), 1 (grey), or the number in the .npy or TIFF files, up to 1000",
    )
    for key in ("mean", "std"):
        value = getattr(recipe, key)
        if isinstance(value, tuple):
            n = recipe.channels
            _need(
                len(value) == n,
                f"{key} has {len(value)} numbers and channels={n}; give one per channel, in 0…1: "
                f"[{', '.join(['0.5', '0.45', '0.4'][:n])}{', …' if n > 3 else ''}]",
            )
            least = 0.0 if key == "mean" else LEAST_STD
            wrong = [v for v in value if not least <= v <= 1]
            _need(
                not wrong,
                f"{key}={list(value)} must lie between {least:g} and 1: pixels run from 0 (black) to 1 (white). "
                "Divide values measured in 0…255 by 255",
            )
        else:
            _need(
                value in (None, "auto"),
                f"{key}={value!r} is not known; give a number per channel, or auto",
            )


def _crops(recipe: Recipe) -> None:
    low, high = recipe.blur_radius_px
    _need(0 <= low <= high, f"blur_radius_px=[{low}, {high}] must be two increasing radii, 0 or more")
    for key in ("global_crop_px", "local_crop_px", "image_size_px"):
        given = getattr(recipe, key)
        for size in () if given is None else dict.fromkeys((given,) if isinstance(given, int) else given):
            shown = f"{key}={given if isinstance(given, int) else list(given)}"
            _need(size >= 1, f"{shown} must be at least 1")
            patch = recipe.patch_size if is_vit_name(recipe.arch) else 1
            below = max(size // patch, 1) * patch
            _need(
                size % patch == 0,
                f"{shown} is not a multiple of patch_size={patch}; use {below} or {below + patch}"
                + ("" if isinstance(given, int) else f" instead of {size}"),
            )


def _method(recipe: Recipe) -> None:
    _one_of("loss", recipe.loss, ("cross_entropy", "squared_error", "info_nce", "similarity", "relations"))
    _one_of("target_normalisation", recipe.target_normalisation, ("centering", "sinkhorn", "none"))
    _one_of("teacher", recipe.teacher, ("momentum", "student", "previous_epoch"))
    _need(
        recipe.loss == "cross_entropy" or recipe.target_normalisation != "sinkhorn",
        f"target_normalisation=sinkhorn makes probabilities, and loss={recipe.loss} compares directions; use "
        "centering or none",
    )
    _need(
        recipe.distill_from is None or recipe.loss != "cross_entropy",
        "distill_from gives embeddings as targets, and loss=cross_entropy needs prototypes; use --recipe "
        "distill, or loss=similarity, relations, squared_error or info_nce",
    )
    if recipe.distill_pictures is not None:
        _need(
            recipe.loss == "relations",
            f"distill_pictures gives each teacher its own pictures, and with loss={recipe.loss} the student predicts "
            "all teachers together; use loss=relations",
        )
        given, wanted = len(recipe.distill_pictures), len(recipe.teachers)
        _need(
            given == wanted,
            f"distill_pictures names pictures for {given} teachers, and distill_from has {wanted}; give each its own "
            "pattern, or null for all pictures",
        )
    _need(
        recipe.loss != "relations" or not (recipe.predictor or recipe.ibot_weight),
        "loss=relations compares the embeddings themselves, without a head: use predictor=false and "
        "ibot_weight=0",
    )


def _run(recipe: Recipe) -> None:
    frozen = recipe.freeze_backbone_epochs
    _need(
        frozen == 0 or recipe.init_from is not None,
        f"freeze_backbone_epochs={frozen} keeps the backbone fixed, and this one is not trained yet; name its "
        "initial weights by init_from, or leave freeze_backbone_epochs out",
    )
    _need(
        frozen == 0 or recipe.loss != "relations",
        f"freeze_backbone_epochs={frozen} trains only the head, and loss=relations has no head, so nothing would "
        "learn; use freeze_backbone_epochs=0",
    )
    _need(
        frozen < recipe.epochs,
        f"freeze_backbone_epochs={frozen} leaves none of epochs={recipe.epochs} to train the backbone; lower it",
    )
    _one_of("optimizer", recipe.optimizer, ("adamw", "sgd", "lars"))
    _one_of("initialisation", recipe.initialisation, ("reference", "xavier"))
    _one_of("crops", recipe.crops, ("auto", "pillow", "batched"))
    _one_of("precision", recipe.precision, ("auto", "fp32", "bf16", "fp16"))
    _one_of("strategy", recipe.strategy, ("ddp", "fsdp"))
    if recipe.strategy == "fsdp":
        _need(
            not recipe.compile,
            "compile=true is not supported with strategy=fsdp; use compile=false or strategy=ddp",
        )
        _need(
            recipe.precision != "fp16",
            "precision=fp16 scales gradients, which is not supported with strategy=fsdp; use bf16, fp32 or "
            "strategy=ddp",
        )
    _one_of("weights_dtype", recipe.weights_dtype, ("float32", "float16"))
