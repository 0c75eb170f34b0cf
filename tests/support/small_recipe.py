"""Settings of a run that a test can afford."""

from __future__ import annotations

from pico_vit import PICO

from dinokit.training.recipe import Recipe

SMALL_RECIPE = Recipe(
    arch=PICO,
    global_crop_px=32,
    local_crop_px=16,
    n_local_crops=2,
    batch_size=3,
    epochs=1,
    workers=0,
    n_prototypes=16,
    head_hidden_dim=16,
    head_bottleneck_dim=8,
    precision="fp32",
    device="cpu",
    warmup_epochs=0,
    tensorboard=False,
)
