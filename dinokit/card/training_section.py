"""The sections of a card on how the weights were trained and how k-NN accuracy developed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dinokit.card.facts import CardFacts
from dinokit.card.markdown import cell, number, percent, rounded, shown, table
from dinokit.card.record import name_of_average

__all__ = ["PAPERS", "knn_while_training", "training_section"]

PAPERS = {
    "DINO": "DINO ([Caron et al. 2021](https://arxiv.org/abs/2104.14294))",
    "DINOv2": "DINOv2 ([Oquab et al. 2023](https://arxiv.org/abs/2304.07193))",
    "DINOv3": "DINOv3 ([Siméoni et al. 2025](https://arxiv.org/abs/2508.10104))",
    "iBOT": "iBOT ([Zhou et al. 2022](https://arxiv.org/abs/2111.07832))",
    "SwAV": "SwAV ([Caron et al. 2020](https://arxiv.org/abs/2006.09882))",
    "BYOL": "BYOL ([Grill et al. 2020](https://arxiv.org/abs/2006.07733))",
    "MoCo": "MoCo ([He et al. 2019](https://arxiv.org/abs/1911.05722))",
    "CompRess": "CompRess ([Abbasi Koohpayegani et al. 2020](https://arxiv.org/abs/2010.14713))",
    "SEED": "SEED ([Fang et al. 2021](https://arxiv.org/abs/2101.04731))",
}

# The settings that readers look for first; the complete recipe follows the table.
_SETTINGS = (
    "arch",
    "loss",
    "distill_from",
    "distill_pictures",
    "target_normalisation",
    "teacher",
    "patch_size",
    "image_size_px",
    "global_crop_px",
    "local_crop_px",
    "n_local_crops",
    "global_crops_scale",
    "local_crops_scale",
    "n_prototypes",
    "student_temp",
    "teacher_temp",
    "teacher_momentum",
    "koleo_weight",
    "ibot_weight",
    "foreground_weight",
    "optimizer",
    "epochs",
    "batch_size",
    "lr",
    "warmup_epochs",
    "weight_decay",
    "weight_decay_end",
    "drop_path_rate",
    "precision",
    "seed",
)
_WHERE_IT_LOOKS = (
    "The attention of the last block was also trained, without labels, to follow regions whose colours differ from "
    "the border of the picture (`foreground_weight`; [Zhang et al. 2015](https://doi.org/10.1109/ICCV.2015.165))."
)
_KNN_ROWS = 9
_MOST_COLUMNS = 8


def knn_while_training(run: Mapping[str, Any]) -> Iterator[str]:
    """A sentence and a table of the k-NN accuracy that a run measured; nothing where it measured none."""
    if run.get("knn"):
        yield _knn_sentence(run)
        yield _knn_table(run)


def _knn_sentence(run: Mapping[str, Any]) -> str:
    queries = run.get("labelled_queries")
    name = run.get("labelled", "labelled pictures")
    limit = run["recipe"].get("knn_images")
    how = "with a separate set of queries" if queries else "leave-one-out"
    most = f", at most {limit} pictures" if limit else ""
    whose = "the student's" if run["recipe"].get("distill_from") else "the"
    return (
        f"k-NN top-1 accuracy of the frozen features on {cell(str(name))} (k = 20, T = 0.07; {how}{most}), measured "
        f"during training. The labels were used for evaluation only, not for training. The weights published here are "
        f"those of {whose} {_average(run)}."
    )


def _average(run: Mapping[str, Any]) -> str:
    return name_of_average(run["recipe"].get("distill_from"))


def _knn_table(run: Mapping[str, Any]) -> str:
    lines = run["knn"]
    picked = sorted({round(i * (len(lines) - 1) / (_KNN_ROWS - 1)) for i in range(_KNN_ROWS)})
    return table(
        ("epoch", _average(run), "student"),
        (
            (
                f"{line.get('epoch', 0):g}",
                percent(line.get("knn_teacher")),
                percent(line.get("knn_student")),
            )
            for line in (lines[i] for i in picked)
        ),
    )


def training_section(facts: CardFacts) -> Iterator[str]:
    """Steps, settings and the complete recipe, if there is a record."""
    if not facts.record:
        return
    runs: Sequence[Mapping[str, Any]] = facts.record["runs"]
    yield "## How it was trained"
    method = facts.method or ""
    several = (
        f", in {len(runs)} runs, each starting from the weights of the one before" if len(runs) > 1 else ""
    )
    yield f"With `dinokit train`, self-supervised with {PAPERS.get(method, f'`{method}`')}{several}:"
    latest = runs[-_MOST_COLUMNS:]
    heads = [str(run.get("name", "run")) for run in latest] if len(latest) > 1 else ["value"]
    yield table(("", *heads), _run_rows(latest))
    if any(run["recipe"].get("foreground_weight") for run in runs):
        yield _WHERE_IT_LOOKS
    if len(runs) > len(latest):
        yield f"These are the last {len(latest)} of {len(runs)} runs; `training.json` lists all."
    settings = {key: [shown(run["recipe"].get(key)) for run in latest] for key in _SETTINGS}
    settings = {key: values for key, values in settings.items() if any(value != "–" for value in values)}
    same = {key: values[0] for key, values in settings.items() if len(latest) > 1 and len(set(values)) == 1}
    if same:
        yield f"The same in all runs: {', '.join(f'`{key}` {value}' for key, value in same.items())}."
    rows = [(f"`{key}`", *values) for key, values in settings.items() if key not in same]
    if rows:
        yield table(("setting", *heads), rows)
    yield _whole_recipe(runs[-1])


def _whole_recipe(run: Mapping[str, Any]) -> str:
    """Collapsed by default; `dinokit train --recipe` accepts it."""
    import yaml

    text = yaml.safe_dump(dict(run["recipe"]), sort_keys=False, allow_unicode=True).rstrip()
    which = f"Complete recipe of {cell(str(run.get('name', 'the run')))}"
    return f"<details><summary>{which}</summary>\n\n```yaml\n{text}\n```\n\n</details>"


def _run_rows(runs: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    def row(name: str, values: Sequence[str]) -> Iterator[Sequence[str]]:
        if any(value != "–" for value in values):
            yield (name, *values)

    yield from row("pictures", [number(run.get("n_images")) for run in runs])
    yield from row("steps", [_steps(run) for run in runs])
    yield from row("pictures seen", [_seen(run) for run in runs])
    yield from row("final loss", [rounded(run.get("metrics", {}).get("loss")) for run in runs])
    entropies = [rounded(run.get("metrics", {}).get("teacher_entropy")) for run in runs]
    yield from row("final teacher entropy", entropies)
    knn = [percent(run["knn"][-1].get("knn_teacher")) if run["knn"] else "–" for run in runs]
    yield from row("final k-NN top-1", knn)
    yield from row("pictures per second (median)", [rounded(run.get("images_per_s")) for run in runs])


def _steps(run: Mapping[str, Any]) -> str:
    step, total = run.get("step"), run.get("n_steps")
    if step is None:
        return "–"
    return number(step) if total in (None, step) else f"{number(step)} of {number(total)}"


def _seen(run: Mapping[str, Any]) -> str:
    step, batch = run.get("step"), run["recipe"].get("batch_size")
    return number(step * batch) if isinstance(step, int) and isinstance(batch, int) else "–"
