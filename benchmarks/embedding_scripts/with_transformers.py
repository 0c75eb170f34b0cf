"""Pictures to vectors with transformers: python with_transformers.py MODEL_FOLDER OUTPUT.npy PICTURE…"""

import sys

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder, output, *paths = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()
vectors = []
with torch.inference_mode():
    for start in range(0, len(paths), 32):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + 32]]
        vectors.append(model(**processor(images=images, return_tensors="pt")).pooler_output.numpy())
np.save(output, np.concatenate(vectors))
