"""Code that loads a model of n channels. No library reads such pictures, so the code prepares the pixels itself.

Each reads ``picture.npy`` and ends with ``vector``, as those of ``snippets.py`` do.
"""

from __future__ import annotations

from collections.abc import Iterator

from dinokit.card.facts import CardFacts
from dinokit.pictures.preprocess import Preprocessing

__all__ = ["band_snippets"]

_READ_BY_HAND = """\
# (H, W, {channels}) uint8, or float32 on the same scale of 0…255: uint16 / 257, floats in 0…1 * 255.
picture = np.load("picture.npy")
"""


def band_snippets(facts: CardFacts) -> Iterator[tuple[str, str, str]]:
    """(title, language, code) for each loader that gives this model's own numbers."""
    prepare = facts.config.preprocessing
    yield "dinokit", "python", _dinokit(facts)
    if facts.for_timm:
        yield "timm", "python", _timm(facts, prepare)
    if facts.for_transformers:
        yield "transformers", "python", _transformers(facts, prepare)
    if facts.for_onnxruntime:
        yield "ONNX Runtime", "python", _onnxruntime(facts, prepare)


def _dinokit(facts: CardFacts) -> str:
    dim, channels = facts.config.embed_dim, facts.config.preprocessing.channels
    return f'''\
from dinokit import load_backbone

backbone = load_backbone("{facts.repo}")
# .npy or TIFF of {channels} channels (uint8, uint16, floats in 0…1), or such an array; a folder gives (N, {dim})
vector = backbone.embed("picture.npy")  # ({dim},) float32
'''


def _timm(facts: CardFacts, prepare: Preprocessing) -> str:
    return f"""\
import numpy as np
import timm
import torch
from PIL import Image

{_pixels(prepare)}
model = timm.create_model("hf-hub:{facts.repo}", pretrained=True).eval()
with torch.inference_mode():
    vector = model(torch.from_numpy(pixels))[0]
"""


def _transformers(facts: CardFacts, prepare: Preprocessing) -> str:
    return f"""\
import numpy as np
import torch
from PIL import Image
from transformers import AutoModel

{_pixels(prepare)}
model = AutoModel.from_pretrained("{facts.repo}")
with torch.inference_mode():
    vector = model(pixel_values=torch.from_numpy(pixels)).pooler_output[0]
"""


def _onnxruntime(facts: CardFacts, prepare: Preprocessing) -> str:
    return f"""\
import numpy as np
import onnxruntime
from huggingface_hub import hf_hub_download
from PIL import Image

{_pixels(prepare)}
session = onnxruntime.InferenceSession(hf_hub_download("{facts.repo}", "onnx/model.onnx"))
vector = session.run(["pooler_output"], {{"pixel_values": pixels}})[0][0]
"""


def _pixels(prepare: Preprocessing) -> str:
    """From picture.npy to ``pixels``, (1, C, H, W) float32: each channel resized as Pillow resizes a grey picture."""
    height, width = prepare.crop_px
    kind = f"Image.Resampling.{prepare.interpolation.upper()}"
    if isinstance(prepare.resize_px, tuple):
        size = f"size = {prepare.resize_px[1]}, {prepare.resize_px[0]}"
    else:
        size = f"""\
height, width = picture.shape[:2]
size = tuple({prepare.resize_px} * side // min(height, width) for side in (width, height))"""
    return f"""\
{_READ_BY_HAND.format(channels=prepare.channels)}{size}
bands = [Image.fromarray(band).resize(size, {kind}) for band in picture.transpose(2, 0, 1).copy()]
left, top = round((size[0] - {width}) / 2), round((size[1] - {height}) / 2)
crops = [np.asarray(band.crop((left, top, left + {width}, top + {height})), np.float32) for band in bands]
mean, std = np.float32({list(prepare.mean)}), np.float32({list(prepare.std)})
pixels = ((np.stack(crops) / 255 - mean[:, None, None]) / std[:, None, None])[None]
"""
