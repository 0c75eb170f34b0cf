"""Complete programs that load the model, one per library. Tests extract them from a card and run them.

Each reads ``photo.jpg`` and ends with ``vector``, the picture's features. ``band_snippets.py`` has those for models
with neither 1 nor 3 channels.
"""

from __future__ import annotations

from collections.abc import Iterator

from dinokit.card.band_snippets import band_snippets
from dinokit.card.facts import CardFacts
from dinokit.pictures.bands import is_photographic
from dinokit.pictures.preprocess import Preprocessing

__all__ = ["Snippet", "snippets"]

# (title, language, code)
Snippet = tuple[str, str, str]


def snippets(facts: CardFacts) -> Iterator[Snippet]:
    """One per library that loads this folder and returns the same numbers as dinokit."""
    if not is_photographic(facts.config.preprocessing.channels):
        yield from band_snippets(facts)
        return
    yield "dinokit", "python", _dinokit(facts)
    if facts.for_timm:
        yield "timm", "python", _timm(facts)
    if facts.for_transformers:
        yield "transformers", "python", _transformers(facts)
    if facts.for_onnxruntime:
        yield "ONNX Runtime", "python", _onnxruntime(facts)
    if facts.for_transformers_js:
        yield "Transformers.js", "javascript", _transformers_js(facts)


def _dinokit(facts: CardFacts) -> str:
    dim = facts.config.embed_dim
    return f'''\
from dinokit import load_backbone

backbone = load_backbone("{facts.repo}")
vector = backbone.embed("photo.jpg")  # ({dim},) float32; a folder gives (N, {dim})
'''


def _timm(facts: CardFacts) -> str:
    return f"""\
import timm
import torch
from PIL import Image, ImageOps

model = timm.create_model("hf-hub:{facts.repo}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{_mode(facts)}")
with torch.inference_mode():
    vector = model(transform(image)[None])[0]
"""


def _transformers(facts: CardFacts) -> str:
    return f"""\
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{facts.repo}")
model = AutoModel.from_pretrained("{facts.repo}")
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{_mode(facts)}")
inputs = processor(image, return_tensors="pt")
with torch.inference_mode():
    vector = model(**inputs).pooler_output[0]
"""


def _onnxruntime(facts: CardFacts) -> str:
    prepare = facts.config.preprocessing
    height, width = prepare.crop_px
    return f"""\
import numpy as np
import onnxruntime
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{_mode(facts)}")
{_resize_in_python(prepare)}
left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)
crop = np.asarray(image.crop((left, top, left + {width}, top + {height})), np.float32)
mean, std = np.float32({list(prepare.mean)}), np.float32({list(prepare.std)})
pixels = ((crop{"" if prepare.channels == 3 else "[:, :, None]"} / 255 - mean) / std).transpose(2, 0, 1)[None]

session = onnxruntime.InferenceSession(hf_hub_download("{facts.repo}", "onnx/model.onnx"))
vector = session.run(["pooler_output"], {{"pixel_values": pixels}})[0][0]
"""


def _mode(facts: CardFacts) -> str:
    return "L" if facts.config.preprocessing.channels == 1 else "RGB"


def _resize_in_python(prepare: Preprocessing) -> str:
    """Pillow's resize with torchvision's sizes: the long side rounded down, never below the short one."""
    kind = f"Image.Resampling.{prepare.interpolation.upper()}"
    if isinstance(prepare.resize_px, tuple):
        height, width = prepare.resize_px
        return f"image = image.resize(({width}, {height}), {kind})"
    short = prepare.resize_px
    return f"""\
short = min(image.size)
image = image.resize(tuple({short} * side // short for side in image.size), {kind})"""


def _transformers_js(facts: CardFacts) -> str:
    return f"""\
import {{ AutoModel, AutoProcessor, RawImage }} from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("{facts.repo}");
const model = await AutoModel.from_pretrained("{facts.repo}", {{ dtype: "fp32" }});
let image = {_read_in_js(facts.config.preprocessing)};
// Resize with Lanczos: the processor's own bicubic skips pixels when it makes a picture smaller.
{_resize_in_js(facts.config.preprocessing)}
const inputs = await processor(image);
const {{ pooler_output }} = await model(inputs);
const vector = pooler_output.data; // Float32Array of {facts.config.embed_dim}
"""


def _read_in_js(prepare: Preprocessing) -> str:
    read = 'await RawImage.read("photo.jpg")'
    return read if prepare.channels == 3 else f"({read}).grayscale()"


def _resize_in_js(prepare: Preprocessing) -> str:
    if isinstance(prepare.resize_px, tuple):
        height, width = prepare.resize_px
        return f'image = await image.resize({width}, {height}, {{ resample: "lanczos" }});'
    short = prepare.resize_px
    return f"""\
const short = Math.min(image.width, image.height);
const [width, height] = [image.width, image.height].map((side) => Math.floor(({short} * side) / short));
image = await image.resize(width, height, {{ resample: "lanczos" }});"""
