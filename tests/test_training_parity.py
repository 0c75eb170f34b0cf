"""Twenty optimiser steps, held to numbers that facebookresearch/dino itself computed.

`tests/golden/README.md` says how they were made. Everything here uses the parts of `dinokit.training` in the
order in which the trainer uses them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.runtime.torch import create_vit
from dinokit.training.networks.head import ProjectionHead
from dinokit.training.networks.network import Network
from dinokit.training.recipe import Recipe
from dinokit.training.trainer import TrainingState, training_step

GOLDEN = Path(__file__).parent / "golden"


def reference_state(arrays: Any, prefix: str) -> dict[str, Any]:
    start = len(prefix) + 1
    return {k[start:]: torch.from_numpy(arrays[k].copy()) for k in arrays.files if k.startswith(prefix + ".")}


def normalised(crops: np.ndarray) -> Any:
    """(V, B, 3, H, W) uint8 to float32, the reference's mean and std."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (torch.from_numpy(crops).float() / 255 - mean) / std


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


def without_key_bias(name: str, tensor: Any) -> Any:
    # The gradient of the keys' bias is zero in exact arithmetic (softmax does not see it), so AdamW turns
    # rounding noise into steps: the golden README leaves it out too.
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize("run", ["steps_adamw", "steps_adamw_free_last_layer", "steps_lars"])
def test_twenty_steps_equal_the_reference(run: str) -> None:
    arrays = np.load(GOLDEN / f"{run}.npz", allow_pickle=False)
    config = json.loads(str(arrays["config"]))
    recipe = golden_recipe(config)

    student, teacher = golden_network(config, recipe.norm_last_layer), golden_network(config, True)
    student.load_state_dict(reference_state(arrays, "init"))
    state = TrainingState.create(recipe, student, teacher, steps_per_epoch=config["iters_per_epoch"])

    np.testing.assert_allclose(state.schedules.lr, arrays["lr"], rtol=1e-12)
    np.testing.assert_allclose(state.schedules.weight_decay, arrays["wd"], rtol=1e-12)
    np.testing.assert_allclose(state.schedules.teacher_momentum, arrays["momentum"], rtol=1e-12)

    for step in range(20):
        crops = [normalised(arrays["global_crops"][step]), normalised(arrays["local_crops"][step])]
        result = training_step(state, crops)
        assert abs(float(result.loss) - arrays["loss"][step]) < 1e-5, f"loss of step {step}"
        np.testing.assert_allclose(
            state.targets.center.numpy()[0],
            arrays["center"][step],
            atol=1e-5,
            err_msg=f"centre, step {step}",
        )

    for network, prefix in ((student, "student"), (teacher, "teacher")):
        ours = network.state_dict()
        theirs = reference_state(arrays, prefix)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(
                without_key_bias(name, ours[name]),
                without_key_bias(name, value),
                rtol=0,
                atol=1e-5,
                msg=lambda text, where=f"{prefix} {name}": f"{where}: {text}",
            )
