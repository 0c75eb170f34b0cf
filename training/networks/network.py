"""Student and teacher: a backbone of timm with a projection head, run over crops of several sizes.

Source: facebookresearch/dino `utils.py`, `MultiCropWrapper`: one pass of the backbone for each size, one pass
of the head over all crops. A plain ViT takes all sizes in one pass (`shared_layers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from dinokit.errors import UsageError
from dinokit.model_folder.architecture import PosEmbedResize, TimmArchitecture, VitArchitecture, is_vit_name
from dinokit.runtime.timm_networks import create_network, describe_network, has_batch_norm, must_take
from dinokit.runtime.torch import create_vit, describe_any, pick_device
from dinokit.training.devices.shared_batch_norm import share_statistics
from dinokit.training.networks.gradient_checkpointing import checkpoint_blocks
from dinokit.training.networks.head import ProjectionHead
from dinokit.training.networks.initialise import initialise
from dinokit.training.networks.patch_tokens import can_hide_patches, embed_with_patches, final_norm
from dinokit.training.networks.shared_layers import can_share_layers, embed_sizes_together
from dinokit.training.objectives.masks import HiddenPatches
from dinokit.training.objectives.predictor import Predictor
from dinokit.training.recipe import Recipe

__all__ = [
    "Network",
    "NetworkOutput",
    "build_backbone",
    "build_network",
    "pictures_of_a_piece",
    "share_batch_norm",
]


class NetworkOutput(NamedTuple):
    """Outputs of a network for S views of B pictures."""

    logits: Tensor
    """(S, B, K) float32, over the prototypes."""
    embeddings: Tensor
    """(S, B, D), the backbone's embeddings (for a ViT the CLS token), before the head."""
    patch_logits: Tensor | None = None
    """(M, K) float32 of the hidden patches, if any."""
    attention: Tensor | None = None
    """(V, B, heads, N) float32, the last block's attention from the CLS token to the patches in the views of the first
    size, if the network ``returns_attention``."""


class Network(nn.Module):
    """A backbone and its projection head.

    Args:
        backbone: (B, 3, H, W) to the embedding (B, D); a timm model without classifier.
        head: (B, D) to logits (B, K).
        predictor: (B, K) to (B, K), if a student has one.
        patch_head: for patch tokens, (M, D) to (M, K); without it they go through ``head``.
        mask_token: (1, D), replaces hidden patches; for a student that predicts patches.
        embed_dim: D.
        returns_attention: whether to return attention too; needs a backbone that :func:`can_share_layers` accepts.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        predictor: nn.Module | None = None,
        *,
        patch_head: nn.Module | None = None,
        mask_token: nn.Parameter | None = None,
        embed_dim: int | None = None,
        returns_attention: bool = False,
    ) -> None:
        super().__init__()
        self.returns_attention = returns_attention
        self.embed_dim = embed_dim
        self.backbone = backbone
        self.head = head
        self.predictor = predictor
        self.patch_head = patch_head
        self.mask_token = mask_token
        self._shares_layers = can_share_layers(backbone)

    def forward(self, crops: Sequence[Tensor], hidden: HiddenPatches | None = None) -> NetworkOutput:
        """
        Args:
            crops: one tensor (V, B, 3, H, W) per size, V views of the same B pictures.
            hidden: patches of the first size whose logits are wanted. A student sees its mask token in their place; the
                teacher has none and sees the patches. Needs a backbone that :func:`can_hide_patches` accepts.

        Returns:
            Logits and embeddings of all S views, in the order given, logits of the hidden patches, and attention.
        """
        n_images = crops[0].shape[1]
        sizes = [views.flatten(0, 1) for views in crops]
        if hidden is not None:
            return self._with_patches(sizes, n_images, hidden)
        attention: Tensor | None = None
        if self.returns_attention or (len(sizes) > 1 and self._shares_layers):
            embeddings, attention = embed_sizes_together(
                self.backbone, sizes, attention=self.returns_attention
            )
        else:
            embeddings = torch.cat([self.backbone(views) for views in sizes])
        logits: Tensor = self.head(embeddings)
        if self.predictor is not None:
            logits = self.predictor(logits)
        return NetworkOutput(
            logits.view(-1, n_images, logits.shape[-1]),
            embeddings.view(-1, n_images, embeddings.shape[-1]),
            attention=_by_view(attention, n_images),
        )

    def _with_patches(self, sizes: Sequence[Tensor], n_images: int, hidden: HiddenPatches) -> NetworkOutput:
        embeddings, tokens, attention = self._embed_with_patches(sizes, hidden.mask)
        # From here on shapes differ from step to step, so this part is not compiled.
        patches = final_norm(self.backbone, tokens.index_select(0, hidden.positions))
        if self.patch_head is not None:
            logits, patch_logits = self.head(embeddings), self.patch_head(patches)
        else:
            together = self.head(torch.cat([embeddings, patches]))
            logits, patch_logits = together.split([len(embeddings), len(patches)])
        return NetworkOutput(
            logits.view(-1, n_images, logits.shape[-1]),
            embeddings.view(-1, n_images, embeddings.shape[-1]),
            patch_logits,
            _by_view(attention, n_images),
        )

    def _embed_with_patches(
        self, sizes: Sequence[Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return embed_with_patches(
            self.backbone,
            sizes,
            mask,
            self.mask_token,
            together=self._shares_layers,
            attention=self.returns_attention,
        )

    def compile_passes(self, *, hides_patches: bool) -> None:
        """Compiles the parts whose shapes are the same at each step, in place; torch.compile runs at the first pass.

        Only methods are compiled: hooks stay outside, and the names of the weights do not change.

        Args:
            hides_patches: whether the network will be called with hidden patches. Then only the backbone is compiled:
                the number of patches that go through the head differs from step to step.
        """
        name = "_embed_with_patches" if hides_patches else "forward"
        setattr(self, name, torch.compile(getattr(self, name), dynamic=False))


def _by_view(attention: Tensor | None, n_images: int) -> Tensor | None:
    """(V · B, heads, N) to (V, B, heads, N)."""
    return None if attention is None else attention.view(-1, n_images, *attention.shape[1:])


def build_network(recipe: Recipe, *, is_student: bool) -> Network:
    """The backbone and head of a recipe; only the student has stochastic depth.

    BatchNorm takes its statistics over all processes that are running at the time of the call.
    """
    backbone, embed_dim = build_backbone(recipe, is_student=is_student)
    initialise(backbone, recipe.initialisation)
    if is_student and recipe.gradient_checkpointing:
        checkpoint_blocks(backbone, recipe.arch)
    assert recipe.n_prototypes is not None

    def make_head() -> ProjectionHead:
        assert recipe.n_prototypes is not None
        return ProjectionHead(
            embed_dim,
            recipe.n_prototypes,
            hidden_dim=recipe.head_hidden_dim,
            bottleneck_dim=recipe.head_bottleneck_dim,
            n_layers=recipe.head_layers,
            norm_last_layer=recipe.norm_last_layer or not is_student,
            batch_norm=recipe.head_batch_norm,
        )

    # A loss that compares the embeddings themselves needs no head.
    head = nn.Identity() if recipe.loss == "relations" else make_head()
    has_predictor = is_student and recipe.predictor
    predictor = Predictor(recipe.n_prototypes, recipe.head_hidden_dim) if has_predictor else None
    patch_head = make_head() if recipe.ibot_weight and recipe.ibot_separate_head else None
    mask_token = _first_mask_token(backbone, embed_dim) if recipe.ibot_weight and is_student else None
    network = Network(
        backbone,
        head,
        predictor,
        patch_head=patch_head,
        mask_token=mask_token,
        embed_dim=embed_dim,
        returns_attention=is_student and recipe.foreground_weight > 0,
    )
    return share_batch_norm(network, recipe.device)


def _first_mask_token(backbone: Any, embed_dim: int) -> nn.Parameter:
    """(1, D): zeros, the mean of the patches that it replaces, as in iBOT and DINOv2. With rotary positions nothing is
    added to it, and the head would L2-normalise a zero vector, whose gradient is unbounded; it is then initialised like
    the CLS token."""
    token = torch.zeros(1, embed_dim)
    if getattr(backbone, "pos_embed", None) is None:
        nn.init.trunc_normal_(token, std=0.02)
    return nn.Parameter(token)


def build_backbone(recipe: Recipe, *, is_student: bool) -> tuple[nn.Module, int]:
    """The recipe's backbone without classifier, with timm's initialisation, and its width D.

    Raises:
        UsageError: timm does not know the name, or the network cannot be trained on the recipe's crops.
    """
    drop_path_rate = recipe.drop_path_rate if is_student else 0.0
    size = recipe.image_hw
    if is_vit_name(recipe.arch):
        args = {"img_size": size, "patch_size": recipe.patch_size, "in_chans": recipe.channels}
        vit: Any = create_vit(recipe.arch, args, PosEmbedResize(), drop_path_rate=drop_path_rate)
        _must_show_patches(recipe, vit)
        # A hybrid cuts its patches from the feature map of a ResNet.
        if not isinstance(getattr(vit, "patch_embed", None), PatchEmbed):
            _must_run_on_crops(recipe, vit)
        _embed_as_the_folder(vit, size)
        return vit, int(vit.embed_dim)
    network = create_network(recipe.arch, {"in_chans": recipe.channels}, drop_path_rate=drop_path_rate)
    known = describe_network(network, size)
    _must_take_crops(recipe, network, known)
    _must_have_a_batch(recipe, network)
    return network, known.embed_dim


def _must_show_patches(recipe: Recipe, vit: nn.Module) -> None:
    if recipe.ibot_weight and not can_hide_patches(vit):
        raise UsageError(
            f"ibot_weight={recipe.ibot_weight:g} hides patches, which is supported for timm's VisionTransformer and "
            f"Eva, and {recipe.arch} is a {type(vit).__name__}, which works differently; use one such as "
            "vit_small_patch16_224 or vit_small_patch16_dinov3, or ibot_weight=0"
        )
    if recipe.foreground_weight and not can_share_layers(vit):
        raise UsageError(
            f"foreground_weight={recipe.foreground_weight:g} trains the last block's attention, which is supported "
            f"for timm's VisionTransformer with plain blocks and a CLS token; {recipe.arch} is not one. Use one such "
            "as vit_small_patch16_224, or foreground_weight=0"
        )


def _embed_as_the_folder(vit: Any, size: tuple[int, int]) -> None:
    """Trains what the model folder will call the embedding: for a DINO ViT the CLS token. timm's DINOv3 models take the
    mean of the patches by default, which would leave the CLS token untrained."""
    if getattr(vit, "global_pool", "token") != "token" and isinstance(
        describe_any(vit, size), VitArchitecture
    ):
        vit.reset_classifier(0, "token")


def _must_take_crops(recipe: Recipe, network: nn.Module, known: TimmArchitecture) -> None:
    sizes = {recipe.global_crop_hw, *([recipe.local_crop_hw] if recipe.n_local_crops else [])}
    if known.size_multiple is None and sizes != {known.image_size}:
        raise UsageError(
            f"{recipe.arch} takes pictures of one size only ({_shown(known.image_size)} px), and these crops are "
            f"{' and '.join(f'{_shown(size)} px' for size in sorted(sizes))}. Train a network that takes any size, "
            "such as resnet50, xcit_small_12_p16_224 or vit_small_patch16_224"
        )
    for side in {side for size in sizes for side in size}:
        if known.size_multiple and side % known.size_multiple:
            raise UsageError(
                f"{recipe.arch} takes pictures whose sides are multiples of {known.size_multiple} px; a crop of "
                f"{side} px is not one; change the crop sizes"
            )
    _must_run_on_crops(recipe, network)


def _must_run_on_crops(recipe: Recipe, network: nn.Module) -> None:
    """Runs the network, since a crop may be too small for one of its convolutions and timm does not give the limit."""
    crops = [("global_crop_px", recipe.global_crop_hw), ("local_crop_px", recipe.local_crop_hw)]
    for key, size in crops[: 2 if recipe.n_local_crops else 1]:
        try:
            must_take(network, size)
        except UsageError as error:
            raise UsageError(f"{key}={_shown(size)} does not fit {recipe.arch}: {error}") from error


def _shown(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"


def _must_have_a_batch(recipe: Recipe, network: nn.Module) -> None:
    """BatchNorm cannot normalise a single value, as when a local crop of one picture becomes one cell."""
    pieces = recipe.accumulate  # processes share their statistics
    if recipe.batch_size // pieces < 2 and has_batch_norm(network):
        raise UsageError(
            f"{recipe.arch} has BatchNorm, which needs at least 2 pictures in each piece of the batch; batch_size="
            f"{recipe.batch_size} in {pieces} pieces leaves {recipe.batch_size // pieces}; use a larger batch_size or "
            "a smaller accumulate"
        )


def pictures_of_a_piece(recipe: Recipe, network: Network) -> int:
    """The least number of readable pictures in a piece of the batch: 2 with BatchNorm and one local crop, which for a
    single picture may become one cell, and BatchNorm cannot normalise that."""
    return 2 if recipe.n_local_crops == 1 and has_batch_norm(network.backbone) else 1


def share_batch_norm(network: Network, device: str) -> Network:
    """Makes BatchNorm, if there is any, take its statistics over the batch of all processes, as in the reference.

    On CUDA with torch's kernels, elsewhere with `shared_batch_norm.py`.

    Source: facebookresearch/dino `main_dino.py`, `has_batchnorms`, for student and teacher. The teacher runs in
    training mode there and here, so it normalises by the batch, and its running statistics are its own: the moving
    average is of the weights only.

    Args:
        network: student or teacher, before the optimiser and DistributedDataParallel see it.
        device: the recipe's: ``auto``, ``cpu``, ``cuda`` …

    Returns:
        The network; its weights are the same tensors as before.
    """
    n_processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if n_processes == 1 or not has_batch_norm(network):
        return network
    if pick_device(device).type != "cuda":
        share_statistics(network)
        return network
    # timm's conversion, since torch's would drop the activation inside timm's norms.
    shared: Network = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return shared
