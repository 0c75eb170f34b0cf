"""The torch engine: timm Vision Transformers with the position embedding resized as they were trained, and timm's
other networks as they are (:mod:`dinokit.runtime.timm_networks`).

Needs the extra ``[train]``. Training builds its networks here too, so that the trained network is the one that runs.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import DeviceError, MissingExtraError, ModelError, UsageError
from dinokit.model_folder.architecture import Architecture, PosEmbedResize, VitArchitecture
from dinokit.model_folder.contract import ATTENTION, POOLED, TOKENS, block_of
from dinokit.model_folder.weights import check_weights, expected_shapes
from dinokit.vit_graph.rope import ROPE_THETA

try:
    import timm
    import torch
    import torch.nn.functional as F
    from timm.layers.activations import GELU, Swish
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor, nn

    from dinokit.runtime.timm_blocks import forward_with_blocks, maps_of_blocks, number_of_blocks
    from dinokit.runtime.timm_networks import (
        check_arguments,
        create_network,
        describe_network,
        features,
        reason_of,
    )
except ImportError as error:  # pragma: no cover - depends on the installation
    raise MissingExtraError("the torch engine", extra="train", package="torch and timm") from error

if TYPE_CHECKING:
    from dinokit.model_folder.folder import BackboneConfig

__all__ = [
    "DinoVisionTransformer",
    "TorchEngine",
    "create_vit",
    "describe",
    "describe_any",
    "gives_attention",
    "pick_device",
    "weights_of",
]


class DinoVisionTransformer(VisionTransformer):
    """timm's VisionTransformer, its position embedding resized as the weights were trained.

    timm resizes with antialias at sizes other than the trained one; facebookresearch/dino without, and with
    0.1 patch added to the scale. Multi-crop training sees such sizes at every step, so a model keeps its own.
    """

    pos_embed_resize: PosEmbedResize

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(B, rows, columns, D) patch embeddings to (B, 1 + R + N, D) with positions added."""
        n_images, rows, columns, width = x.shape
        n_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        assert self.pos_embed is not None  # create_vit gives this class to no other
        positions = resize_position_embedding(
            self.pos_embed, (rows, columns), self.patch_embed.grid_size, n_prefix, self.pos_embed_resize
        )
        prefix = [t.expand(n_images, -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = x.reshape(n_images, rows * columns, width)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*prefix, x + positions], dim=1))  # type: ignore[no-any-return]
        return self.pos_drop(torch.cat([*prefix, x], dim=1) + positions)  # type: ignore[no-any-return]


def resize_position_embedding(
    pos_embed: Tensor,
    grid: tuple[int, int],
    trained_grid: tuple[int, int],
    n_prefix: int,
    rule: PosEmbedResize,
) -> Tensor:
    """Resizes the patch part of a position embedding to another grid.

    Args:
        pos_embed: (1, n_prefix + N, D), the first ``n_prefix`` entries belong to CLS and registers.
        grid: the new (rows, columns).
        trained_grid: (rows, columns) with rows x columns = N.
        n_prefix: entries that are kept as they are.
        rule: see :class:`PosEmbedResize`.

    Returns:
        (1, n_prefix + rows x columns, D); ``pos_embed`` itself when the grid is the trained one.

    Source: facebookresearch/dino `vision_transformer.py`, `interpolate_pos_encoding` (issue #8 there explains
    the 0.1); the sampling grid comes from the scale that is passed, not from the sizes.
    """
    if tuple(grid) == tuple(trained_grid):
        return pos_embed
    prefix, patches = pos_embed[:, :n_prefix], pos_embed[:, n_prefix:]
    image = patches.float().reshape(1, *trained_grid, -1).permute(0, 3, 1, 2)
    if rule.offset:
        scale = tuple((g + rule.offset) / t for g, t in zip(grid, trained_grid, strict=True))
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=rule.antialias)
    else:
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=rule.antialias)
    assert tuple(image.shape[-2:]) == tuple(grid)
    return torch.cat([prefix, image.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)], dim=1)


def create_vit(
    timm_architecture: str,
    model_args: Mapping[str, Any],
    resize: PosEmbedResize,
    *,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """Builds a timm Vision Transformer without classifier, for pictures of any size.

    Args:
        timm_architecture: a name that ``timm.list_models`` knows, such as ``vit_tiny_patch16_224``.
        model_args: keywords for it, such as ``img_size``, ``patch_size``, ``embed_dim``.
        resize: how the position embedding follows the size. Only timm's ``VisionTransformer`` with a learned
            position embedding can follow it; other classes keep timm's own rule.
        drop_path_rate: stochastic depth, rising linearly over the blocks (the student's only).

    Raises:
        UsageError: timm does not know the name or rejects the arguments, or it is not a Vision Transformer.
    """
    if not timm.is_model(timm_architecture):
        near = difflib.get_close_matches(timm_architecture, timm.list_models("vit_*"), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see timm.list_models('vit_*')"
        raise UsageError(f"timm {timm.__version__} has no model {timm_architecture!r}; {hint}")
    check_arguments(model_args)
    args = {"dynamic_img_size": True, **model_args}
    try:
        module = timm.create_model(
            timm_architecture, pretrained=False, num_classes=0, drop_path_rate=drop_path_rate, **args
        )
    except Exception as error:  # the arguments may be anybody's, and timm checks few of them
        raise UsageError(
            f"timm cannot build {timm_architecture!r} as a Vision Transformer with {dict(model_args)}: "
            f"{reason_of(error)}. "
            "Use one of timm's vit_* models, with an image size that is a multiple of its patch size"
        ) from error
    if not isinstance(getattr(module, "blocks", None), nn.Module) or not hasattr(module, "cls_token"):
        raise UsageError(
            f"{timm_architecture!r} is a {type(module).__name__}, not a Vision Transformer with a CLS token; "
            "use one of timm's vit_* models"
        )
    if type(module) is VisionTransformer and module.pos_embed is not None:
        # The subclass adds one method and no state, so the instance timm has built can take its class.
        module.__class__ = DinoVisionTransformer
        vit: Any = module
        vit.pos_embed_resize = resize
    return module


def describe(module: nn.Module) -> VitArchitecture:
    """Reads the sizes of a timm Vision Transformer off the module itself."""
    block: Any = module.blocks[0]  # type: ignore[index]
    vit: Any = module
    grid_h, grid_w = vit.patch_embed.grid_size
    patch_h, patch_w = vit.patch_embed.patch_size
    if patch_h != patch_w:
        raise ModelError(f"patches of {patch_h}x{patch_w} pixels: dinokit supports only square patches")
    mlp = block.mlp
    plain_mlp = type(mlp).__name__ == "Mlp"
    first = getattr(mlp, "fc1", None) or getattr(mlp, "fc1_g", None)  # fc1_g: gate and input in two layers
    hidden = first.out_features if first is not None else vit.embed_dim * 4
    qkv = getattr(block.attn, "qkv", None)
    return VitArchitecture(
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=block.attn.num_heads,
        patch_size=patch_h,
        image_size=(grid_h * patch_h, grid_w * patch_w),
        in_chans=vit.patch_embed.proj.in_channels,
        mlp_ratio=hidden / vit.embed_dim,
        num_register_tokens=vit.num_prefix_tokens - 1,
        layer_norm_eps=float(block.norm1.eps),
        # timm's class for DINOv3 keeps the biases of queries and values beside the layer
        qkv_bias=qkv is None or qkv.bias is not None or getattr(block.attn, "q_bias", None) is not None,
        layer_scale=hasattr(getattr(block, "ls1", None), "gamma")
        or getattr(block, "gamma_1", None) is not None,
        ffn="mlp" if plain_mlp else "swiglu",
        position="learned" if isinstance(module, VisionTransformer) else "rope",
        pos_embed_resize=getattr(vit, "pos_embed_resize", PosEmbedResize(offset=0.0, antialias=True)),
    )


def describe_any(module: nn.Module, image_size: tuple[int, int]) -> Architecture:
    """The architecture of a timm module without classifier: a DINO ViT, or another network.

    Args:
        module: it is run in evaluation mode on an empty picture or two unless it is a ViT, and left as it was.
        image_size: (H, W) of its input; a ViT knows its own.

    Raises:
        UsageError: it is not one of timm's feature extractors.
    """
    try:
        vit = describe(module)
    except (AttributeError, TypeError, IndexError, ModelError):
        return describe_network(module, image_size)
    # A relative with further parts (relative positions, another activation …) is run as timm has it.
    if not _computes_as(module, vit):
        return describe_network(module, image_size)
    found = {name: tuple(tensor.shape) for name, tensor in _needed(module).items()}
    wrong = check_weights(found, expected_shapes(vit) or {}, "it")
    return describe_network(module, image_size) if wrong else vit


def _computes_as(module: nn.Module, vit: VitArchitecture) -> bool:
    """Whether a timm ViT computes exactly what a :class:`VitArchitecture` describes.

    Checks what the shapes of the weights do not show: activations, norms and the rotation's frequencies.
    """
    network: Any = module
    activations = (nn.SiLU, Swish) if vit.ffn == "swiglu" else (nn.GELU, GELU)
    for block in network.blocks:
        act = block.mlp.act
        if type(act) not in activations or getattr(act, "approximate", "none") != "none":
            return False
        if getattr(block.mlp, "gate_last", False):
            return False
    norms = [norm for block in network.blocks for norm in (block.norm1, block.norm2)] + [network.norm]
    if any(not isinstance(norm, nn.LayerNorm) or norm.eps != vit.layer_norm_eps for norm in norms):
        return False
    if vit.position == "learned":
        return True
    rope = network.rope
    return (
        type(rope).__name__ == "RotaryEmbeddingDinoV3"
        and rope.temperature == ROPE_THETA
        and (rope.min_period, rope.max_period, rope.normalize_coords) == (None, None, "separate")
        and (rope.grid_offset, rope.grid_indexing, rope.rotate_half) == (0, "ij", True)
    )


def weights_of(module: nn.Module) -> dict[str, NDArray[np.float32]]:
    """The weights and buffers that a timm module's features need, as float32 copies for a model folder.

    Leaves out the classifier and BatchNorm's counts of batches, which nothing is computed with.
    """
    return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in _needed(module).items()}


def _needed(module: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers that features need."""
    classifier = _classifiers(module)
    return {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not name.startswith(classifier) and not name.endswith("num_batches_tracked")
    }


def _classifiers(module: nn.Module) -> tuple[str, ...]:
    named = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or "head"
    names = (named,) if isinstance(named, str) else tuple(named)
    return tuple(f"{name}." for name in names)


def gives_attention(module: nn.Module) -> bool:
    """Whether :func:`forward_with_attention` supports this network: a Vision Transformer with queries and keys."""
    try:
        describe(module)
    except (AttributeError, TypeError, IndexError, ModelError):
        return False
    blocks: Any = module.blocks
    return getattr(blocks[-1].attn, "qkv", None) is not None


def pick_device(device: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; it exists.

    Raises:
        DeviceError: the device was requested by name and torch cannot use it.
        UsageError: there is no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    kind, _, index = device.partition(":")
    if kind not in {"cpu", "cuda", "mps"} or (index and not index.isdecimal()):
        raise UsageError(
            f"device={device!r} is not known to the torch engine; expected auto, cpu, cuda, cuda:1 or mps"
        )
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            built = torch.version.cuda or "none (a CPU build)"
            raise DeviceError(
                f"device={device!r} was requested, but torch {torch.__version__} finds {count} CUDA devices "
                f"(built for CUDA {built}). Use device='cpu', or install the NVIDIA driver and a CUDA build"
            )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device='mps' was requested, but this torch has no Metal device; use device='cpu'")
    return torch.device(f"{kind}:{index or 0}" if kind == "cuda" else kind)


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchEngine:
    """Runs a backbone with torch. ``module`` is an ordinary timm module in eval mode."""

    name = "torch"

    def __init__(
        self,
        config: BackboneConfig,
        weights: Mapping[str, NDArray[np.float32]],
        *,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        """
        Args:
            config: sizes and timm's name of the model.
            weights: timm's names to arrays; must fit exactly.
            device: see :func:`pick_device`.
            precision: ``auto`` (= fp32), ``fp32``, ``fp16`` or ``bf16``; the module is converted.

        Raises:
            ModelError: the weights do not fit the architecture, or timm here has no such network.
            DeviceError: the device is not available.
            UsageError: the precision is unknown.
        """
        self.precision = "fp32" if precision == "auto" else precision
        if self.precision not in _DTYPES:
            raise UsageError(
                f"precision={precision!r} is not supported by the torch engine; use one of {sorted(_DTYPES)}"
            )
        self._device = pick_device(device)
        self.device = str(self._device)
        self._is_vit = isinstance(config.architecture, VitArchitecture)
        if self._is_vit:
            self.module = create_vit(config.timm_architecture, config.model_args, config.vit.pos_embed_resize)
            for part in self.module.modules():  # no JSON value tells timm
                if isinstance(part, nn.LayerNorm):
                    part.eps = config.vit.layer_norm_eps
        else:
            self.module = create_network(config.timm_architecture, config.model_args)
        self._name, self._has_tokens = config.timm_architecture, config.token_dim is not None
        # The module copies them. torch warns of arrays that are read-only, as parts of a larger one can be.
        state = {
            name: torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
            for name, array in weights.items()
        }
        try:
            wrong = self.module.load_state_dict(state, strict=False)
        except RuntimeError as error:  # tensors of another shape
            raise ModelError(f"the weights do not fit {config.timm_architecture}: {error}") from error
        if wrong.missing_keys or wrong.unexpected_keys:
            raise ModelError(
                f"the weights do not fit {config.timm_architecture}: missing {wrong.missing_keys}, "
                f"unexpected {wrong.unexpected_keys}"
            )
        # timm's own cfg describes the preprocessing of the published weights. Code that uses the module by itself
        # (timm.data.resolve_model_data_config, export_onnx) should use that of these weights.
        cfg = dict(getattr(self.module, "pretrained_cfg", None) or {})
        self.module.pretrained_cfg = {**cfg, **config.preprocessing.to_pretrained_cfg()}  # type: ignore[assignment]
        # Its weights stay trainable, for fine-tuning; run() records no gradients.
        self.module.eval().to(self._device, _DTYPES[self.precision])

    @property
    def n_blocks(self) -> int | None:
        """The number of blocks whose outputs :meth:`run` can return; None if the network is made of other parts."""
        return number_of_blocks(self.module)

    def run(
        self, pixel_values: NDArray[np.float32], outputs: Sequence[str] = (POOLED,)
    ) -> dict[str, NDArray[np.float32]]:
        """Computes the requested outputs.

        Args:
            pixel_values: (B, 3, H, W) float32, normalised; H and W multiples of the patch.
            outputs: of those in :mod:`dinokit.model_folder.contract`.

        Returns:
            Name to float32 array.

        Raises:
            ModelError: the network has no such output.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(pixel_values)).to(
            self._device, _DTYPES[self.precision]
        )
        if not self._is_vit:
            return self._run_network(pixels, outputs)
        blocks = _blocks(outputs)
        found: dict[str, Tensor] = {}
        with torch.inference_mode():
            if ATTENTION in outputs:
                found[TOKENS], found[ATTENTION] = forward_with_attention(self.module, pixels)
            if blocks:
                whole = TOKENS in outputs or POOLED in outputs
                last, inner = forward_with_blocks(self.module, pixels, blocks, whole=whole)
                found |= inner
                if last is not None:
                    found[TOKENS] = last
            if not found:
                found[TOKENS] = self.module.forward_features(pixels)  # type: ignore[operator]
        if POOLED in outputs:
            found[POOLED] = found[TOKENS][:, 0]
        return {name: found[name].float().cpu().numpy() for name in outputs}

    def _run_network(self, pixels: Tensor, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        if ATTENTION in outputs:
            raise ModelError(f"a {self._name} has no attention to show: it is not a Vision Transformer")
        blocks = _blocks(outputs)
        found: dict[str, Tensor] = {}
        with torch.inference_mode():
            if blocks:
                found |= maps_of_blocks(self.module, pixels, blocks)
            if len(blocks) < len(outputs):
                found[POOLED], tokens = features(self.module, pixels)
                if tokens is not None and self._has_tokens:
                    found[TOKENS] = tokens
        if missing := [name for name in outputs if name not in found]:
            raise ModelError(f"a {self._name} has no feature map, and so no {', '.join(missing)}")
        return {name: found[name].float().cpu().numpy() for name in outputs}


def _blocks(outputs: Sequence[str]) -> dict[str, tuple[int, bool]]:
    """The inner blocks among the outputs: name to index and norm."""
    return {name: block for name in outputs if (block := block_of(name)) is not None}


def forward_with_attention(module: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens after the final norm, and the last block's CLS→patch attention.

    Fused attention does not return its probabilities, so the CLS row alone is computed again from the last
    block's input: N + 1 products per head.

    Returns:
        (B, 1 + R + N, D) tokens and (B, heads, N) probabilities (softmax over all tokens; the columns of CLS
        and registers are left out, so a row sums to less than 1). As facebookresearch/dino
        `get_last_selfattention`, `[:, :, 0, 1:]`.
    """
    vit: Any = module
    attention = vit.blocks[-1].attn
    if getattr(attention, "qkv", None) is None:
        raise ModelError(
            f"attention maps of a {type(module).__name__} with queries and keys of their own are not supported; "
            "its embeddings and patch tokens are"
        )
    seen: list[tuple[Tensor, Tensor | None]] = []
    me = threading.get_ident()

    def look(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any] | None = None) -> None:
        # Another thread may run the same module. If it does while this hook is being removed, torch may call it without
        # keyword arguments.
        if threading.get_ident() == me:
            seen.append((args[0], (options or {}).get("rope")))

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    try:
        tokens = vit.forward_features(pixel_values)
    finally:
        handle.remove()
    x, rope = seen[0]
    n_images, n_tokens, _ = x.shape
    projected = attention.qkv(x)
    if getattr(attention, "q_bias", None) is not None:  # timm's class for DINOv3 adds them itself
        projected = projected + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = projected.reshape(n_images, n_tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(qkv[0][:, :, :1]), attention.k_norm(qkv[1])
    if rope is not None:  # DINOv3 rotates queries and keys of patches only, so not the query of CLS
        n_prefix = vit.num_prefix_tokens
        turned = apply_rot_embed_cat(key[:, :, n_prefix:], rope, half=attention.rotate_half)
        key = torch.cat([key[:, :, :n_prefix], turned.type_as(key)], dim=2)
    scores = (query * attention.scale) @ key.transpose(-2, -1)
    return tokens, scores.float().softmax(dim=-1)[:, :, 0, vit.num_prefix_tokens :]
