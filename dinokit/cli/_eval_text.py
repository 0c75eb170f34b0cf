"""The table that `dinokit eval` prints."""

from __future__ import annotations

from dinokit.classifiers.evaluation import KNNScore, Proportion, compare
from dinokit.classifiers.model_comparison import Comparison, ModelScores
from dinokit.wording import counted

__all__ = ["comparison_as_text"]

_PAPERS_K = 20


def comparison_as_text(comparison: Comparison) -> str:
    """One line on the judged pictures, and a table with a line per model."""
    judged = comparison.judged
    count = len(judged.judged())
    if judged.truth is None:
        how = f"{count} pictures, each judged by the others"
    else:
        how = f"{counted(count, 'picture')} judged by {len(judged.labels)}"
    label, always = judged.most_frequent_class()
    return (
        f"{how}; {len(set(judged.labels))} classes, always predicting {label!r} reaches {100 * always.value:.1f} %\n"
        f"{_table(comparison.scores)}"
    )


def _table(scores: list[ModelScores]) -> str:
    first = scores[0]
    ks = [found.k for found in first.knn]
    middle = min(range(len(ks)), key=lambda place: abs(ks[place] - _PAPERS_K))
    lines = [
        [
            "top-1, %",
            *(f"k-NN {k}" for k in ks),
            *(["linear"] if first.linear is not None else []),
            f"top-5 (k-NN {ks[middle]})",
            *([f"k-NN {ks[middle]} against {first.features.name}"] if len(scores) > 1 else []),
        ]
    ]
    for place, score in enumerate(scores):
        cells = [score.features.name, *(_percent(found.top1) for found in score.knn)]
        if score.linear is not None:
            cells.append(_percent(score.linear.top1))
        cells.append(_percent(score.knn[middle].top5))
        if len(scores) > 1:
            cells.append(_difference(first.knn[middle], score.knn[middle]) if place else "")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [f"{line[0]:<{widths[0]}}", *(f"{t:>{w}}" for t, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def _difference(first: KNNScore, other: KNNScore) -> str:
    paired = compare(first.right, other.right)
    return f"{100 * (other.top1.value - first.top1.value):+.1f}, p {paired.p:.2g}"


def _percent(proportion: Proportion) -> str:
    return f"{100 * proportion.value:.1f} ±{50 * (proportion.high - proportion.low):.1f}"
