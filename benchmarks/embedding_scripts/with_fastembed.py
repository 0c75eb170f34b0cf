"""Pictures to vectors with fastembed: python with_fastembed.py MODEL_FOLDER OUTPUT.npy PICTURE…

fastembed takes an image model of its own list only, so one of these lends its name to the folder, which has
model.onnx and preprocessor_config.json as fastembed reads them.
"""

import os
import sys

import numpy as np
from fastembed import ImageEmbedding

folder, output, *paths = sys.argv[1:]
model = ImageEmbedding(
    "Qdrant/resnet50-onnx", specific_model_path=folder, threads=int(os.environ["OMP_NUM_THREADS"])
)
np.save(output, np.stack(list(model.embed(paths, batch_size=32))))
