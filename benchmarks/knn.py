"""k-NN top-1 of a model on labelled sets, beside raw pixels, oriented gradients and the same network untrained.

    python benchmarks/knn.py --data DATA -m starter --sets imagenette224 clothing tiny-imagenet100 cifar10 \\
        -o benchmarks/results/knn_starter.json

The protocol is the paper's: k = 20, T = 0.07, the training split is the reference, the model folder's own
preprocessing. Raw pixels are the 16x16 picture (Pillow bicubic) less its own mean, the same k-NN. Oriented gradients
(HOG) are those that `--distill-from hog` teaches, of the whole picture at 96x96 in grey, less their own mean. The
untrained network has the model's architecture and fresh weights (seed 0). The last two need [train], and are left out
without it.

Beside each of them stand the queries that only the model gets right and that only the other does, and how likely so
uneven a split is by chance, both ways (exact McNemar test): few queries tell more when they are compared in pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from labelled import SETS, decode, read_split
from numpy.typing import NDArray
from PIL import Image
from provenance import command

from dinokit import Backbone, KNNClassifier, __version__, load_backbone
from dinokit.classifiers.evaluation import compare
from dinokit.model_folder.architecture import VitArchitecture

Embed = Callable[[list[Image.Image]], NDArray[np.float32]]


def raw_pixels(images: list[Image.Image]) -> NDArray[np.float32]:
    """(N, 768): the whole picture at 16x16, less its own mean; what any features must beat."""
    small = [np.asarray(im.resize((16, 16), Image.Resampling.BICUBIC), np.float32) for im in images]
    flat = np.stack(small).reshape(len(images), -1) / 255
    return flat - flat.mean(axis=1, keepdims=True)


def gradients() -> Embed | None:
    """(N, 900) of a list of pictures, None without torch."""
    try:
        import torch

        from dinokit.training.distillation.oriented_gradients import oriented_gradients
    except ImportError:
        return None

    def embed(images: list[Image.Image]) -> NDArray[np.float32]:
        grey = [im.convert("L").resize((96, 96), Image.Resampling.BICUBIC) for im in images]
        pixels = np.stack([np.asarray(im, np.float32) for im in grey]) / 255
        found: NDArray[np.float32] = oriented_gradients(torch.from_numpy(pixels)).numpy()
        return found - found.mean(axis=1, keepdims=True)

    return embed


def untrained(backbone: Backbone) -> Backbone | None:
    """The same network with fresh weights, None without torch and for networks that are not Vision Transformers."""
    try:
        import torch
        from torch import nn

        from dinokit.runtime.torch import create_vit
    except ImportError:
        return None
    from dinokit.runtime.torch import TorchEngine

    config = backbone.config
    if not isinstance(config.architecture, VitArchitecture):
        return None
    torch.manual_seed(0)
    module = create_vit(config.timm_architecture, config.model_args, config.vit.pos_embed_resize)
    nn.init.trunc_normal_(module.cls_token, std=0.02)
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    engine = TorchEngine(config, weights, device="cpu")
    return Backbone(
        config, engine, weights_sha256="", source="untrained", preprocessing=backbone.preprocessing
    )


def paired(model: NDArray[np.bool_], other: NDArray[np.bool_]) -> dict[str, float]:
    """:func:`dinokit.classifiers.evaluation.compare`, rounded."""
    found = compare(model, other)
    return {"only_model": found.only_first, "only_other": found.only_second, "p": float(f"{found.p:.2g}")}


def embed_all(embed: Embed, pictures: list[bytes], chunk: int = 256) -> NDArray[np.float32]:
    """Decodes and embeds a chunk at a time."""
    parts = [
        embed([decode(p) for p in pictures[start : start + chunk]])
        for start in range(0, len(pictures), chunk)
    ]
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["imagenette224", "clothing"])
    parser.add_argument(
        "--model-only", action="store_true", help="leave out raw pixels, gradients and the untrained network"
    )
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    backbone = load_backbone(args.model)
    ways: dict[str, Embed] = {"model": backbone.embed}
    if not args.model_only:
        ways["raw 16x16 pixels"] = raw_pixels
        if (edges := gradients()) is not None:
            ways["oriented gradients"] = edges
        fresh = untrained(backbone)
        if fresh is not None:
            ways["untrained"] = fresh.embed
    results = []
    for name in args.sets:
        (references, labels), (queries, truth) = (read_split(args.data, pattern) for pattern in SETS[name])
        judged: dict[str, NDArray[np.bool_]] = {}
        for way, embed in ways.items():
            began = time.perf_counter()
            knn = KNNClassifier(k=20, temperature=0.07).fit(embed_all(embed, references), labels)
            right = knn.predict(embed_all(embed, queries)) == np.array(truth)
            top1 = 100 * float(right.mean())
            seconds = time.perf_counter() - began
            judged[way] = right
            beside = {} if way == "model" else paired(judged["model"], right)
            results.append(
                {
                    "set": name,
                    "features": way,
                    "top1": round(top1, 2),
                    "references": len(references),
                    **beside,
                }
            )
            told = "".join(f", {key} {value}" for key, value in beside.items())
            print(
                f"{name:<18}{way:<20}{top1:6.2f} %   {len(references)} references, {seconds:.0f} s{told}",
                flush=True,
            )
    if args.output:
        report = {
            "command": command(args.data),
            "protocol": "k=20, T=0.07",
            "dinokit": __version__,
            "model": backbone.name,
            "weights_sha256": backbone.weights_sha256,
            "image_size": list(backbone.image_size),
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
