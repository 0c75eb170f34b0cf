"""Pictures to vectors with timm: python with_timm.py MODEL_FOLDER OUTPUT.npy PICTURE…"""

import os
import sys

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


folder, output, *paths = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
workers = int(os.environ["OMP_NUM_THREADS"]) if len(paths) > 1 else 0
loader = DataLoader(Pictures(paths, transform), batch_size=32, num_workers=workers)
with torch.inference_mode():
    np.save(output, np.concatenate([model(batch).numpy() for batch in loader]))
