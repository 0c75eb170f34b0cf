"""Changes the default input size of a Vision Transformer.

A ViT takes any size, and may do better at one somewhat larger than its training crops: those were enlarged pieces, in
which objects look larger. timm and transformers build the network for the size that the folder names, so the learned
positions are resized here once, by the rule of the network's own repository. dinokit's result is the same as with
``image_size=``, and the other libraries, which resize by rules of their own, agree with it at that size.

Source: Touvron et al. 2019, "Fixing the train-test resolution discrepancy", §3.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dinokit.errors import MissingExtraError, UsageError
from dinokit.export.verification.proof import checked_image_size
from dinokit.loading.locate import Located, Weights
from dinokit.model_folder.architecture import VitArchitecture

__all__ = ["with_own_size"]

_POSITIONS = "pos_embed"
"""timm's name of the learned positions: first CLS's, if it has one, then the patches'."""


def with_own_size(located: Located, size: int | tuple[int, int]) -> tuple[Located, str]:
    """The same network with another default input size.

    Args:
        located: a DINO ViT with weights.
        size: pixels of the square or (height, width), multiples of the patch.

    Returns:
        The model, and a remark for its ``source``; empty if it has this size already.

    Raises:
        UsageError: not a Vision Transformer, or not a multiple of the patch.
        MissingExtraError: it has learned positions, and torch, which resizes them, is not installed.
    """
    config = located.config
    vit = config.architecture
    if not isinstance(vit, VitArchitecture):
        raise UsageError(
            f"{config.name} is a {config.timm_architecture}; only a Vision Transformer of the DINO family can be given "
            "another size of its own (leave out --own-size)"
        )
    sides = checked_image_size(size, config)
    assert sides is not None and located.load_weights is not None
    load = located.load_weights
    if sides == tuple(vit.image_size) == config.preprocessing.crop_px:
        return located, ""
    sized = replace(vit, image_size=sides)
    new = replace(
        config,
        architecture=sized,
        model_args={**config.model_args, "img_size": list(sides)},
        preprocessing=config.preprocessing.with_image_size(sides),
    )

    def resized() -> Weights:
        return _with_positions(dict(load()), vit, sized)

    was, now = ("{}x{}".format(*pair) for pair in (config.preprocessing.crop_px, sides))
    return replace(located, config=new, load_weights=resized), f"; its own size {now} instead of {was}"


def _with_positions(weights: Weights, vit: VitArchitecture, sized: VitArchitecture) -> Weights:
    if vit.position != "learned" or vit.grid == sized.grid:  # rotary ones are computed for each size
        return weights
    try:
        import torch

        from dinokit.runtime.torch import resize_position_embedding
    except ImportError as error:
        raise MissingExtraError("resizing the position embedding", extra="train", package="torch") from error
    positions = torch.from_numpy(np.array(weights[_POSITIONS], np.float32))
    n_prefix = positions.shape[1] - vit.grid[0] * vit.grid[1]
    resized = resize_position_embedding(positions, sized.grid, vit.grid, n_prefix, vit.pos_embed_resize)
    weights[_POSITIONS] = resized.contiguous().numpy()
    return weights
