"""Backbone: pictures in, features out; the same on every engine.

::

    backbone = load_backbone("starter")
    backbone.embed("photo.jpg")                  # (D,)
    backbone.embed("photos/", batch_size=64)     # (N, D); lists and iterables too
    backbone.masks(image)                        # (heads, H, W) bool
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError, UsageError
from dinokit.features.attention import check_mass, mass_masks, upsample_nearest
from dinokit.features.batching import (
    BatchSize,
    Halving,
    Workers,
    batched,
    count_workers,
    even_batch_size,
    first_batch_size,
)
from dinokit.features.given_pictures import Cropper, as_given, as_iterable, is_single
from dinokit.features.intermediate_layers import TokenRequest, read_token_request
from dinokit.features.pooling import outputs_for, pool, vector_length
from dinokit.model_folder.architecture import TimmArchitecture
from dinokit.model_folder.contract import ATTENTION, TOKENS

if TYPE_CHECKING:
    from dinokit.model_folder.folder import BackboneConfig
    from dinokit.pictures.preprocess import Preprocessing
    from dinokit.runtime import Engine

__all__ = ["Backbone"]


class Backbone:
    """A Vision Transformer, or another network of timm, ready for use, with the preprocessing it was made for.

    Made by :func:`dinokit.load_backbone`. All methods that take ``images`` accept

    - one picture: a path, an address (``https://…``, ``s3://…``), a picture in an archive (``a.tar::1.jpg``), a
      Pillow image, the bytes of an image file, a binary file object, a uint8 array (H, W, 3) or (H, W), a
      uint8 torch tensor (3, H, W). The result has no batch axis;
    - several: a list, tuple or any other iterable of such; the name of a folder, pattern, archive, Parquet file
      or list (``dinokit.sources``); a uint8 array (N, H, W, 3) or tensor (N, 3, H, W). The result's first axis
      is N, in the order given.

    Grey and RGB of 16 bits keep their precision: PNG, TIFF and ``.npy`` files, arrays and tensors of uint16.
    A network of other than 1 or 3 channels takes, in their place, ``.npy`` and TIFF files of its channels, arrays
    (H, W, C) or (C, H, W) and tensors (C, H, W) of uint8, uint16 or floats in 0…1 (``band_files.py``).

    All methods further take ``batch_size`` (pictures per run of the network; no effect on the result beyond rounding;
    ``"auto"`` begins with what suits the device and halves it when memory runs out) and ``workers`` (threads that
    decode: ``"auto"``, or a number; 0 decodes in the calling thread). They raise ImageError at the first picture that
    cannot be read, naming it; `dinokit embed` is the tolerant way.
    """

    def __init__(
        self,
        config: BackboneConfig,
        engine: Engine,
        *,
        weights_sha256: str,
        source: str,
        revision: str | None = None,
        preprocessing: Preprocessing | None = None,
        reduced_decoding: bool = False,
        _loaded_as: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            config: the configuration in the model folder.
            engine: the network, of ``dinokit.runtime``.
            weights_sha256: of the weights file, hexadecimal; recorded in every table of embeddings.
            source: where the model came from: ``bundled``, a path, a Hub id.
            revision: the commit on the Hub.
            preprocessing: instead of the folder's own, for another image size
                (``Preprocessing.with_image_size``).
            reduced_decoding: see :attr:`reduced_decoding`.

        Raises:
            UsageError: the image size is not a multiple of the patch size, or not the only one of the network.
        """
        self.config = config
        self.weights_sha256 = weights_sha256
        self.source = source
        self.revision = revision
        self.preprocessing = preprocessing or config.preprocessing
        self.reduced_decoding = reduced_decoding
        """Whether large JPEG files are decoded at a half, a quarter or an eighth of their size, where that is still
        twice what the resize needs: several times faster, and vectors change a little
        (``benchmarks/reduced_decoding.py``). Other pictures are decoded at full size."""
        # The arguments with which load_backbone loads it again; None if it was not made there.
        self._loaded_as = _loaded_as
        self._engine = engine
        for name, side in zip(("height", "width"), self.preprocessing.crop_px, strict=True):
            self._check_side(name, side)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A session cannot be pickled, and weights do not belong in a pickle, so the receiver loads the model again.
        # A torch module may have been trained since, so it is pickled itself.
        if self.engine == "torch":
            return super().__reduce_ex__(protocol)
        if self._loaded_as is None:
            raise TypeError(
                f"{self!r} cannot be pickled: it was not made by load_backbone, so it cannot be loaded again"
            )
        return _loaded_again, (self._loaded_as, self.weights_sha256)

    # -- what it is

    @property
    def name(self) -> str:
        """The model's name, e.g. ``starter``."""
        return self.config.name

    @property
    def embed_dim(self) -> int:
        """D, the length of an embedding."""
        return self.config.embed_dim

    @property
    def num_heads(self) -> int:
        """Attention heads of a block; 0 for a network that has no attention to show, such as a ResNet."""
        return self.config.num_heads

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels; for a network without patches, of the area that a cell of its feature map covers."""
        return self.config.patch_size

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the network's input, pixels."""
        return self.preprocessing.crop_px

    @property
    def least_px(self) -> int | None:
        """Least short side to which a JPEG may be downscaled while decoding; None: decoded at full size."""
        return self.preprocessing.least_px if self.reduced_decoding else None

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): rows and columns of patches, or of the feature map."""
        known, (height, width) = self.config.architecture, self.image_size
        if isinstance(known, TimmArchitecture):
            return known.grid(height, width)
        return height // self.patch_size, width // self.patch_size

    @property
    def engine(self) -> str:
        """``onnx`` or ``torch``."""
        return self._engine.name

    @property
    def device(self) -> str:
        """Where it computes: ``cpu``, ``cuda:0``."""
        return self._engine.device

    @property
    def precision(self) -> str:
        """The precision it computes in: ``fp32``, ``fp16`` …"""
        return self._engine.precision

    @property
    def module(self) -> Any:
        """The timm module (torch.nn.Module in eval mode), for fine-tuning. Engine ``torch`` only.

        Raises:
            UsageError: another engine computes.
        """
        if self.engine != "torch":
            raise UsageError(
                f"this backbone computes with {self.engine}, which has no torch module; "
                'use load_backbone(…, engine="torch")'
            )
        return self._engine.module  # type: ignore[attr-defined]  # of TorchEngine, not of the protocol

    @property
    def transform(self) -> Callable[[Any], NDArray[np.float32]]:
        """A function from one picture (as for ``embed``) to the network's input, (3, H, W) float32.

        It contains the preprocessing but not the network, so the processes of a torch DataLoader can receive it.
        """
        return self._cropper.network_input

    def __repr__(self) -> str:
        height, width = self.image_size
        parts = f"{self.num_heads} heads" if self.num_heads else "no attention"
        return (
            f"<Backbone {self.name} ({self.source}): {self.embed_dim} numbers per picture, {height}x{width} px "
            f"in patches of {self.patch_size}, {parts}; {self.engine} on {self.device}, {self.precision}>"
        )

    # -- what it does

    def embed(
        self,
        images: Any,
        *,
        what: str = "cls",
        normalize: bool = False,
        batch_size: BatchSize = 32,
        workers: Workers = "auto",
    ) -> NDArray[np.float32]:
        """The embedding: the CLS token after the final norm, the mean of the patch tokens, or a concatenation.

        Args:
            images: as above.
            what: ``cls``, ``mean`` or ``cls+mean``; ``cls:4`` (or another number) for the CLS tokens of the last four
                blocks, as in the paper's linear evaluation, and ``cls:4+mean`` (see ``pooling.py``). For a network
                without a CLS token, ``cls`` is its pooled features.
            normalize: L2-normalise each vector.

        Returns:
            (D,) float32 for one picture, (N, D) for several; 2 D numbers for ``cls+mean``, 4 D for ``cls:4``.

        Raises:
            UsageError: there is no such vector, the network has no such blocks, or the engine does not output them: a
                single ``.onnx`` file, and those of fp16 and int8, have only the last block.
        """
        outputs_for(what, self.config)  # checked before a picture is read
        compute = functools.partial(self.embed_crops, what=what, normalize=normalize)
        return self._apply(compute, (vector_length(what, self.embed_dim),), images, batch_size, workers)

    @overload
    def patch_tokens(
        self,
        images: Any,
        *,
        layers: Iterable[int] | None = None,
        norm: bool = True,
        return_class_token: Literal[False] = False,
        batch_size: BatchSize = 32,
        workers: Workers = "auto",
    ) -> NDArray[np.float32]: ...

    @overload
    def patch_tokens(
        self,
        images: Any,
        *,
        layers: Iterable[int] | None = None,
        norm: bool = True,
        return_class_token: Literal[True],
        batch_size: BatchSize = 32,
        workers: Workers = "auto",
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...

    def patch_tokens(
        self,
        images: Any,
        *,
        layers: Iterable[int] | None = None,
        norm: bool = True,
        return_class_token: bool = False,
        batch_size: BatchSize = 32,
        workers: Workers = "auto",
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The patches' tokens after the final norm, on their grid; or the last feature map of a network without.

        Args:
            images: as above.
            layers: blocks whose tokens to return, ``[2, 5, 8, 11]``: counted from 0, negative ones from the end, in
                any order. None: the last block's, without an axis for it.
            norm: each layer goes through the network's final norm; False: as the next block takes it.
            return_class_token: also return the CLS tokens of the same blocks.

        Returns:
            (h, w, D) float32 for one picture, (N, h, w, D) for several; with L ``layers`` (L, h, w, D) and
            (N, L, h, w, D). D is the width of a token; in a few convolutional networks it differs from the embedding's.
            With ``return_class_token`` a pair: these, and (D,), (N, D), (L, D) or (N, L, D) likewise.

        Raises:
            UsageError: the network has no feature map, or no such blocks; or the engine does not output them: a
                single ``.onnx`` file, and those of fp16 and int8, have the last block only.
            ModelError: the ONNX engine writes its graph again when layers are first requested (which takes as long
                as loading did), and the model's weights have been replaced since it was loaded.

        Source: facebookresearch/dinov2, ``get_intermediate_layers``, whose arguments these are.
        """
        request = read_token_request(
            self.config,
            self._engine,
            self.patch_shape,
            layers=layers,
            norm=norm,
            class_token=return_class_token,
        )
        compute = functools.partial(self._tokens, request)
        result = self._apply(compute, request.shape, images, batch_size, workers)
        return request.split(result) if return_class_token else result

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """(h, w, D) of :meth:`patch_tokens`. Raises UsageError if the network has no feature map."""
        return (*self.grid, self._token_dim("patch tokens"))

    def patch_tokens_of_crops(self, crops: NDArray[Any]) -> NDArray[np.float32]:
        """The patches' tokens of pictures cropped to :attr:`image_size`: one run of the network, nothing resized.

        Args:
            crops: (B, H, W, C) uint8, of 3 channels RGB; or float32 in 0…255 if they are finer than 8 bits.

        Returns:
            (B, h, w, D) float32.
        """
        return self._tokens(TokenRequest(self.config, self.patch_shape), crops)

    def attention(
        self, images: Any, *, batch_size: BatchSize = 32, workers: Workers = "auto"
    ) -> NDArray[np.float32]:
        """The attention of the last block's CLS token to each patch, for each head.

        Returns:
            (heads, h, w) float32 for one picture, (N, heads, h, w) for several: probabilities, which sum to
            less than 1 because the CLS token also attends to itself (and to registers).

        Raises:
            UsageError: the network has no such attention.
        """
        self.must_have_attention()
        shape = (self.num_heads, *self.grid)

        def compute(crops: NDArray[Any]) -> NDArray[np.float32]:
            return self._run(crops, ATTENTION).reshape(-1, *shape)

        return self._apply(compute, shape, images, batch_size, workers)

    def masks(
        self, images: Any, mass: float = 0.6, *, batch_size: BatchSize = 32, workers: Workers = "auto"
    ) -> NDArray[np.bool_]:
        """The fewest patches that receive ``mass`` of each head's attention (:func:`mass_masks`), as masks of pixels.

        Returns:
            (heads, H, W) bool for one picture, (N, heads, H, W) for several, on the crop that the network
            sees (``preprocessing.crop``).

        Raises:
            UsageError: the network has no attention, or ``mass`` is not in (0, 1].
        """
        self.must_have_attention()
        check_mass(mass)

        def compute(crops: NDArray[Any]) -> NDArray[np.bool_]:
            # Computed here, not on the collected maps, since the reference sorts the flat (…, N) form.
            kept = mass_masks(self._run(crops, ATTENTION), mass).reshape(-1, self.num_heads, *self.grid)
            return upsample_nearest(kept, self.patch_size)

        shape = (self.num_heads, *self.image_size)
        return self._apply(compute, shape, images, batch_size, workers, np.bool_)

    def must_have_attention(self) -> None:
        """Raises UsageError if :meth:`attention` and :meth:`masks` cannot work; called before expensive work."""
        if not self.num_heads:
            raise UsageError(
                f"{self.name} has no attention to show: it is not a Vision Transformer of the DINO family. Its "
                "embeddings and patch tokens work; attention and masks need a ViT, such as starter, dino_vits16 or any "
                "vit_* run"
            )

    def embed_crops(
        self, crops: NDArray[Any], *, what: str = "cls", normalize: bool = False
    ) -> NDArray[np.float32]:
        """Embeds pictures that are already cropped: one run of the network, nothing resized.

        Args:
            crops: (B, H, W, C) as for :meth:`patch_tokens_of_crops`; H and W multiples of the patch size, of any size.
            what: as for :meth:`embed`, also ``normalize``.

        Returns:
            (B, D) float32, (B, 2 D) for ``cls+mean``, (B, 4 D) for ``cls:4``.

        Raises:
            UsageError: another dtype, shape or size; or the network gives no such vector.
        """
        names = outputs_for(what, self.config)
        if TOKENS in names and self._token_dim(f"what={what!r}") != self.embed_dim:
            raise UsageError(
                f"the cells of {self.name}'s feature map have {self.config.token_dim} numbers, its embedding "
                f"{self.embed_dim}; use what='cls' instead of {what!r}, or patch_tokens for the cells"
            )
        outputs = self._outputs(crops, names)
        return pool(outputs, names, n_prefix=self.config.num_prefix_tokens, normalize=normalize)

    # -- how

    @property
    def _cropper(self) -> Cropper:
        return Cropper(self.preprocessing, self.least_px)

    def _token_dim(self, what: str) -> int:
        width = self.config.token_dim
        if width is None:
            raise UsageError(
                f"{self.name} has no feature map, so {what} is not available, only its embedding (what='cls')"
            )
        return width

    def _tokens(self, request: TokenRequest, crops: NDArray[Any]) -> NDArray[np.float32]:
        return request.arrange(self._outputs(crops, list(dict.fromkeys(request.outputs))), crops.shape)

    def _run(self, crops: NDArray[Any], output: str) -> NDArray[np.float32]:
        return self._outputs(crops, [output])[output]

    def _outputs(self, crops: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        channels = self.preprocessing.channels
        of_crops = crops.dtype in (np.uint8, np.float32) and crops.ndim == 4 and crops.shape[3] == channels
        if not of_crops or not len(crops):
            raise UsageError(
                f"the crops are {crops.dtype} of shape {crops.shape}; expected uint8 or float32 "
                f"(B, H, W, {channels}), in 0…255"
            )
        for name, side in zip(("height", "width"), crops.shape[1:3], strict=True):
            self._check_side(name, side)
        found = self._engine.run(self.preprocessing.normalise(crops), names)
        # Vectors of NaN would be taken for pictures that could not be read. A sum is finite only if its terms are.
        with np.errstate(invalid="ignore", over="ignore"):
            broken = [name for name, array in found.items() if not np.isfinite(array.sum())]
        if broken:
            raise ModelError(
                f"{self.name} ({self.source}) computed values that are not finite in {', '.join(broken)}: its weights "
                f"are damaged, or overflow in {self.precision}; fetch the model again, or use precision='fp32'"
            )
        return found

    def _apply(
        self,
        compute: Callable[[NDArray[Any]], NDArray[Any]],
        shape: tuple[int, ...],
        images: Any,
        batch_size: BatchSize,
        workers: Workers,
        dtype: Any = np.float32,
    ) -> NDArray[Any]:
        """``compute`` over batches of one constant shape; ``shape`` and ``dtype`` are of one result."""
        halving = Halving(first_batch_size(batch_size, self.device)) if batch_size == "auto" else None
        batch_size = first_batch_size(batch_size, self.device)
        threads = count_workers(workers)
        images = as_given(images)
        if is_single(images):
            one: NDArray[Any] = compute(self._cropper.crop(images)[None])[0]
            return one
        several = as_iterable(images, self.preprocessing.channels)
        if isinstance(several, Sequence | np.ndarray):
            batch_size = even_batch_size(len(several), batch_size)
        results: list[NDArray[Any]] = []
        crops = self._cropper.ahead(several, workers=threads, ahead=2 * batch_size)
        for batch in batched(crops, batch_size):
            # The last batch is padded, so that engines that compile for each shape compile once. A first batch that is
            # shorter is the only one, and stays as it is.
            n_padding = batch_size - len(batch) if results else 0
            stacked = np.stack(batch + batch[-1:] * n_padding)
            made = halving.run(compute, stacked) if halving else compute(stacked)
            results.append(made[: len(batch)])
        return np.concatenate(results) if results else np.empty((0, *shape), dtype)

    def _check_side(self, name: str, side: int) -> None:
        multiple = self.config.size_multiple
        if multiple is None:
            own = self.config.architecture.image_size[name == "width"]
            if side != own:
                raise UsageError(f"{self.name} takes an image {name} of {own} px only, not {side}")
        elif side % multiple or side < multiple:
            below = side // multiple * multiple
            choice = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise UsageError(
                f"an image {name} of {side} px is not a multiple of patch_size={multiple}; use {choice}"
            )


def _loaded_again(loaded_as: dict[str, Any], weights_sha256: str) -> Backbone:
    """Unpickles. Raises ModelError if the name refers to other weights than when it was pickled."""
    from dinokit.loading.load import load_backbone

    backbone = load_backbone(**loaded_as)
    if backbone.weights_sha256 != weights_sha256:
        raise ModelError(
            f"{loaded_as['name']} has other weights than the backbone that was pickled "
            f"({backbone.weights_sha256[:12]}, not {weights_sha256[:12]}); load the model again by its name"
        )
    return backbone
