"""Deploy a classifier with ONNX Runtime and Pillow alone: neither dinokit nor torch where it runs.

    python examples/deploy_classifier.py                                    fits one on crops of the example photographs
    dinokit fit labelled/ -m dino_vits16 -o kinds.onnx --target embedder
    python examples/deploy_classifier.py kinds.onnx my/photos

The file's metadata hold its preprocessing and the names of its classes; its input is a uint8 crop. Fitting one here
needs dinokit and scikit-learn; a service needs only `classify` below.

Prints path, label and probability of each photograph, and on stderr the reason why one cannot be read. In a folder, all
files with a suffix that Pillow reads count as photographs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, ImageOps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "classifier", nargs="?", type=Path, help="a file written by dinokit fit --target embedder"
    )
    parser.add_argument(
        "photos", nargs="?", type=Path, help="a photograph or a folder of photographs to label"
    )
    args = parser.parse_args()
    if args.classifier is not None and args.photos is None:
        parser.error("the photographs to label are missing; name them after the classifier")

    with tempfile.TemporaryDirectory() as made:
        if args.classifier is None:
            args.classifier, args.photos = fit(Path(made))
        paths = [args.photos] if args.photos.is_file() else photographs_in(args.photos)
        if not paths:
            parser.error(
                f"no photographs found in {args.photos}; name a photograph or a folder of photographs"
            )
        folder = args.photos if args.photos.is_dir() else args.photos.parent
        for path, label, probability in classify(args.classifier, paths):
            print(f"{path.relative_to(folder)}  {label}  {probability:.2f}")


def photographs_in(folder: Path) -> list[Path]:
    """The files with a suffix that Pillow reads, also in subfolders."""
    suffixes = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


def classify(file: Path, paths: Sequence[Path], batch: int = 32) -> Iterator[tuple[Path, str, float]]:
    """Each photograph that can be read, its most probable label, and the probability."""
    try:
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes have no other base
        raise SystemExit(
            f"{file} cannot be loaded; name a file of dinokit fit --target embedder. {error}"
        ) from error
    metadata = session.get_modelmeta().custom_metadata_map
    if "dinokit_classifier" not in metadata:
        raise SystemExit(f"{file} is not a classifier; write one with: dinokit fit … --target embedder")
    if session.get_inputs()[0].name != "image":
        raise SystemExit(f"{file} does not take uint8 crops; write it with: dinokit fit … --target embedder")
    classes = json.loads(metadata["dinokit_classifier"])["classes"]
    preprocessing = json.loads(metadata["dinokit"])["preprocessing"]
    for start in range(0, len(paths), batch):
        crops: dict[Path, NDArray[np.uint8]] = {}
        for path in paths[start : start + batch]:
            try:
                crops[path] = crop(path, preprocessing)
            except (
                OSError,
                SyntaxError,
                ValueError,
                Image.DecompressionBombError,
            ) as error:  # all that Pillow raises
                print(f"{path} cannot be read: {error}", file=sys.stderr)
        if crops:
            (probabilities,) = session.run(["probabilities"], {"image": np.stack(list(crops.values()))})
            for path, row in zip(crops, probabilities, strict=True):
                yield path, classes[row.argmax()], float(row.max())


def crop(path: Path, preprocessing: dict[str, Any]) -> NDArray[np.uint8]:
    """(H, W, C) uint8: upright, resized and cropped by the file's preprocessing."""
    image = upright(path, channels=len(preprocessing["mean"]))
    height, width = preprocessing["crop_px"]
    resize = preprocessing["resize_px"]  # of the short side, or (height, width)
    if isinstance(resize, int):
        short = min(image.size)
        new_width, new_height = (max(resize, int(resize * side / short)) for side in image.size)
    else:
        new_height, new_width = resize
    left, top = round((new_width - width) / 2), round((new_height - height) / 2)
    how = Image.Resampling[preprocessing["interpolation"].upper()]
    resized = image.resize((new_width, new_height), how).crop((left, top, left + width, top + height))
    return np.asarray(resized).reshape(height, width, -1)  # Pillow's grey pictures have no channel axis


def upright(path: Path, channels: int) -> Image.Image:
    """Opens a picture in grey or RGB as dinokit does: 16 bits become 8, transparent pixels are laid over white."""
    if channels not in (1, 3):
        raise SystemExit(
            f"this classifier needs pictures of {channels} channels; this script reads 1 or 3. Use dinokit classify"
        )
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image.convert("L") if channels == 1 else image


def fit(work: Path) -> tuple[Path, Path]:
    """Fits a classifier on crops of the example photographs. Returns its file and a folder of other crops."""
    from crops import write_crops

    from dinokit import LinearClassifier, load_backbone
    from dinokit.classifiers.labelled import find_labelled
    from dinokit.export import export_classifier

    labelled, new = write_crops(work, per_class=4)
    examples = find_labelled(labelled)
    head = LinearClassifier().fit(load_backbone("starter").embed(examples.paths), examples.labels)
    file = export_classifier("starter", head, work / "kinds.onnx", target="embedder").files[0]
    return file, new


if __name__ == "__main__":
    main()
