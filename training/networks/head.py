"""The projection head: a small MLP, with BatchNorm if asked for, an L2 bottleneck and weight-normalised prototypes.

Source: Caron et al. 2021, §3.1 and Appendix C; facebookresearch/dino `vision_transformer.py`, `DINOHead`.
The parameters keep that file's names (``mlp.0.weight`` …, ``last_layer.weight_g``, ``last_layer.weight_v``), so
its checkpoints fit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ProjectionHead", "Prototypes"]


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are ``weight_g * weight_v / |weight_v|``.

    With ``norm_last_layer`` the lengths ``weight_g`` stay 1, and the logits are cosines between the bottleneck
    and the prototypes.
    """

    def __init__(self, in_dim: int, n_prototypes: int, *, norm_last_layer: bool = True) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(n_prototypes, in_dim))
        self.weight_g = nn.Parameter(torch.ones(n_prototypes, 1), requires_grad=not norm_last_layer)
        # The reference creates this layer after its own initialisation, so it keeps nn.Linear's.
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) to (B, n_prototypes) logits, always in float32.

        bfloat16 would round cosines to steps of 0.004, which a teacher temperature of 0.04 turns into steps of
        a tenth of a logit.
        """
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight_g.float() * F.normalize(self.weight_v.float(), dim=1)
            return F.linear(x.float(), weight)


class ProjectionHead(nn.Module):
    """CLS embedding (B, D) to logits over prototypes (B, K).

    Args:
        in_dim: width D of the backbone.
        n_prototypes: K, the reference's ``out_dim``.
        hidden_dim, bottleneck_dim, n_layers: shape of the MLP.
        batch_norm: batch normalisation after each hidden layer (the reference's ``use_bn_in_head``;
            for convolutional networks, and for BYOL and MoCo).
        norm_last_layer: fix the prototypes' lengths at 1. The reference sets it for the student only when
            training ViT-B; the teacher's follow by EMA either way.
    """

    def __init__(
        self,
        in_dim: int,
        n_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        n_layers: int = 3,
        norm_last_layer: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (n_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(n_layers):
            linear = nn.Linear(widths[i], widths[i + 1])
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            is_last = i == n_layers - 1
            layers += [
                linear,
                *([nn.BatchNorm1d(widths[i + 1])] if batch_norm and not is_last else []),
                nn.GELU(),
            ]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(bottleneck_dim, n_prototypes, norm_last_layer=norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) float to (B, K) float32 logits."""
        bottleneck: Tensor = self.mlp(x)
        logits: Tensor = self.last_layer(F.normalize(bottleneck.float(), dim=-1))
        return logits
