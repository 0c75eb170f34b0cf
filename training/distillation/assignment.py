"""Which frozen teacher teaches which pictures, if not every one teaches all.

A teacher is useful for its own domain: a model of plants for plants and not for cars, and edges distinguish garments
better than breeds of dogs. ``distill_pictures`` gives each of ``distill_from`` its own pictures. The target of a
picture is then the mean of the cosines of its teachers; all teachers see all pictures, since any picture may be one
that another is compared with.

Source: Sariyildiz et al. 2025 (DUNE): teachers of different domains, each asked about its own pictures.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dinokit.errors import UsageError
from dinokit.training.recipe import Recipe
from dinokit.training.views.pictures import Pictures

__all__ = ["Teaching", "weigh"]


class Teaching:
    """Weights of the teachers, by the name of a picture.

    Args:
        recipe: with ``distill_from`` and ``distill_pictures`` of the same length.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.distill_pictures is not None
        self.names = recipe.teachers
        self.patterns = recipe.distill_pictures

    def weights(self, name: str) -> tuple[float, ...]:
        """N numbers with mean 1, one per teacher in the order of ``distill_from``; 0 for those that do not teach it.

        Raises:
            UsageError: the picture has no teacher.
        """
        found = self._who_teaches(name)
        if not any(found):
            raise UsageError(
                f"distill_pictures leaves {name} without a teacher; give one of distill_from null, so that it teaches "
                "all pictures, or leave these out"
            )
        return tuple(teaches * len(found) / sum(found) for teaches in found)

    def check(self, pictures: Pictures) -> None:
        """Checks that every picture has a teacher and every teacher has pictures; a mistyped pattern would match none.

        Raises:
            UsageError: names the picture or the pattern.
        """
        idle = {number for number, pattern in enumerate(self.patterns) if pattern is not None}
        for index in range(len(pictures)):
            weights = self.weights(pictures.name(index))
            idle -= {number for number in idle if weights[number]}
        if idle:
            number = min(idle)
            raise UsageError(
                f"distill_pictures={self.patterns[number]!r} for {self.names[number]} matches none of {len(pictures)} "
                f"pictures; their names are like {pictures.name(0)}, and * matches anything"
            )

    def _who_teaches(self, name: str) -> list[bool]:
        shown = name.replace(os.sep, "/")
        # "*/plants/*" also matches pictures in plants/ if their names begin with it.
        names = (shown, f"/{shown}")
        return [
            pattern is None or any(fnmatch.fnmatchcase(text, pattern) for text in names)
            for pattern in self.patterns
        ]


def weigh(targets: Tensor, weights: Tensor, widths: Sequence[int]) -> Tensor:
    """Targets with each teacher's part times its weight for the picture.

    Their product with plain targets is the weighted mean of the teachers' cosines.

    Args:
        targets: (T, B, K), the parts of N teachers side by side.
        weights: (B, N), see :meth:`Teaching.weights`.
        widths: N numbers that add up to K.
    """
    ends = list(itertools.accumulate(widths))
    return torch.cat(
        [
            targets[..., end - width : end] * weights[:, number, None]
            for number, (end, width) in enumerate(zip(ends, widths, strict=True))
        ],
        dim=-1,
    )
