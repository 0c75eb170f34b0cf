"""The predictor: an MLP on top of the student's head, which the teacher does not have.

Source: Grill et al. 2020 (BYOL), §3.3: an MLP of one hidden layer with batch normalisation; in DINO's ablations Caron
et al. 2021, Table 7, rows 6 and 7.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Predictor"]


class Predictor(nn.Sequential):
    """(…, K) outputs of the head to (…, K) guesses of the teacher's.

    Args:
        width: K.
        hidden_dim: width of the hidden layer.
    """

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__(
            nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Any number of leading dimensions; batch statistics are taken over all of them."""
        guesses: Tensor = super().forward(x.flatten(0, -2))  # type: ignore[no-untyped-call]
        return guesses.float().view(x.shape)
