"""The golden runs of facebookresearch/dino (`tests/golden/README.md`): their state, recipe and network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.runtime.torch import create_vit
from dinokit.training.networks.head import ProjectionHead
from dinokit.training.networks.network import Network
from dinokit.training.recipe import Recipe

GOLDEN = Path(__file__).parents[1] / "golden"


def reference_state(arrays: Any, prefix: str) -> dict[str, Any]:
    start = len(prefix) + 1
    return {k[start:]: torch.from_numpy(arrays[k].copy()) for k in arrays.files if k.startswith(prefix + ".")}


def golden_recipe(config: dict[str, Any]) -> Recipe:
    return Recipe(
        arch="vit_tiny_patch16_224",
        patch_size=config["patch_size"],
        global_crop_px=config["image_size"],
        local_crop_px=config["local_size"],
        n_local_crops=config["n_local_crops"],
        n_prototypes=config["n_prototypes"],
        head_hidden_dim=config["hidden_dim"],
        head_bottleneck_dim=config["bottleneck_dim"],
        norm_last_layer=config["norm_last_layer"],
        clip_grad=config["clip_grad"],
        clip_per_parameter=True,
        freeze_last_layer_epochs=config["freeze_last_layer_epochs"],
        optimizer=config["optimizer"],
        epochs=config["epochs"],
        batch_size=config["batch"],
        # the recipe's rate is per 256 pictures; the golden run states the rate itself
        lr=config["lr"] * 256 / config["batch"],
        min_lr=config["min_lr"],
        warmup_epochs=config["warmup_epochs"],
        weight_decay=config["weight_decay"][0],
        weight_decay_end=config["weight_decay"][1],
        teacher_momentum=config["teacher_momentum"][0],
        warmup_teacher_temp=config["teacher_temp"][0],
        teacher_temp=config["teacher_temp"][1],
        warmup_teacher_temp_epochs=config["warmup_teacher_temp_epochs"],
        student_temp=config["student_temp"],
        center_momentum=config["center_momentum"],
        drop_path_rate=0.0,
        precision="fp32",
        device="cpu",
    )


def golden_network(config: dict[str, Any], norm_last_layer: bool) -> Network:
    backbone = create_vit(
        "vit_tiny_patch16_224",
        {
            "img_size": config["image_size"],
            "patch_size": config["patch_size"],
            "embed_dim": config["embed_dim"],
            "depth": config["depth"],
            "num_heads": config["num_heads"],
        },
        PosEmbedResize(),
    )
    head = ProjectionHead(
        config["embed_dim"],
        config["n_prototypes"],
        hidden_dim=config["hidden_dim"],
        bottleneck_dim=config["bottleneck_dim"],
        norm_last_layer=norm_last_layer,
    )
    return Network(backbone, head)
