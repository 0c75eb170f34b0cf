"""Twenty optimiser steps, held to numbers that facebookresearch/dino itself computed.

`tests/golden/README.md` says how they were made. Everything here uses the parts of `dinokit.training` in the
order in which the trainer uses them.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from golden_runs import GOLDEN, golden_network, golden_recipe, reference_state

from dinokit.training.trainer import TrainingState, training_step


def normalised(crops: np.ndarray) -> Any:
    """(V, B, 3, H, W) uint8 to float32, the reference's mean and std."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (torch.from_numpy(crops).float() / 255 - mean) / std


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
