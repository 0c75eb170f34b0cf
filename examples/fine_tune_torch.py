"""Fine-tune a backbone on labelled photographs with plain torch.

    python examples/fine_tune_torch.py                                      crops of the example photographs
    python examples/fine_tune_torch.py train/ test/ -m dino_vits16 --steps 500 --device cuda -o tuned/

Needs torch (pip install 'dinokit[train]'). `backbone.module` is an ordinary timm module and `backbone.transform` its
preprocessing; the rest is an ordinary training loop. The tuned backbone is written as a model folder, which dinokit
(`load_backbone("tuned")`, even without torch), timm and transformers load.

Prints the loss at the first and the last step, and the accuracy on the test set before training (k-NN on the
pretrained features) and after it (the trained head). Unreadable photographs are listed with the reason and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from crops import write_crops
from labelled_photos import read_labelled
from torch import nn

from dinokit import Backbone, KNNClassifier, load_backbone
from dinokit.model_folder.folder import write_model_folder


class Photos(torch.utils.data.Dataset[tuple[np.ndarray, int]]):
    """Preprocessed photographs, and their labels as numbers: positions in ``classes``, by default the folder's own."""

    def __init__(self, folder: Path, backbone: Backbone, classes: Sequence[str] | None = None) -> None:
        found = read_labelled(folder)
        self.classes = classes or sorted(set(found.labels))
        unknown = sorted(set(found.labels).difference(self.classes))
        if unknown:
            raise SystemExit(
                f"{folder} has classes that the training set lacks: {', '.join(unknown)}; add photographs of them to "
                "the training set, or leave them out of the test set"
            )
        self.codes = np.array([self.classes.index(label) for label in found.labels])
        self.paths, self.transform = found.paths, backbone.transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.transform(self.paths[index]), int(self.codes[index])  # (3, H, W) float32


def train(backbone: Backbone, photos: Photos, steps: int, device: str) -> nn.Module:
    """A network of backbone and linear head, both trained: the backbone gently, the head from scratch."""
    head = nn.Linear(backbone.embed_dim, len(photos.classes)).to(device)
    network = nn.Sequential(backbone.module, head).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": backbone.module.parameters(), "lr": 1e-4},
            {"params": head.parameters(), "lr": 1e-2},
        ],
        weight_decay=0.05,
    )
    loader = torch.utils.data.DataLoader(photos, batch_size=16, shuffle=True, drop_last=len(photos) >= 16)
    step = 0
    while step < steps:
        for pixels, labels in loader:
            loss = nn.functional.cross_entropy(network(pixels.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step in (1, steps):
                print(f"step {step}: loss {loss.item():.3f}")
            if step == steps:
                break
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, photos: Photos, device: str) -> float:
    loader = torch.utils.data.DataLoader(photos, batch_size=32)
    right = [(network(pixels.to(device)).argmax(1).cpu() == labels).float() for pixels, labels in loader]
    return float(torch.cat(right).mean())


def save(backbone: Backbone, folder: Path) -> None:
    """Writes the tuned backbone as a model folder that records its origin. dinokit names weights as timm does."""
    config = dataclasses.replace(
        backbone.config, name=folder.name, source=f"fine-tuned from {backbone.name} ({backbone.source})"
    )
    weights = {name: tensor.float().cpu().numpy() for name, tensor in backbone.module.state_dict().items()}
    write_model_folder(folder, config, weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", nargs="?", type=Path, help="a folder with one subfolder per class")
    parser.add_argument(
        "test", nargs="?", type=Path, help="the same for testing, with classes of the training set"
    )
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("-o", "--output", type=Path, default=Path("tuned"), help="a new or empty folder")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.train is not None and args.test is None:
        parser.error("the test set is missing; name it after the training set")
    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        parser.error(f"{args.output} exists and is not an empty folder; name another one with -o")
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as made:
        if args.train is None:
            args.train, args.test = write_crops(Path(made))
        backbone = load_backbone(args.model, engine="torch", device=args.device)
        seen = Photos(args.train, backbone)
        new = Photos(args.test, backbone, seen.classes)
        knn = KNNClassifier().fit(backbone.embed(seen.paths), seen.codes)
        print(f"before: {100 * knn.score(backbone.embed(new.paths), new.codes):.1f} % by k-NN")
        network = train(backbone, seen, args.steps, args.device)
        print(f"after:  {100 * accuracy(network, new, args.device):.1f} % by the head")
        save(backbone, args.output)
        print(f"the tuned backbone is in {args.output}")


if __name__ == "__main__":
    main()
