"""Deploy on a GPU with ONNX Runtime alone: float16, fixed buffers on the device (IO binding), a CUDA graph, no torch.

    python examples/deploy_ort_gpu.py                                       the starter on the example photographs
    dinokit export dino_vits16 -o vits16 --target ort-cuda --image-size 224
    python examples/deploy_ort_gpu.py vits16/onnx/model_cuda_fp16_224x224.onnx my/photos -o vectors.npy

Only reading and cropping pictures is dinokit's here; the rest is what a service in any language would do. Without a
usable GPU it runs on the CPU in float32 and says so. Its authors had no GPU to measure on.

Prints how many images/s the network takes, and writes the vectors (N, D) float32 in the order of the photographs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dinokit.loading.locate import locate
from dinokit.model_folder.contract import contract_of
from dinokit.pictures.bands import open_picture
from dinokit.pictures.image_files import find_images
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime.onnx import cuda_loads

INPUT, OUTPUT = "pixel_values", "pooler_output"  # normalised pictures (B, C, H, W) to vectors (B, D)


class FixedBatches:
    """A session whose input and output stay in the same place on the device, so that a CUDA graph can be replayed.

    A CUDA graph is the record of all kernels of one run; replaying it costs one launch instead of some hundred. It
    needs shapes and addresses that never change: hence one batch size, and buffers that are filled again and again.
    """

    def __init__(self, model: bytes | str, shape: tuple[int, int, int, int], device: str) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # The graph takes any batch; with a number in its place, ONNX Runtime computes all shapes now.
        batch, _, height, width = shape
        for name, value in (("batch", batch), ("height", height), ("width", width)):
            options.add_free_dimension_override_by_name(name, value)
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": 0, "enable_cuda_graph": 1}))
        self.session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        # A provider that fails to load is replaced by the CPU without an error.
        if device == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit(
                "ONNX Runtime could not use CUDA after all; `dinokit doctor` says what is missing"
            )

        (length,) = [o.shape[1] for o in self.session.get_outputs() if o.name == OUTPUT]
        place = ort.OrtValue.ortvalue_from_shape_and_type
        self.input = place(list(shape), np.float32, device, 0)
        self.output = place([batch, length], np.float32, device, 0)
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_input(INPUT, self.input)
        self.binding.bind_ortvalue_output(OUTPUT, self.output)
        self.run(np.zeros(shape, np.float32))  # loads kernels, and records the graph

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, C, H, W) to (B, D)."""
        self.input.update_inplace(pixels)
        self.session.run_with_iobinding(self.binding)
        vectors: NDArray[np.float32] = self.output.numpy()  # waits for the device, and copies
        return vectors.copy()


def starter(precision: str) -> tuple[bytes, Preprocessing]:
    """The bundled model as `dinokit export starter --target ort-cuda --image-size …` writes it, without the proof."""
    from dinokit.export.variants import Variant, build
    from dinokit.vit_graph import build_vit_graph

    model = locate("starter")
    assert model.load_weights is not None
    preprocessing = model.config.preprocessing
    graph = build_vit_graph(model.config.vit, model.load_weights())
    variant = Variant(precision, "ort-cuda", preprocessing.crop_px)
    made = build(variant, graph, model.config, preprocessing, model.weights_sha256)
    return made.SerializeToString(), preprocessing


def batches(
    paths: list[Path], preprocessing: Preprocessing, batch: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """How many photographs, and their pixels; the last batch is filled up with zeros."""
    for start in range(0, len(paths), batch):
        opened = (open_picture(path, preprocessing.channels) for path in paths[start : start + batch])
        crops = np.stack([preprocessing.crop(picture) for picture in opened])
        pixels = np.zeros((batch, preprocessing.channels, *preprocessing.crop_px), np.float32)
        pixels[: len(crops)] = preprocessing.normalise(crops)
        yield len(crops), pixels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="an .onnx file of `dinokit export`; by default the starter")
    parser.add_argument("photos", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("-b", "--batch", type=int, default=8)
    parser.add_argument("-n", "--rounds", type=int, default=20, help="batches to measure with")
    parser.add_argument("-o", "--output", type=Path, default=Path("vectors.npy"))
    args = parser.parse_args()

    device = "cuda" if cuda_loads() else "cpu"
    if args.model is None:
        precision = "fp16" if device == "cuda" else "fp32"  # a CPU computes float16 in float32, only slower
        model, preprocessing = starter(precision)
    else:
        contract = contract_of(Path(args.model))
        if contract.get("target") == "embedder":
            parser.error("an embedder takes bytes; name a model_….onnx, best one of --target ort-cuda")
        model, precision = args.model, contract.get("precision", "fp32")
        preprocessing = Preprocessing.from_json(contract["preprocessing"])
    network = FixedBatches(model, (args.batch, preprocessing.channels, *preprocessing.crop_px), device)
    print(f"{precision} on {device}" + ("" if device == "cuda" else ": no usable GPU here, so no CUDA graph"))

    paths = find_images(args.photos)
    vectors, pixels = [], np.zeros(0, np.float32)
    for count, pixels in batches(paths, preprocessing, args.batch):
        vectors.append(network.run(pixels)[:count])
    np.save(args.output, np.concatenate(vectors))
    print(f"{len(paths)} vectors are in {args.output}")

    start = time.perf_counter()
    for _ in range(args.rounds):
        network.run(pixels)  # with the copies to the device and back
    rate = args.rounds * args.batch / (time.perf_counter() - start)
    height, width = preprocessing.crop_px
    print(f"{rate:.0f} images/s of {height}x{width} pixels, {args.batch} a batch, without reading the files")


if __name__ == "__main__":
    main()
