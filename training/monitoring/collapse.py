"""Measures that show whether a run learns or collapses.

Source: of the targets Caron et al. 2021, Figure 7; of the embeddings Roy & Vetterli 2007 and Wang & Isola 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["alignment", "effective_rank", "teacher_entropy", "uniformity"]


@torch.no_grad()
def teacher_entropy(targets: Tensor) -> Tensor:
    """Mean entropy of the teacher's targets (..., K), a scalar in nats between 0 and ln K."""
    entropy: Tensor = torch.special.entr(targets).sum(dim=-1).mean()
    return entropy


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float | None:
    """How many dimensions the embeddings really use: exp of the entropy of their normalised singular values.

    Source: Roy & Vetterli 2007, "The effective rank"; as a label-free measure of a self-supervised network:
    Garrido et al. 2023 (RankMe). Not centred, as there: embeddings that are all the same have rank 1. The squared
    singular values come from the smaller Gram matrix, in float64.

    Args:
        embeddings: (M, D) with M >= 1.

    Returns:
        Between 1 and min(M, D); None where a value is not finite, or all are 0.
    """
    x = embeddings.double()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    if not bool(torch.isfinite(gram).all()):
        return None
    singular = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    total = singular.sum()
    if float(total) == 0.0:
        return None
    return float(torch.special.entr(singular / total).sum().exp())


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance between the L2-normalised embeddings of two views of a picture, 0 to 4; 0 is best.

    Source: Wang & Isola 2020, equation 6 with α = 2. Low together with a uniformity near 0 is collapse.

    Args:
        first, second: (M, D) each, row by row of the same picture.
    """
    distance = F.normalize(first.float(), dim=-1) - F.normalize(second.float(), dim=-1)
    return float(distance.pow(2).sum(dim=-1).mean())


@torch.no_grad()
def uniformity(embeddings: Tensor) -> float | None:
    """ln of the mean of exp(−2 d²) over pairs of pictures: how evenly L2-normalised embeddings fill the sphere.

    Source: Wang & Isola 2020, equation 8 with t = 2. 0 when all are the same; about −4 is the least that is
    possible with many dimensions.

    Args:
        embeddings: (M, D), one view of each picture.

    Returns:
        None where M is below 2.
    """
    if len(embeddings) < 2:
        return None
    distances = torch.pdist(F.normalize(embeddings.float(), dim=-1))
    return float(torch.exp(-2.0 * distances.pow(2)).mean().log())
