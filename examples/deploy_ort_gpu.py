"""Deploy on a GPU with ONNX Runtime alone: float16, fixed buffers on the device (IO binding), a CUDA graph, no torch.

    python examples/deploy_ort_gpu.py                     exports the starter (dinokit[train]); the example photographs
    dinokit export dino_vits16 -o vits16 --target ort-cuda --image-size 224
    python examples/deploy_ort_gpu.py vits16/onnx/model_cuda_fp16_224x224.onnx my/photos -o vectors.npy

dinokit only reads, crops and normalises the pictures; the rest is what a service in any language would do. Without a
usable GPU it runs on the CPU and says so. Its authors had no GPU to measure on.

Prints how many images/s the network processes, and writes the vectors (N, D) float32 in the order of the photographs;
the rows of unreadable ones are NaN.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dinokit import Backbone, load_backbone
from dinokit.errors import ImageError, MissingExtraError
from dinokit.pictures.image_files import find_images

INPUT, OUTPUT = "pixel_values", "pooler_output"  # normalised pictures (B, C, H, W) to vectors (B, D)


class FixedBatches:
    """A session whose input and output buffers stay in place on the device, so that a CUDA graph can be replayed.

    A CUDA graph records all kernels of one run; replaying it costs one launch instead of hundreds. Its shapes and
    addresses must never change: hence one batch size, and buffers that are reused.
    """

    def __init__(self, model: Path, shape: tuple[int, int, int, int], device: str) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # The graph takes any batch size; with fixed sizes, ONNX Runtime computes all shapes once.
        batch, _, height, width = shape
        for name, value in (("batch", batch), ("height", height), ("width", width)):
            options.add_free_dimension_override_by_name(name, value)
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": 0, "enable_cuda_graph": 1}))
        self.session = ort.InferenceSession(str(model), options, providers=providers, enable_fallback=0)
        # ONNX Runtime silently replaces a provider that fails to load by the CPU.
        if device == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit(
                "ONNX Runtime could not use CUDA for this file; run `dinokit doctor` to see what is missing"
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


def export_starter(folder: Path) -> Path:
    """The file that `dinokit export starter --target ort-cuda --image-size …` writes. Needs dinokit[train]."""
    from dinokit.export import export_folder

    starter = load_backbone("starter")
    precision = "fp16" if starter.device.startswith("cuda") else "fp32"  # a CPU computes float16 in float32
    try:
        report = export_folder(
            "starter", folder, target="ort-cuda", precision=precision, image_size=starter.image_size
        )
    except MissingExtraError as error:
        raise SystemExit(
            f"{error}\nOr name a file that was exported elsewhere: deploy_ort_gpu.py model.onnx"
        ) from None
    return folder / report.variants[0].file


def read_batch(paths: list[Path], backbone: Backbone, pixels: NDArray[np.float32]) -> list[int]:
    """Fills ``pixels`` with the network's inputs, and returns the positions of the photographs that can be read."""
    readable = []
    for i, path in enumerate(paths):
        try:
            pixels[i] = backbone.transform(path)  # (C, H, W): cropped and normalised
            readable.append(i)
        except ImageError as error:
            print(error)
    return readable


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", type=Path, help="an .onnx file of `dinokit export`; by default the starter"
    )
    parser.add_argument("photos", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("-b", "--batch", type=int, default=8)
    parser.add_argument("-n", "--rounds", type=int, default=20, help="batches to measure with")
    parser.add_argument("-o", "--output", type=Path, default=Path("vectors.npy"))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as made:
        model = args.model or export_starter(Path(made) / "starter")
        backbone = load_backbone(model)  # for its preprocessing, and to learn whether CUDA works here
        device = "cuda" if backbone.device.startswith("cuda") else "cpu"
        height, width = backbone.image_size
        pixels = np.zeros((args.batch, backbone.preprocessing.channels, height, width), np.float32)
        network = FixedBatches(model, pixels.shape, device)
    without = "" if device == "cuda" else ": no usable GPU here, so no CUDA graph"
    print(f"{backbone.precision} on {device}{without}")

    paths = find_images(args.photos)
    vectors = np.full((len(paths), backbone.embed_dim), np.nan, np.float32)
    for start in range(0, len(paths), args.batch):
        readable = read_batch(paths[start : start + args.batch], backbone, pixels)
        vectors[start + np.array(readable, int)] = network.run(pixels)[readable]
    np.save(args.output, vectors)
    print(f"{np.isfinite(vectors).all(axis=1).sum()} vectors are in {args.output}")

    start = time.perf_counter()
    for _ in range(args.rounds):
        network.run(pixels)  # with the copies to the device and back
    rate = args.rounds * args.batch / (time.perf_counter() - start)
    print(
        f"{rate:.0f} images/s of {height}x{width} pixels, {args.batch} per batch, without reading the files"
    )


if __name__ == "__main__":
    main()
