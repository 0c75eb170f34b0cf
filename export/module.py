"""Exports a timm network in memory to an ONNX file compared with it (two files if the weights are large)."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError, UsageError
from dinokit.export.graphs.external_data import put_onnx
from dinokit.export.traced import check_variants, network_graph
from dinokit.export.variants import plan_variants
from dinokit.export.verification.proof import (
    check_int8,
    checked_image_size,
    collect_truth,
    open_photographs,
    write_and_prove,
)
from dinokit.export.verification.report import ExportReport, VariantReport
from dinokit.files.outputs import must_be_writable
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.config import BackboneConfig, is_one_line, timm_arguments
from dinokit.model_folder.contract import ATTENTION, POOLED, TOKENS
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime import Engine
from dinokit.vit_graph.storage import LARGEST_FILE, data_file
from dinokit.wording import counted

if TYPE_CHECKING:
    from torch import nn

__all__ = ["export_onnx"]


def export_onnx(
    module: nn.Module,
    file: str | Path,
    *,
    precision: str = "fp32",
    target: str = "portable",
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    name: str | None = None,
    licence: str = "unknown",
    external_data: bool = False,
    photos: str | Path | Sequence[str | Path] | None = None,
    labelled: str | Path | None = None,
    allow_loss: bool = False,
    progress: Callable[[str], None] | None = None,
) -> VariantReport:
    """Writes an ONNX file that ``dinokit.load_backbone(file)`` loads, after comparing it with the module.

    Args:
        module: a Vision Transformer of timm with a CLS token (DINO v1, DINOv2, or like them), or any other feature
            extractor of timm (ResNet, XCiT, ConvNeXt …); its classifier is left out. It is not modified.
        file: the .onnx file to write; an existing one is replaced.
        precision: ``fp32``, ``fp16`` or ``int8``.
        target: ``portable`` or ``embedder``.
        image_size: fixed input size of the graph, pixels or (height, width); None: every size.
        preprocessing: how pictures are prepared; by default as in the module's ``pretrained_cfg``.
        name: name in the file; by default timm's name of the architecture.
        licence: licence of the weights, recorded in the file.
        external_data: store the weights in a second file beside it, ``….onnx_data``; always done from 2 GiB.
        photos: photographs to compare on; by default those bundled with dinokit.
        labelled: one subfolder per class; the pictures' k-NN labels are compared too.
        allow_loss: keep a file whose accuracy is below its gate.
        progress: called with a short description of each step.

    Raises:
        UsageError: ``module`` is not a feature extractor of timm, or an argument is invalid.
        DinokitError: ``file`` cannot be written.
        ModelError: the graph cannot be written.
        ExportError: the file is below its gate (a subclass of ModelError). No file is left.
    """
    say = progress or (lambda step: None)
    file = Path(file)
    if file.suffix != ".onnx":
        raise UsageError(f"{file} should end in .onnx, by which load_backbone knows it")
    if file.is_dir():
        raise UsageError(f"{file} is a folder; expected the name of a file")
    for what, text in (("name", name), ("licence", licence)):
        if text is not None and (not text.strip() or not is_one_line(text)):
            raise UsageError(f"{what}={text!r} is not valid; expected one line of text")
    must_be_writable(file)
    module = _bare(module)
    config, weights = _describe(module, preprocessing, name, licence)
    size = checked_image_size(image_size, config)
    variants = plan_variants(precision, target, size)
    if len(variants) != 1:
        raise UsageError(
            f"precision={precision!r} and target={target!r} are not valid for one file; expected one of each"
        )
    check_variants(variants, config)
    photographs = open_photographs(photos, config.preprocessing.channels)

    sha256 = _sha256(weights)
    engine = _ModuleEngine(module, config, weights)
    graph, store = network_graph(config, weights, engine.module)
    check_int8(variants, graph, photographs)
    truth = collect_truth(engine, config, size, photographs, labelled, say)
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_name(f".{file.name}.export-{secrets.token_hex(4)}")
    work.mkdir()
    try:
        reports = write_and_prove(
            variants,
            graph,
            config,
            sha256,
            truth,
            # Keep the name: a graph with a weight file refers to it by name.
            lambda variant: work / file.name,
            say,
            store=store,
            largest=0 if external_data else LARGEST_FILE,
        )
        reports = tuple(_under_its_name(report, file.name) for report in reports)
        ExportReport(config.name, sha256, photographs.names, reports).check(allow_loss=allow_loss)
        put_onnx(work / file.name, file)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return reports[0]


def _under_its_name(report: VariantReport, name: str) -> VariantReport:
    """The report with the file's own name in place of the one in a model folder."""
    data = None if report.data is None else replace(report.data, file=data_file(Path(name)).name)
    return replace(report, file=name, data=data)


def _bare(module: nn.Module) -> nn.Module:
    """The network inside what torch.compile and data parallelism wrap around it.

    Raises:
        UsageError: it is not a module, or has no values.
    """
    import torch
    from torch import nn

    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    module = getattr(module, "_orig_mod", module)  # torch.compile's
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"module is a {type(module).__name__}; expected a torch.nn.Module, such as timm.create_model gives. "
            "export_folder takes names, folders and files of weights"
        )
    if any(tensor.device == torch.device("meta") for tensor in module.state_dict().values()):
        raise UsageError(
            "the module's weights are on torch's meta device, so they have no values; load weights into it first"
        )
    return module


def _describe(
    module: nn.Module, preprocessing: Preprocessing | None, name: str | None, licence: str
) -> tuple[BackboneConfig, dict[str, NDArray[np.float32]]]:
    """The config and the weights of a module, its classifier left out."""
    from dinokit.runtime.torch import describe_any, weights_of

    cfg: dict[str, Any] = dict(getattr(module, "pretrained_cfg", None) or {})
    try:
        known = describe_any(module, preprocessing.crop_px if preprocessing else _own_size(module, cfg))
    except UsageError as error:
        raise UsageError(
            f"a {type(module).__name__} is neither a Vision Transformer nor another feature extractor of timm: {error}"
        ) from error
    if preprocessing is None:
        preprocessing = _preprocessing(cfg, known.image_size)
    if preprocessing.channels != known.in_chans:
        raise UsageError(
            f"the module takes {counted(known.in_chans, 'channel')}, but its preprocessing has mean and std for "
            f"{preprocessing.channels}; give preprocessing=Preprocessing(…, mean=…, std=…) with one number per channel"
        )
    architecture = str(cfg.get("architecture") or "")
    arguments: dict[str, Any] = {}
    if isinstance(known, VitArchitecture):
        architecture, arguments = timm_arguments(known)
    weights = weights_of(module)
    config = BackboneConfig(
        name=name or str(cfg.get("architecture") or type(module).__name__),
        architecture=known,
        timm_architecture=architecture,
        model_args=arguments,
        preprocessing=preprocessing,
        licence=licence,
        source="a module in memory",
    )
    return config, weights


def _own_size(module: nn.Module, cfg: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) that a network was created for: ``pretrained_cfg`` ignores timm.create_model(…, img_size=…)."""
    # The first submodule with a size is the patch embedding, which has several names in timm.
    parts: Iterable[Any] = module.modules()
    made_for = next((part.img_size for part in parts if getattr(part, "img_size", None)), None)
    if isinstance(made_for, int):
        return made_for, made_for
    if isinstance(made_for, tuple | list) and len(made_for) == 2:
        return int(made_for[0]), int(made_for[1])
    _, height, width = cfg.get("input_size") or (3, 224, 224)
    return int(height), int(width)


def _preprocessing(cfg: Mapping[str, Any], size: tuple[int, int]) -> Preprocessing:
    """What timm.data.create_transform makes of a ``pretrained_cfg``, at the module's own size."""
    default = Preprocessing()
    usual = {
        "crop_pct": 0.875,
        "interpolation": default.interpolation,
        "mean": default.mean,
        "std": default.std,
    }
    given = {key: value for key, value in cfg.items() if value is not None}
    return Preprocessing.from_pretrained_cfg({**usual, **given}, image_size=size)


def _sha256(weights: dict[str, NDArray[np.float32]]) -> str:
    """The checksum that timm.safetensors would have."""
    from safetensors.numpy import save

    return hashlib.sha256(save(dict(sorted(weights.items())))).hexdigest()


class _ModuleEngine:
    """The module itself at its own size; for a ViT at other sizes, the torch engine with its weights.

    timm's ViTs refuse other sizes unless they were created with ``dynamic_img_size``.
    """

    name, device, precision = "torch", "cpu", "fp32"

    def __init__(
        self, module: nn.Module, config: BackboneConfig, weights: dict[str, NDArray[np.float32]]
    ) -> None:
        import copy

        from dinokit.runtime.torch import TorchEngine

        self.module = copy.deepcopy(module).eval().float().cpu()  # the caller's module is not modified
        self._config, self._size = config, config.architecture.image_size
        self._others: Engine | None = None
        if isinstance(config.architecture, VitArchitecture):
            self._others = TorchEngine(config, weights, device="cpu", precision="fp32")

    def run(
        self, pixel_values: NDArray[np.float32], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        import torch

        from dinokit.runtime.timm_networks import features
        from dinokit.runtime.torch import forward_with_attention

        if self._others is not None and tuple(pixel_values.shape[2:]) != tuple(self._size):
            return self._others.run(pixel_values, outputs)
        pixels = torch.from_numpy(pixel_values)
        found: dict[str, torch.Tensor | None] = {}
        with torch.inference_mode():
            if self._others is not None:
                tokens, attention = forward_with_attention(self.module, pixels)
                found = {POOLED: tokens[:, 0], TOKENS: tokens, ATTENTION: attention}
            else:
                found[POOLED], found[TOKENS] = features(self.module, pixels)
                if not self._config.token_dim:
                    del found[TOKENS]
        given = {key: tensor.numpy() for key in outputs if (tensor := found.get(key)) is not None}
        if missing := [key for key in outputs if key not in given]:
            raise ModelError(f"{self._config.name} has no {' and no '.join(missing)}")
        return given
