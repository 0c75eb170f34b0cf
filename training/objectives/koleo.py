"""The KoLeo regulariser: pictures of a batch spread over the sphere.

Source: Sablayrolles et al. 2019 (Kozachenko-Leonenko estimator of the differential entropy); used so in DINOv2
(Oquab et al. 2023, §4, and facebookresearch/dinov2 `loss/koleo_loss.py`), where it raised k-NN most of all parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["koleo_loss"]


def koleo_loss(embeddings: Tensor) -> Tensor:
    """Minus the mean log distance of each embedding to its nearest neighbour in the batch.

    Args:
        embeddings: (V, B, D), V views of B pictures, before the head; each view is a batch of its own.
            B must be at least 2. L2-normalised here, in float32.

    Returns:
        Scalar: the sum over the views, as DINOv2 adds it.
    """
    points = F.normalize(embeddings.float(), dim=-1)
    with torch.no_grad():
        cosines = points @ points.transpose(1, 2)
        cosines.diagonal(dim1=1, dim2=2).fill_(-1.0)
        nearest = cosines.argmax(dim=-1, keepdim=True)  # (V, B, 1)
    neighbours = points.gather(1, nearest.expand_as(points))
    # A small offset keeps the gradient finite where two pictures are the same.
    distances = torch.linalg.vector_norm(points - neighbours + 1e-8, dim=-1)
    closeness: Tensor = -(distances + 1e-8).log().mean(dim=1).sum()
    return closeness
