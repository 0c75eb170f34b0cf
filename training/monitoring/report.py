"""The report of a run: one HTML file that opens in any browser, without network.

It is made only from files of the run folder (recipe.yaml, metrics.jsonl, attention/), so it can be written again at any
time. Curves as in Caron et al. 2021, Figures 6 and 7.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from dinokit.card.record import name_of_average
from dinokit.card.run_files import flat_yaml, logged_metrics
from dinokit.errors import UsageError
from dinokit.files.outputs import atomic
from dinokit.model_folder.architecture import is_vit_name
from dinokit.training.monitoring.snapshot_files import photos_file, snapshots
from dinokit.training.monitoring.verdicts import ENOUGH_PICTURES
from dinokit.training.recipe import Recipe
from dinokit.wording import counted

__all__ = ["write_report"]

_POINTS = 400  # of a curve; more are averaged in groups


@dataclass(frozen=True)
class _Chart:
    title: str
    note: str
    keys: Sequence[tuple[str, str]]
    """(key of metrics.jsonl, name in the legend); at most two."""
    percent: bool = False
    zero: bool = True
    """Whether the scale begins at 0."""
    ln_k: bool = False
    """Whether a line at ln K is drawn."""

    def worded(self, words: _Words) -> _Chart:
        """With the networks' names in this run."""
        keys = [(key, name.format_map(words)) for key, name in self.keys]
        return replace(self, title=self.title.format_map(words), note=self.note.format_map(words), keys=keys)


class _Words(TypedDict):
    """Names of a run's networks in the report: in a distillation, neither of the trained networks is the teacher."""

    average: str
    """The student's moving average: k-NN and attention are measured on it."""
    momentum_of: str
    """Title of the momentum's chart."""
    watched: str
    """The network whose embeddings are measured: the student in a distillation, since the teacher's do not change."""


def _words(recipe: dict[str, Any]) -> _Words:
    name = name_of_average(recipe.get("distill_from"))
    if not recipe.get("distill_from"):
        return {"average": name, "momentum_of": "Teacher momentum", "watched": name}
    return {"average": name, "momentum_of": f"Momentum of the {name}", "watched": "student"}


_LEARNING = (
    _Chart("Loss", "with K prototypes, chance is at ln K", [("loss", "loss")], ln_k=True),
    _Chart(
        "Teacher entropy",
        "ln K: uniform collapse; 0: collapse onto one prototype (paper, Fig. 7)",
        [("teacher_entropy", "entropy")],
        ln_k=True,
    ),
    _Chart(
        "KL(teacher ‖ student)",
        "collapse if 0 while the entropy is 0 or ln K (paper, Fig. 7)",
        [("kl", "KL")],
    ),
    _Chart(
        "Loss of hidden patches",
        "without its weight; crops with none hidden count as 0 (iBOT)",
        [("ibot_loss", "loss")],
    ),
    _Chart(
        "Attention: KL from the foreground",
        "of the last block, from what differs from the border; without its weight",
        [("foreground_kl", "KL")],
    ),
    _Chart(
        "k-NN accuracy",
        "of labelled pictures, k = 20 (paper, Fig. 6)",
        [("knn_teacher", "{average}"), ("knn_student", "student")],
        percent=True,
        zero=False,
    ),
    _Chart(
        "Effective rank",
        "dimensions that the {watched}'s embeddings use; 1 is collapse",
        [("effective_rank", "rank")],
    ),
    _Chart(
        "Prototypes used",
        "share that was recently the strongest for some view",
        [("prototypes_used", "share")],
        percent=True,
    ),
    _Chart(
        "Alignment",
        "mean squared distance of two views of a picture; lower is better",
        [("alignment", "alignment")],
    ),
    _Chart(
        "Uniformity",
        "how evenly embeddings fill the sphere; lower is better, 0 is collapse",
        [("uniformity", "uniformity")],
        zero=False,
    ),
    _Chart("Gradient norm", "before clipping", [("grad_norm", "norm")]),
)
_SETTINGS = (
    _Chart("Learning rate", "", [("lr", "lr")]),
    _Chart("{momentum_of}", "higher is slower", [("teacher_momentum", "momentum")], zero=False),
    _Chart("Teacher temperature", "lower is sharper", [("teacher_temp", "temperature")]),
    _Chart("Weight decay", "", [("weight_decay", "weight decay")]),
    _Chart("Speed", "pictures per second", [("images_per_s", "images/s")]),
    _Chart(
        "Waiting for data", "share of the time; more workers may help", [("data_wait", "share")], percent=True
    ),
)


@dataclass
class _Found:
    """A kind of verdict in the metrics of a run."""

    first: int
    last: int
    """Steps."""
    sentence: str
    """At the last of them."""


class _History:
    """The metrics of a run by key: a long run has too many lines to keep them as dicts.

    Args:
        lines: of metrics.jsonl, in order.
    """

    def __init__(self, lines: Iterable[dict[str, Any]]) -> None:
        self.epoch = 0.0
        self.step = self.logged_step = -1
        self._columns: dict[str, tuple[array[float], array[float]]] = {}
        self.verdicts: dict[str, _Found] = {}
        for line in lines:
            if _is_finite(line.get("epoch")):
                self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        self.step, self.epoch = line["step"], line["epoch"]
        if "loss" in line:
            self.logged_step = self.step
        for key, value in line.items():
            if _is_finite(value):
                epochs, values = self._columns.setdefault(key, (array("d"), array("d")))
                epochs.append(self.epoch)
                values.append(value)
        for kind, sentence in (line.get("verdicts") or {}).items():
            found = self.verdicts.setdefault(kind, _Found(self.step, self.step, ""))
            found.last, found.sentence = self.step, str(sentence)

    def __bool__(self) -> bool:
        return self.step >= 0

    def column(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Epochs and values of the lines in which ``key`` is a finite number."""
        epochs, values = self._columns.get(key, ((), ()))
        return np.array(epochs, np.float64), np.array(values, np.float64)

    def latest(self, key: str) -> float | None:
        """The last finite value."""
        _, values = self._columns.get(key, ((), ()))
        return values[-1] if values else None

    def median(self, key: str) -> float | None:
        """The median of the finite values."""
        _, values = self.column(key)
        return float(np.median(values)) if len(values) else None


def write_report(run: str | os.PathLike[str]) -> Path:
    """Writes ``run/report.html``, whole or not at all.

    Args:
        run: folder of a run of ``dinokit train``, finished or not.

    Returns:
        The file.

    Raises:
        UsageError: it is not the folder of a run.
        OSError: the file cannot be written.
    """
    run = Path(run)
    try:
        text = (run / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{run} is not the folder of a training run: its recipe.yaml cannot be read; expected the folder given "
            "to dinokit train with -o"
        ) from error
    try:
        recipe = flat_yaml(text)
    except ValueError as error:
        raise UsageError(f"{run / 'recipe.yaml'} cannot be used: {error}. Was it edited by hand?") from error
    history = _History(logged_metrics(run))
    charts: list[dict[str, Any]] = []
    body = "\n".join(
        [
            _head(run, recipe, history),
            _verdicts(history, recipe),
            _figures("Is it learning?", _LEARNING, history, recipe, charts),
            _attention(run, recipe, history) or _no_attention(recipe),
            _figures("Schedules and speed", _SETTINGS, history, recipe, charts),
            _recipe(recipe),
            "<footer>Written by <code>dinokit train</code>; <code>dinokit report RUN</code> writes it again. All "
            "numbers are in <code>metrics.jsonl</code> beside this file.</footer>",
        ]
    )
    page = resources.files("dinokit.training").joinpath("report_template.html").read_text(encoding="utf-8")
    for mark, text in (
        ("<!--TITLE-->", f"{html.escape(run.resolve().name)} – dinokit"),
        ("<!--DATA-->", json.dumps(charts, separators=(",", ":")).replace("<", "\\u003c")),
        ("<!--BODY-->", body),
    ):
        page = page.replace(mark, text, 1)
    path = run / "report.html"
    with atomic(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


# -- parts of the page


def _head(run: Path, recipe: dict[str, Any], history: _History) -> str:
    name = html.escape(run.resolve().name)
    arch = html.escape(str(recipe.get("arch")))
    if taught_by := recipe.get("distill_from"):
        names = [taught_by] if isinstance(taught_by, str) else taught_by
        arch += html.escape(
            f", distilled from {' and '.join(map(str, names))}; its moving average is measured"
        )
    if not history:
        return f"<h1>{name}</h1><p class='soft'>{arch}</p><p>No step was logged yet.</p>"
    tiles = [
        (f"{history.epoch:.2f} of {recipe.get('epochs')}", f"epochs, {counted(history.step, 'step')}"),
        (_number(history.latest("loss")), f"loss; ln K = {ln_k:.2f}" if (ln_k := _ln_k(recipe)) else "loss"),
        (_number(history.latest("teacher_entropy")), "teacher entropy"),
        (_percent(history.latest("knn_teacher")), f"k-NN, {_words(recipe)['average']}"),
        (_number(history.latest("effective_rank"), 1), "effective rank"),
        (_percent(history.latest("prototypes_used")), f"of {recipe.get('n_prototypes')} prototypes used"),
        (_number(history.median("images_per_s"), 1), "images/s, median"),
        (_percent(history.median("data_wait")), "waiting for data, median"),
    ]
    drawn = "".join(
        f"<div class='tile'><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
        for value, label in tiles
        if value != "–"
    )
    return f"<h1>{name}</h1><p class='soft'>{arch}</p><div class='tiles'>{drawn}</div>"


def _verdicts(history: _History, recipe: dict[str, Any]) -> str:
    parts = []
    for found in history.verdicts.values():
        still = found.last == history.logged_step
        when = f"steps {found.first:,} to {found.last:,}" + ("" if still else ", not since")
        parts.append(
            f"<div class='verdict{'' if still else ' over'}'><b>{html.escape(when)}</b><br>"
            f"{html.escape(found.sentence)}</div>"
        )
    waiting = history.median("data_wait")
    if waiting is not None and waiting > 0.3:
        parts.append(
            f"<div class='verdict'><b>speed</b><br>{100 * waiting:.0f} % of the time is spent waiting for pictures; "
            "raise workers, set reduced_decoding: true for large JPEG files, or store smaller pictures</div>"
        )
    if not history.verdicts and history.logged_step >= 0:
        seen_pictures = history.logged_step * int(recipe.get("batch_size") or 1)
        sound = "<b>No sign of collapse</b> at any logged step."
        if seen_pictures < ENOUGH_PICTURES:
            sound = f"<b>Too early for a verdict</b>: one needs {ENOUGH_PICTURES} pictures, {seen_pictures} were seen."
        parts.insert(0, f"<div class='plain'>{sound}</div>")
    return f"<h2>Verdicts</h2>{''.join(parts)}" if parts else ""


def _figures(
    heading: str,
    wanted: Sequence[_Chart],
    history: _History,
    recipe: dict[str, Any],
    charts: list[dict[str, Any]],
) -> str:
    """The figures of a section; what the script draws is added to ``charts``."""
    drawn = []
    for chart in (one.worded(_words(recipe)) for one in wanted):
        series = [_series(history, key, name) for key, name in chart.keys]
        series = [one for one in series if one["x"]]
        note = f"<small>{html.escape(chart.note)}</small>" if chart.note else ""
        if not series:
            if chart.keys[0][0] == "knn_teacher":
                hint = "no labelled pictures; give some with <code>--labelled FOLDER</code>"
                drawn.append(
                    f"<figure><figcaption>{chart.title}{note}</figcaption><p class='soft'>{hint}</p></figure>"
                )
            continue
        key = ""
        if len(series) > 1:
            keys = "".join(
                f"<span class='key'><i style='background:var(--s{i})'></i>{html.escape(one['name'])}</span>"
                for i, one in enumerate(series)
            )
            key = f"<div>{keys}</div>"
        guides = [{"y": _ln_k(recipe), "label": "ln K"}] if chart.ln_k and _ln_k(recipe) else []
        drawn.append(
            f"<figure data-chart='{len(charts)}'><figcaption>{html.escape(chart.title)}{note}</figcaption>{key}"
            f"<svg role='img' aria-label='{html.escape(chart.title)}: from {series[0]['y'][0]:.4g} to "
            f"{series[0]['y'][-1]:.4g}'></svg><div class='tip'></div></figure>"
        )
        charts.append({"series": series, "guides": guides, "percent": chart.percent, "zero": chart.zero})
    return f"<h2>{html.escape(heading)}</h2><div class='charts'>{''.join(drawn)}</div>" if drawn else ""


def _attention(run: Path, recipe: dict[str, Any], history: _History) -> str:
    found = snapshots(run)
    if not found:
        return ""
    logged_epochs, logged_steps = history.column("step")
    epochs = dict(zip(logged_steps.tolist(), logged_epochs.tolist(), strict=True))
    photos = photos_file(run)
    rows = [(photos, "the photographs")] if photos.exists() else []
    for step, path in found.items():
        epoch = f", epoch {epochs[step]:.4g}" if epochs.get(step) else ""
        rows.append((path, "before training" if step == 0 else f"step {step:,}{epoch}"))
    drawn = "".join(
        f"<figure><img alt='{html.escape(label)}' src='data:image/jpeg;base64,"
        f"{base64.b64encode(path.read_bytes()).decode()}'><figcaption>{html.escape(label)}</figcaption></figure>"
        for path, label in rows
    )
    return (
        f"<h2>What the {_words(recipe)['average']} looks at</h2><p class='soft'>Attention of the class token in the "
        f"last block, mean of its heads, on a few fixed pictures of the run.</p><div class='strip'>{drawn}</div>"
    )


def _no_attention(recipe: dict[str, Any]) -> str:
    if is_vit_name(str(recipe.get("arch"))):
        return ""
    return "<p class='soft'>No attention maps: this network has no attention to show.</p>"


def _recipe(recipe: dict[str, Any]) -> str:
    defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(Recipe()).items()}
    rows = "".join(
        f"<div{' class=changed' if defaults.get(key) != value else ''}><code>{html.escape(str(key))}</code>"
        f"<code>{html.escape(json.dumps(value, ensure_ascii=False))}</code></div>"
        for key, value in recipe.items()
    )
    return (
        "<h2>Recipe</h2><p class='soft'>Bold: other than the default, or filled in for the number of pictures.</p>"
        f"<div class='recipe'>{rows}</div>"
    )


# -- numbers


def _series(history: _History, key: str, name: str) -> dict[str, Any]:
    """{name, x: epochs, y: values}, at most ``_POINTS`` long."""
    epochs, values = history.column(key)
    if not len(values):
        return {"name": name, "x": [], "y": []}
    groups = np.array_split(np.stack([epochs, values], axis=1), min(len(values), _POINTS))
    means = [group.mean(axis=0) for group in groups]
    return {
        "name": name,
        "x": [float(f"{m[0]:.6g}") for m in means],
        "y": [float(f"{m[1]:.6g}") for m in means],
    }


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # a bool is an int, too


def _ln_k(recipe: dict[str, Any]) -> float:
    """The loss of a guess among K prototypes; 0 if the loss has no prototypes."""
    if recipe.get("loss", "cross_entropy") != "cross_entropy":
        return 0.0
    count = recipe.get("n_prototypes")
    return math.log(count) if isinstance(count, int) and count > 1 else 0.0


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
