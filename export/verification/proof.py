"""Writes the variants of one network and measures each against torch."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.card.onnx_section import MADE_UP
from dinokit.errors import ModelError, UsageError
from dinokit.export.graphs.embedder import CropEngine
from dinokit.export.graphs.external_data import write_onnx
from dinokit.export.graphs.graph import Store, check_graph
from dinokit.export.graphs.half import weights_in_float
from dinokit.export.quantisation.calibration import calibration_pixels
from dinokit.export.quantisation.int8 import Int8Plan, Int8Plans, has_margin, is_convolutional
from dinokit.export.variants import Variant, build
from dinokit.export.verification.labels import LabelledSample, agreement, labelled_sample
from dinokit.export.verification.report import DataFile, VariantReport, describe_machine
from dinokit.export.verification.speed import images_per_second
from dinokit.export.verification.synthetic import made_up_bands
from dinokit.export.verification.verify import (
    BATCH_SIZES,
    Comparison,
    Sample,
    compare,
    image_sizes,
    reference_samples,
)
from dinokit.files.checksums import sha256_of
from dinokit.loading.load import checked_size
from dinokit.model_folder.contract import POOLED
from dinokit.model_folder.folder import BackboneConfig
from dinokit.pictures.bands import decode_bands, is_photographic
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime.onnx import OnnxEngine, session_options
from dinokit.sources.spread import evenly_spaced
from dinokit.vit_graph.storage import LARGEST_FILE

if TYPE_CHECKING:
    import onnx

    from dinokit.runtime import Engine

__all__ = [
    "Photographs",
    "Truth",
    "check_int8",
    "checked_image_size",
    "collect_truth",
    "open_photographs",
    "write_and_prove",
]

_MOST_COMPARED = max(BATCH_SIZES)
_MOST_FURTHER = 8
"""Photographs beyond those compared, from which int8 is calibrated too."""
_HELD_OUT = 4
"""One photograph in so many is kept from a calibration that fixes the ranges of activations."""

Say = Callable[[str], None]
_Engine = OnnxEngine | CropEngine


@dataclass(frozen=True)
class Photographs:
    """The pictures on which engines are compared, and further ones for the calibration of int8."""

    names: tuple[str, ...]
    """Of ``compared``."""
    compared: list[Any]
    """At most as many as the largest batch: RGB pictures, or bands."""
    further: Callable[[], list[Any]] = list
    """Opens the further ones."""
    n_further: int = 0

    @property
    def held_out(self) -> int:
        """How many of ``compared``, from the first, a calibration of fixed ranges leaves out; 0 for one photograph."""
        count = len(self.compared) + self.n_further
        return min(len(self.compared), max(1, count // _HELD_OUT)) if count > 1 else 0


@dataclass(frozen=True)
class Truth:
    """Torch's outputs for the photographs, with which all variants are compared."""

    samples: tuple[Sample, ...]
    labelled: LabelledSample | None
    photographs: Photographs
    preprocessing: Preprocessing

    def calibration(self, *, hold_out: bool) -> NDArray[np.float32]:
        """(N, C, H, W): pixels of the photographs and of crops of them, from which int8 is calibrated.

        Args:
            hold_out: leave out the first :attr:`Photographs.held_out` pictures.
        """
        pictures = self.photographs.compared[self.photographs.held_out if hold_out else 0 :]
        return calibration_pixels([*pictures, *self.photographs.further()], self.preprocessing)

    def cosine_of_held_out(self, comparisons: Sequence[Comparison]) -> float:
        """Mean cosine over the pictures that ``hold_out`` leaves out, and their mirror images."""
        n, held_out = len(self.photographs.compared), self.photographs.held_out
        # A batch larger than the photographs repeats them in their order.
        found = [c for one in comparisons for i, c in enumerate(one.cosines) if i % n < held_out]
        return float(np.mean(found))


def open_photographs(photos: str | Path | Sequence[str | Path] | None, channels: int = 3) -> Photographs:
    """The pictures to compare on, evenly over all that ``photos`` names.

    None: the bundled photographs, or synthetic pictures for networks that do not take 1 or 3 channels.

    Raises:
        UsageError: no photographs were found.
    """
    import dinokit
    from dinokit.pictures.images import find_images, open_image
    from dinokit.sources import find_pictures

    if photos is not None and not isinstance(photos, str | os.PathLike) and not photos:
        raise UsageError(
            f"photos={photos!r} does not name any photographs; name some, or leave it out to use the bundled ones"
        )
    if is_photographic(channels):
        if photos is None:
            photos = Path(dinokit.__file__).parent / "models" / "photos"
        return _spread(find_images(photos), open_image)
    if photos is None:
        seeds = range(_MOST_COMPARED)
        names = tuple(f"{MADE_UP}, seed {seed}" for seed in seeds)
        return Photographs(names, [made_up_bands(channels, n) for n in seeds])
    return _spread(find_pictures(photos, channels=channels), lambda item: decode_bands(item, channels))


def _spread(found: Sequence[Any], open_one: Callable[[Any], Any]) -> Photographs:
    """Opens the pictures to compare on, evenly over all found; the further ones lie between them."""
    chosen = [found[i] for i in evenly_spaced(len(found), _MOST_COMPARED + _MOST_FURTHER)]
    places = evenly_spaced(len(chosen), _MOST_COMPARED)
    compared = [chosen[i] for i in places]
    further = [item for i, item in enumerate(chosen) if i not in places]
    return Photographs(
        tuple(Path(str(item)).name for item in compared),
        [open_one(item) for item in compared],
        lambda: [open_one(item) for item in further],
        len(further),
    )


def check_int8(variants: Sequence[Variant], graph: onnx.ModelProto, photographs: Photographs) -> None:
    """Raises UsageError if fixed activation ranges of int8 cannot be calibrated and verified on these photographs."""
    if not is_convolutional(graph) or all(variant.precision != "int8" for variant in variants):
        return
    if any(name.startswith(MADE_UP) for name in photographs.names):
        raise UsageError(
            "int8 of a convolutional network takes its activation ranges from photographs, and dinokit has none with "
            "this number of channels; name some of yours with --photos (photos=…)"
        )
    if not photographs.held_out:
        raise UsageError(
            "int8 of a convolutional network takes its activation ranges from some photographs and is verified on "
            f"others, but --photos (photos=…) names only {photographs.names[0]}; name two or more"
        )


def checked_image_size(
    image_size: int | tuple[int, int] | None, config: BackboneConfig
) -> tuple[int, int] | None:
    """(H, W) of a graph for one size, or None. Raises UsageError if it is invalid or not a multiple of the patch."""
    if image_size is None:
        return None
    size = checked_size(image_size)
    sides = (size, size) if isinstance(size, int) else size
    patch = config.size_multiple
    if patch is None:
        if tuple(sides) != tuple(config.architecture.image_size):
            own = "{}x{}".format(*config.architecture.image_size)
            raise UsageError(f"{config.name} takes pictures of {own} px only, not {sides[0]}x{sides[1]}")
        return sides
    for side in sides:
        if side < patch or side % patch:
            below = max(patch, side // patch * patch)
            raise UsageError(
                f"image size {sides[0]}x{sides[1]} is not a multiple of patch_size={patch}; use {below} or "
                f"{below + patch} for {side}"
            )
    return sides


def collect_truth(
    reference: Engine,
    config: BackboneConfig,
    image_size: tuple[int, int] | None,
    photographs: Photographs,
    labelled: str | Path | None,
    say: Say,
) -> Truth:
    """Runs torch, once for all variants.

    Args:
        reference: the torch engine.
        config: of the model.
        image_size: the fixed size of the graphs; None: three sizes are compared.
        photographs: as :func:`open_photographs` gives them.
        labelled: one subfolder per class, or None.
        say: called with a short description of each step.
    """
    own = config.preprocessing
    chosen = own.with_image_size(image_size) if image_size else own
    sizes: Sequence[tuple[int, int]] = (image_size,) if image_size else (own.crop_px,)
    if image_size is None and config.size_multiple is not None:
        sizes = image_sizes(own.crop_px, config.size_multiple)
    samples = reference_samples(reference, photographs.compared, own, sizes, progress=say)
    return Truth(
        samples,
        labelled_sample(labelled, reference, chosen, say) if labelled else None,
        photographs,
        own,
    )


def write_and_prove(
    variants: Sequence[Variant],
    graph: onnx.ModelProto,
    config: BackboneConfig,
    weights_sha256: str,
    truth: Truth,
    file_of: Callable[[Variant], Path],
    say: Say,
    *,
    store: Mapping[str, NDArray[Any]] | None = None,
    largest: int = LARGEST_FILE,
) -> tuple[VariantReport, ...]:
    """Writes and measures each variant; the report decides whether it is accurate enough.

    Args:
        variants: what to make.
        graph: float32, every size.
        config: of the model.
        weights_sha256: hexadecimal; goes into every file.
        truth: see :func:`collect_truth`.
        file_of: the path for a variant; its folder exists.
        say: called with a short description of each step.
        store: the graph's large weights if they are outside of it (:func:`dinokit.vit_graph.split_vit_graph`).
        largest: bytes from which the weights of a graph with a store go into a second file.

    Raises:
        ModelError: a graph is invalid, or ONNX Runtime cannot load it. A graph for ``ort-cuda`` that this machine
            cannot run is reported as unproven instead.
    """

    sample = next(s for s in truth.samples if len(s.crops) == _MOST_COMPARED)  # of the first size
    fixed_ranges = is_convolutional(graph)

    def prove(variant: Variant, plan: Int8Plan | None = None) -> tuple[VariantReport, _Engine | None]:
        say(f"{variant.file}: writing")
        own = config.preprocessing
        preprocessing = own.with_image_size(variant.image_size) if variant.image_size else own
        # Weights that this variant makes are dropped with it; the graph's own are shared by all.
        made: Store | None = ChainMap({}, dict(store)) if store else None
        model = build(variant, graph, config, preprocessing, weights_sha256, made, plan, sample.pixels)
        file = file_of(variant)
        written = write_onnx(model, file, made, largest=largest)
        in_float = plan.in_float if plan else weights_in_float(model) if variant.precision == "fp16" else ()
        del model, made
        if store:
            check_graph(file)
        report = _describe(variant, written, in_float)

        say(f"{variant.file}: starting")
        engine, reason = _start(variant, file)
        if engine is None:
            return replace(report, unproven=reason), None

        def tell(step: str) -> None:
            say(f"{variant.file}: {step}")

        measured = replace(
            report,
            comparisons=compare(engine, truth.samples, progress=tell),
            labels=agreement(engine, truth.labelled, tell) if truth.labelled else None,
            device=engine.device,
        )
        if variant.precision == "int8" and fixed_ranges:
            measured = replace(measured, held_out_cosine=truth.cosine_of_held_out(measured.comparisons))
        return measured, engine

    plans = Int8Plans(graph, store, lambda: truth.calibration(hold_out=fixed_ranges), say)
    reports: list[VariantReport] = []
    runs: dict[str, Callable[[], object]] = {}
    for variant in variants:
        report, engine = _best_int8(variant, plans, prove) if variant.precision == "int8" else prove(variant)
        reports.append(report)
        # The speed of a file for CUDA on a CPU is meaningless.
        if engine is not None and not report.not_on_its_device:
            runs[variant.file] = _one_batch(engine, sample)
    say("measuring speed")
    rates = images_per_second(runs, len(sample.crops)) if runs else {}
    return tuple(
        replace(r, images_per_second=rates[r.file], speed_of=_speed_of(sample, r.device))
        if r.file in rates
        else r
        for r in reports
    )


def _best_int8(
    variant: Variant,
    plans: Int8Plans,
    prove: Callable[[Variant, Int8Plan], tuple[VariantReport, _Engine | None]],
) -> tuple[VariantReport, _Engine | None]:
    """The smallest file that passes with a margin; else the most accurate, if it passes.

    If none passes, the smallest: float32 weights did not help.
    """
    report = None
    for plan in plans:
        report, engine = prove(variant, plan)
        if has_margin(report) or not report.finite:
            return report, engine
    assert report is not None  # there is always a first plan
    return (report, engine) if report.passed else prove(variant, next(iter(plans)))


def _describe(variant: Variant, written: Sequence[Path], in_float: tuple[str, ...]) -> VariantReport:
    """The report on files just written, without comparisons."""
    file, *more = written
    data = None
    if more:
        name = f"{Path(variant.file).parent}/{more[0].name}"
        data = DataFile(name, more[0].stat().st_size, sha256_of(more[0]))
    return VariantReport(
        file=variant.file,
        precision=variant.precision,
        target=variant.target,
        bytes=sum(path.stat().st_size for path in written),
        sha256=sha256_of(file),
        comparisons=(),
        data=data,
        in_float=in_float,
    )


def _start(variant: Variant, file: Path) -> tuple[_Engine | None, str]:
    """The engine that runs a file; or None and the reason, for a file that this machine cannot run."""
    if variant.target == "embedder":
        return CropEngine(file), ""
    # On the device it is for if there is one; ONNX Runtime's CPU provider has float32 kernels for it too.
    for_gpu = variant.target == "ort-cuda" or variant.precision == "fp16"
    try:
        return OnnxEngine(file, device="auto" if for_gpu else "cpu"), ""
    except ModelError as error:
        if variant.target != "ort-cuda":
            raise
        return None, str(error)


def _one_batch(engine: _Engine, sample: Sample) -> Callable[[], Any]:
    if isinstance(engine, CropEngine):
        return lambda: engine.embed(sample.crops)
    return lambda: engine.run(sample.pixels, [POOLED])


def _speed_of(sample: Sample, device: str) -> str:
    import onnxruntime as ort

    batch, height, width, _ = sample.crops.shape
    what = f"batches of {batch} pictures of {height}x{width}, ONNX Runtime {ort.__version__} on "
    if device != "cpu":
        return f"{what}{device}, including copies of pictures and vectors"
    machine, threads = describe_machine(), session_options().intra_op_num_threads
    return f"{what}{machine['processor'] or machine['machine']}, {threads} thread{'s' if threads > 1 else ''}"
