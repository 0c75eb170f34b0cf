"""Labelled pictures that even a random network tells apart: one colour a class."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from small_models import picture

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}


def tinted(colour: str, seed: int) -> Image.Image:
    """A picture of mostly one colour, another for each seed."""
    return Image.blend(picture(60, 50, seed=seed), Image.new("RGB", (60, 50), COLOURS[colour]), 0.85)


def write_tinted(per_class: int) -> None:
    """``ref/COLOUR/0.png`` … and ``new/COLOUR.png``, in the current folder."""
    Path("new").mkdir()
    for number, colour in enumerate(COLOURS):
        folder = Path("ref") / colour
        folder.mkdir(parents=True)
        for i in range(per_class):
            tinted(colour, 10 * number + i).save(folder / f"{i}.png")
        tinted(colour, 100 + number).save(f"new/{colour}.png")
