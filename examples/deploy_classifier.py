"""Deploy a classifier with ONNX Runtime and Pillow alone: neither dinokit nor torch where it runs.

    python examples/deploy_classifier.py                                    fits one on crops of the example photographs
    dinokit fit labelled/ -m dino_vits16 -o kinds.onnx --target embedder
    python examples/deploy_classifier.py kinds.onnx my/photos

The file says of itself how pictures are resized and what its classes are called; it takes the crop as bytes. To fit one
here, dinokit and scikit-learn are needed; `classify` below is all that a service needs.

Prints path, label and probability of each photograph.
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("classifier", nargs="?", type=Path, help="a file of dinokit fit --target embedder")
    parser.add_argument("photos", nargs="?", type=Path, help="a folder of photographs to label")
    args = parser.parse_args()
    if args.classifier is not None and args.photos is None:
        parser.error("name the photographs to label too")

    with tempfile.TemporaryDirectory() as made:
        if args.classifier is None:
            args.classifier, args.photos = fit(Path(made))
        suffixes = (".jpg", ".jpeg", ".png", ".webp")
        paths = sorted(path for path in args.photos.rglob("*") if path.suffix.lower() in suffixes)
        for path, (label, probability) in zip(paths, classify(args.classifier, paths), strict=True):
            print(f"{path.relative_to(args.photos)}  {label}  {probability:.2f}")


def classify(file: Path, paths: Sequence[Path], batch: int = 32) -> Iterator[tuple[str, float]]:
    """The most probable label of each photograph, and its probability."""
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    if session.get_inputs()[0].name != "image":
        raise SystemExit(f"{file} takes no crops; write it with: dinokit fit … --target embedder")
    told = session.get_modelmeta().custom_metadata_map
    classes = json.loads(told["dinokit_classifier"])["classes"]
    preprocessing = json.loads(told["dinokit"])["preprocessing"]
    for start in range(0, len(paths), batch):
        crops = np.stack([crop(path, preprocessing) for path in paths[start : start + batch]])
        (probabilities,) = session.run(["probabilities"], {"image": crops})
        for row in probabilities:
            yield classes[row.argmax()], float(row.max())


def crop(path: Path, preprocessing: dict[str, Any]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: upright, resized and cropped as the file says."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    height, width = preprocessing["crop_px"]
    resize = preprocessing["resize_px"]  # of the short side, or (height, width)
    if isinstance(resize, int):
        short = min(image.size)
        new_width, new_height = (max(resize, int(resize * side / short)) for side in image.size)
    else:
        new_height, new_width = resize
    left, top = round((new_width - width) / 2), round((new_height - height) / 2)
    how = Image.Resampling[preprocessing["interpolation"].upper()]
    return np.asarray(
        image.resize((new_width, new_height), how).crop((left, top, left + width, top + height))
    )


def fit(work: Path) -> tuple[Path, Path]:
    """A classifier of crops of the example photographs, and other crops of these. Needs dinokit."""
    from crops import write_crops

    from dinokit import LinearClassifier, load_backbone
    from dinokit.export import export_classifier
    from dinokit.labelled import find_labelled

    labelled, new = write_crops(work, per_class=4)
    examples = find_labelled(labelled)
    head = LinearClassifier().fit(load_backbone("starter").embed(examples.paths), examples.labels)
    file = export_classifier("starter", head, work / "kinds.onnx", target="embedder").files[0]
    return file, new


if __name__ == "__main__":
    main()
