"""Every process has as many pieces of a batch as the others, whatever could be read."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from dinokit.errors import TrainingError
from dinokit.training.devices.pieces import as_many_pieces
from dinokit.training.views.data import Batch


def batch(first: int, n_images: int, *, whole: bool = True) -> Batch:
    """Whose crops are the numbers of their pictures."""
    numbers = torch.arange(first, first + n_images)[None, :, None, None, None].to(torch.uint8)
    masks = numbers[..., 0].bool().expand(2, n_images, 2, 2)
    local = numbers.expand(3, n_images, 3, 2, 2) if whole else None
    return Batch(numbers.expand(2, n_images, 3, 4, 4), local, ["a.jpg: broken"], masks if whole else None)


def numbers(piece: Batch) -> list[int]:
    assert (piece.global_crops == piece.global_crops[:, :, :1, :1, :1]).all()
    return piece.global_crops[0, :, 0, 0, 0].tolist()


def test_the_largest_is_cut_until_there_are_enough() -> None:
    pieces = as_many_pieces([batch(0, 2), batch(2, 5)], 4)
    assert [numbers(piece) for piece in pieces] == [[0, 1], [2, 3], [4], [5, 6]]
    for piece in pieces:
        assert piece.local_crops is not None and piece.masks is not None
        assert piece.local_crops[0, :, 0, 0, 0].tolist() == numbers(piece)
        assert piece.masks[0, :, 0, 0].tolist() == [number > 0 for number in numbers(piece)]


def test_what_is_enough_stays() -> None:
    given = [batch(0, 2, whole=False), batch(2, 1, whole=False)]
    pieces = as_many_pieces(given, 2)
    assert all(now is before for now, before in zip(pieces, given, strict=True))
    pieces = as_many_pieces(given, 3)
    assert [numbers(piece) for piece in pieces] == [[0], [1], [2]]
    assert all(piece.local_crops is None and piece.masks is None for piece in pieces)


def test_fewer_pictures_than_pieces() -> None:
    with pytest.raises(
        TrainingError, match=r"this process can read 2 pictures of a step, and accumulate=3 .* lower"
    ):
        as_many_pieces([batch(0, 2)], 3)
