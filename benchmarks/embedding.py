"""From the shell to vectors: `dinokit embed` beside timm, transformers and fastembed, whole processes.

    python benchmarks/embedding.py -o benchmarks/results/embedding_cpu.json

The same network, weights, photographs and number of threads, float32 on the CPU; the others' scripts stand in
`benchmarks/embedding_scripts/`. Two models: the starter (ViT-Ti/16, 96 px), and a ViT-S/16 of random weights (224 px).
The pictures are cut from `examples/photos` by a seed. Measured are one picture, where starting counts, and a folder of
them: with timm decoded by as many workers as threads, with transformers and fastembed batch after batch. The ways take
turns, so that a busy machine slows all alike, and each begins with a run that is not counted. Ratios are way / dinokit,
of the medians: above 1, dinokit takes less. All vectors must agree. On two idle cores it takes about four minutes.

fastembed is measured where it is installed; dinokit needs it for nothing. It is given the ONNX graph that dinokit
writes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import provenance
from fresh_process import Usage, run_python
from numpy.typing import NDArray
from PIL import Image

from dinokit import __version__
from dinokit.loading.locate import Located, locate, starter_path
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.config import TIMM_FILE, BackboneConfig, timm_arguments
from dinokit.model_folder.folder import CONFIG_FILE, write_model_folder
from dinokit.model_folder.weights import expected_shapes
from dinokit.pictures.preprocess import Preprocessing
from dinokit.vit_graph import build_vit_graph

HERE = Path(__file__).parent
PHOTOS = HERE.parent / "examples" / "photos"
# Both resizes give even margins: transformers cuts odd ones a pixel earlier than torchvision.
SIZE = (1680, 1200)
LEAST_COSINE = 0.999
WAYS = ("dinokit", "timm", "transformers", "fastembed")
PACKAGES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", *WAYS[1:])


# -- what is embedded, by which network


def write_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of two megapixels, each another part of a photograph."""
    rng = np.random.default_rng(0)
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    folder.mkdir()
    paths = [folder / f"{index:04}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        photo = photos[index % len(photos)]
        share = rng.uniform(0.5, 1)  # of the largest part with these sides
        width = share * min(photo.width, photo.height * SIZE[0] / SIZE[1])
        height = width * SIZE[1] / SIZE[0]
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        photo.resize(SIZE, Image.Resampling.BICUBIC, box=box).save(path, quality=90)
    return paths


def write_vit_small(folder: Path) -> Path:
    """A ViT-S/16 of random weights, of a size that lets every part matter."""
    vit = VitArchitecture(embed_dim=384, depth=12, num_heads=6, patch_size=16, image_size=(224, 224))
    shapes = expected_shapes(vit)
    assert shapes is not None
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in shapes.items():
        spread = 0.5 if len(shape) == 1 else 1.5 / np.sqrt(np.prod(shape[1:]))
        middle = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")) else 0.0
        weights[name] = rng.normal(middle, spread, shape).astype(np.float32)
    architecture, model_args = timm_arguments(vit)
    config = BackboneConfig(
        name="vit_small_random",
        architecture=vit,
        timm_architecture=architecture,
        model_args=model_args,
        preprocessing=Preprocessing(resize_px=256, crop_px=(224, 224)),
        source="benchmarks/embedding.py",
    )
    write_model_folder(folder, config, weights)
    return folder


def write_for_timm(folder: Path, model: Path) -> Path:
    """The folder as timm reads one from a disk: its own names in `model.safetensors`."""
    folder.mkdir()
    shutil.copyfile(model / CONFIG_FILE, folder / CONFIG_FILE)
    shutil.copyfile(model / TIMM_FILE, folder / "model.safetensors")
    return folder


def write_for_fastembed(folder: Path, located: Located) -> Path:
    """What fastembed reads: a graph whose first output is the embedding, and a processor that it knows the name of."""
    assert located.load_weights is not None
    graph = build_vit_graph(located.config.vit, located.load_weights())
    others = [output for output in graph.graph.output if output.name != "pooler_output"]
    for output in others:
        graph.graph.output.remove(output)
    folder.mkdir()
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    processor = located.config.preprocessing.to_processor_config()
    processor["image_processor_type"] = "CLIPImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


# -- how it is measured


def environment(threads: int) -> dict[str, str]:
    """Of all processes: as many threads for each, nothing from a network, compiled modules kept as usual."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def command(way: str, model: Path, output: Path, pictures: list[Path]) -> list[str]:
    if way == "dinokit":
        named = pictures[0] if len(pictures) == 1 else pictures[0].parent
        options = ["-m", str(model), "-o", str(output), "--device", "cpu"]
        return ["-m", "dinokit", "embed", str(named), *options]
    return [str(HERE / "embedding_scripts" / f"with_{way}.py"), str(model), str(output), *map(str, pictures)]


def measure(
    models: dict[str, Path], pictures: list[Path], work: Path, rounds: int, threads: int
) -> tuple[dict[str, dict[str, Any]], float]:
    """Of each way the medians over ``rounds``; and the least cosine of its vectors and dinokit's."""
    runs: dict[str, list[Usage]] = {way: [] for way in models}
    vectors: dict[str, NDArray[np.float32]] = {}
    for index in range(rounds):
        for way, model in models.items():
            output = work / f"{way}-{len(pictures)}-{index}.npy"
            runs[way].append(run_python(command(way, model, output, pictures), environment(threads)))
            vectors[way] = np.load(output)
    results = {}
    for way, counted in runs.items():
        medians = Usage(*map(statistics.median, zip(*counted, strict=True)))
        results[way] = {name: round(value, 3) for name, value in medians._asdict().items()}
        results[way]["images_per_second"] = round(len(pictures) / medians.seconds, 2)
    for row in results.values():
        row["ratios"] = {name: round(row[name] / results["dinokit"][name], 2) for name in Usage._fields}
    return results, min(least_cosine(vectors["dinokit"], other) for other in vectors.values())


def least_cosine(ours: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Over the pictures. Of several, the mean is taken off, so that they are far apart: only equal ones agree."""
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (ours, others)]
    if len(ours) > 1:
        centred = [vectors - unit[0].mean(axis=0) for vectors in unit]
        unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in centred]
    return float((unit[0] * unit[1]).sum(axis=1).min())


# -- what is written


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "dinokit": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def print_table(title: str, rows: dict[str, dict[str, Any]], cosine: float) -> None:
    print(f"\n{title}: vectors agree to a cosine of {cosine:.6f}")
    titles = f"{'seconds':>9}{'ratio':>8}{'images/s':>10}{'processor s':>13}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}"
    print(f"{'':14}{titles}")
    for way, row in rows.items():
        time, processor, memory = row["ratios"].values()
        print(
            f"{way:14}{row['seconds']:9.2f}{time:8.2f}{row['images_per_second']:10.1f}"
            f"{row['processor_seconds']:13.2f}{processor:8.2f}{row['peak_mib']:10.0f}{memory:8.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=128, help="pictures in the folder")
    parser.add_argument("--rounds", type=int, default=3, help="of one picture")
    parser.add_argument("--folder-rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    args = parser.parse_args()

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ways = [way for way in WAYS if importlib.util.find_spec(way) is not None]
    for way in WAYS:
        if way not in ways:
            print(f"{way} is not installed and left out")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="dinokit-embedding-") as name:
        work = Path(name)
        pictures = write_pictures(work / "pictures", args.count)
        one = write_pictures(work / "one", 1)
        folders = {
            "starter, ViT-Ti/16 at 96 px": starter_path(),
            "ViT-S/16 at 224 px": write_vit_small(work / "vit_small"),
        }
        for index, (title, folder) in enumerate(folders.items()):
            models = dict.fromkeys(ways, folder)
            if "timm" in models:
                models["timm"] = write_for_timm(work / f"timm-{index}", folder)
            if "fastembed" in models:
                models["fastembed"] = write_for_fastembed(work / f"fastembed-{index}", locate(folder))
            for way, model in models.items():  # not counted: it compiles modules and warms the disk's cache
                run_python(command(way, model, work / f"{way}.npy", one), environment(threads))
            for what, paths, rounds in (
                ("one picture", one, args.rounds),
                (f"{args.count} pictures", pictures, args.folder_rounds),
            ):
                rows, cosine = measure(models, paths, work, rounds, threads)
                for path in work.glob("*.npy*"):
                    path.unlink()
                if cosine < LEAST_COSINE:
                    raise SystemExit(f"{title}, {what}: the vectors do not agree, a cosine is {cosine:.6f}")
                print_table(f"{title}, {what}", rows, cosine)
                results[f"{title}, {what}"] = {"ways": rows, "least_cosine": round(cosine, 6)}
    report = {
        "command": provenance.command(),
        "versions": versions(),
        "platform": platform.platform(),
        "processor": processor(),
        "threads": threads,
        "picture_px": SIZE,
        "rounds": {"one picture": args.rounds, f"{args.count} pictures": args.folder_rounds},
        "results": results,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, as Linux gives it; elsewhere what Python knows."""
    if file.is_file():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
