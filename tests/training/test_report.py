"""The report of a run, the attention through time, TensorBoard events, and that none of them can end a run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

torch = pytest.importorskip("torch")
import yaml
from click.testing import CliRunner
from tiny_runs import RECIPE, tiny_options

from dinokit.card.run_files import logged_metrics
from dinokit.cli import cli
from dinokit.errors import UsageError
from dinokit.pictures.preprocess import Preprocessing
from dinokit.training.monitoring import monitor, tensorboard
from dinokit.training.monitoring.pace import Pace
from dinokit.training.monitoring.report import write_report
from dinokit.training.monitoring.snapshot_files import snapshots
from dinokit.training.monitoring.snapshots import Snapshots
from dinokit.training.recipe import load_recipe
from dinokit.training.trainer import build_network, train
from dinokit.training.views.pictures import collect_pictures


class Page(HTMLParser):
    """What a browser would see: text, the addresses it would load, open tags, the data of the charts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.addresses, self.open, self.scripts = "", [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.charts = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += f"{data} "


def made_up(folder: Path, lines: list[dict[str, Any]], **recipe: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"arch": "vit", "epochs": 4, "n_prototypes": 16, **recipe})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 2.0,
        "teacher_entropy": 1.0,
        "kl": 1.0,
        "verdicts": {},
        **values,
    }


def test_a_run_leaves_a_report_that_needs_nothing_else(tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    train([photos], run, RECIPE)
    page = Page(run / "report.html")
    assert page.open == []
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    # The pictures; attention before training, after each epoch.
    assert len(page.addresses) == 1 + 3
    words = (
        "2.00 of 2|Loss|Teacher entropy|KL(teacher ‖ student)|give some with|before training|step 4, epoch 2"
    )
    for expected in f"{words}|Learning rate|head_hidden_dim|Waiting for data|Too early for a verdict".split(
        "|"
    ):
        assert expected in page.text, expected
    loss = page.charts[0]
    written = [json.loads(text)["loss"] for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert loss["series"][0]["y"] == pytest.approx(written, rel=1e-5)
    assert loss["series"][0]["x"] == [0.5, 1.0, 1.5, 2.0] and loss["guides"][0]["label"] == "ln K"
    source = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", source) and "@import" not in source


def test_what_a_run_holds_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x>"
    run = made_up(tmp_path / "a & b", [line(10, verdicts={"low-rank": evil})], labelled=evil, arch=evil)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "epo')  # the last line of a killed run
    page = Page(write_report(run))
    assert page.addresses == [] and len(page.scripts) == 2
    assert page.text.count(evil) == 4 and "a & b" in page.text


@pytest.mark.parametrize(("step", "expected"), [(31, "Too early for a verdict"), (32, "No sign of collapse")])
def test_a_run_is_called_sound_only_once_there_is_something_to_judge(
    tmp_path: Path, step: int, expected: str
) -> None:
    text = Page(write_report(made_up(tmp_path / "run", [line(step)], batch_size=8))).text
    assert expected in text and ("No sign" in text) == (step == 32)


def test_verdicts_say_when_and_whether_they_still_hold(tmp_path: Path) -> None:
    lines = [
        line(10, verdicts={"low-rank": "first"}),
        line(20, verdicts={"low-rank": "rank is low"}),
        line(1030),
    ]
    lines += [line(1040, verdicts={"uniform": "entropy = ln K"}, data_wait=0.6)]
    text = Page(write_report(made_up(tmp_path / "run", lines))).text
    assert "steps 10 to 20, not since rank is low" in text
    assert "steps 1,040 to 1,040 entropy = ln K" in text and "No sign of collapse" not in text
    assert "60 % of the time is spent waiting for pictures" in text


def test_long_runs_are_averaged_and_both_networks_are_drawn(tmp_path: Path) -> None:
    lines = [line(step, loss=float(step % 2)) for step in range(1, 5001)]
    for number in range(4):
        lines[number * 1000] |= {"knn_teacher": 0.1 * number, "knn_student": 0.05 * number}
    lines[7]["loss"] = None
    page = Page(write_report(made_up(tmp_path / "run", lines)))
    loss = page.charts[0]["series"][0]
    assert len(loss["x"]) == len(loss["y"]) == 400 and max(loss["y"]) < 0.7
    both = next(chart for chart in page.charts if len(chart["series"]) == 2)
    assert [one["name"] for one in both["series"]] == ["teacher", "student"]
    assert both["series"][0]["y"] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_where_finished_models_teach_nothing_that_is_measured_is_called_the_teachers(tmp_path: Path) -> None:
    measured = {"knn_teacher": 0.5, "knn_student": 0.4, "effective_rank": 9.0, "teacher_momentum": 0.99}
    lines = [line(step, teacher_entropy=None, kl=None, **measured) for step in (10, 20)]
    folders = [
        made_up(tmp_path / name, lines, distill_from=taught_by, loss="similarity", labelled="x")
        for name, taught_by in (("taught", ["vit_large", "<b>"]), ("alone", None))
    ]
    for folder in folders:
        (folder / "attention").mkdir()
        (folder / "attention" / "step-0000000010.jpg").write_bytes(b"jpeg")
    taught, alone = (Page(write_report(folder)) for folder in folders)
    words = taught.text.split("Recipe")[0]
    assert "distilled from vit_large and <b>; its moving average is measured" in words
    for expected in (
        "50.0 % k-NN, moving average",
        "dimensions that the student's embeddings use",
        "What the moving average looks at",
        "Momentum of the moving average",
    ):
        assert expected in words, expected
    assert "eacher" not in words
    for expected in (
        "k-NN, teacher",
        "the teacher's embeddings",
        "What the teacher looks at",
        "Teacher momentum",
    ):
        assert expected in alone.text, expected
    for page, names in ((taught, ["moving average", "student"]), (alone, ["teacher", "student"])):
        both = next(chart for chart in page.charts if len(chart["series"]) == 2)
        assert [one["name"] for one in both["series"]] == names


def test_it_is_written_without_torch(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run", [])
    code = f"""
import sys
from dinokit.training.monitoring.report import write_report
write_report({str(run)!r})
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_command_writes_it_again(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run", [])
    done = CliRunner().invoke(cli, ["report", str(run)])
    assert done.exit_code == 0 and done.stdout == f"{run / 'report.html'}\n"
    assert "No step was logged yet" in Page(run / "report.html").text
    for wrong in (tmp_path, tmp_path / "nowhere"):
        refused = CliRunner().invoke(cli, ["report", str(wrong)])
        assert refused.exit_code == 2 and "is not the folder of a training run" in refused.stderr
    with pytest.raises(UsageError, match="expected flat `key: value` lines"):
        (run / "recipe.yaml").write_text("- a list")
        write_report(run)


def test_a_report_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, photos: Path, monkeypatch: Any
) -> None:
    told: list[str] = []

    class Listener:
        def told(self, *_: Any) -> None: ...
        def started(self, *_: Any) -> None: ...
        def stepped(self, *_: Any) -> None: ...
        def saved(self, *_: Any) -> None: ...
        def warned(self, message: str) -> None:
            told.append(message)

    def full(_run: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor, "write_report", full)
    state = train([photos], tmp_path / "run", RECIPE, observer=Listener())
    assert state.step == 4 and "the report was not updated" in told[0] and "No space left" in told[0]


def test_a_start_that_left_only_attention_behind_does_not_hold_the_folder(
    tmp_path: Path, photos: Path
) -> None:
    run = tmp_path / "run"
    (run / "attention").mkdir(parents=True)
    (run / "recipe.yaml").write_text("arch: vit_small_patch16_224")
    assert train([photos], run, RECIPE).step == 4


def test_a_new_start_shows_nothing_of_the_run_before(tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    train([photos], run, RECIPE)
    shutil.rmtree(run / "checkpoint")
    (run / "attention" / "step-0000000099.jpg").write_bytes(b"of a longer run")
    (run / "attention" / "mine.txt").write_text("mine")
    train([photos], run, RECIPE)
    assert list(snapshots(run)) == [0, 2, 4]
    assert (run / "attention" / "mine.txt").read_text() == "mine"


def test_a_lost_recipe_does_not_end_the_run(tmp_path: Path, photos: Path) -> None:
    run, told = tmp_path / "run", []

    class Loses:
        def told(self, *_: Any) -> None: ...
        def started(self, *_: Any) -> None: ...
        def saved(self, *_: Any) -> None: ...
        def stepped(self, *_: Any) -> None:
            (run / "recipe.yaml").unlink(missing_ok=True)

        def warned(self, message: str) -> None:
            told.append(message)

    assert train([photos], run, RECIPE, observer=Loses()).step == 4
    assert told and all(text.startswith("the report was not updated: ") for text in told)


def test_schedules_that_hold_nothing_are_not_told(tmp_path: Path, photos: Path) -> None:
    def told(name: str, **changes: Any) -> tuple[dict[str, Any], str]:
        train([photos], tmp_path / name, replace(RECIPE, epochs=1, warmup_epochs=0, **changes))
        return list(logged_metrics(tmp_path / name))[-1], Page(tmp_path / name / "report.html").text.split(
            "Recipe"
        )[0]

    metrics, page = told("dino")
    assert metrics["teacher_temp"] == 0.04 and 0.99 <= metrics["teacher_momentum"] < 1
    assert "Teacher momentum" in page and "Teacher temperature" in page
    swav, page = told("swav", teacher="student", target_normalisation="sinkhorn")
    assert (
        swav["teacher_temp"] == 0.04 and swav["teacher_momentum"] is None and "Teacher momentum" not in page
    )
    byol, page = told("byol", loss="squared_error", target_normalisation="none")
    assert byol["teacher_temp"] is None and byol["teacher_momentum"] < 1 and "Teacher temperature" not in page
    # A loss of its own temperature, whose warm-up it does not take part in.
    seed = {"loss": "similarity", "distill_from": "hog", "n_prototypes": None, "target_normalisation": "none"}
    seed |= {"warmup_teacher_temp": 0.02, "teacher_temp": 0.05}
    assert told("seed", **seed, warmup_teacher_temp_epochs=1, queue_length=8)[0]["teacher_temp"] == 0.05


def test_verdicts_are_told_once_a_kind(tmp_path: Path, photos: Path, monkeypatch: Any) -> None:
    told: list[str] = []
    watch = monitor.Monitor(
        tmp_path, replace(RECIPE, n_prototypes=16), collect_pictures([photos]), told.append
    )
    for step in (10, 20, 30):
        watch.logged(
            {
                "step": step,
                "verdicts": {"uniform": "entropy = ln K"} | ({"low-rank": "r"} if step > 10 else {}),
            }
        )
    assert [text.split(" (reported once")[0] for text in told] == ["step 10: entropy = ln K", "step 20: r"]


# -- attention through time


def test_snapshots_are_thinned_and_show_the_same_pictures(tmp_path: Path, photos: Path) -> None:
    backbone = build_network(RECIPE, is_student=False).backbone.train()
    pictures = collect_pictures([photos])
    taken = Snapshots(tmp_path, pictures, Preprocessing(resize_px=37, crop_px=(32, 32)))
    for step in range(40):
        taken.take(backbone, step, torch.device("cpu"))
    steps = list(snapshots(tmp_path))
    assert len(steps) == 12 and steps[0] == 0 and steps[-1] == 39
    assert max(b - a for a, b in pairwise(steps)) <= 8
    with Image.open(tmp_path / "attention" / "photos.jpg") as sheet:
        assert sheet.size == (4 * 144, 144)
    assert backbone.training

    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "1.jpg").write_text("no picture")
    Snapshots(only_bad, collect_pictures([only_bad]), Preprocessing()).take(backbone, 0, torch.device("cpu"))
    assert snapshots(only_bad) == {}


def test_networks_without_attention_get_no_snapshots(tmp_path: Path, photos: Path) -> None:
    convolution = torch.nn.Conv2d(3, 4, 3)
    Snapshots(tmp_path, collect_pictures([photos]), Preprocessing()).take(convolution, 0, torch.device("cpu"))
    assert not (tmp_path / "attention").exists()


# -- TensorBoard and the clock


def test_events_hold_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # a second start from step 0 replaces the first
        with tensorboard.Events(tmp_path, 0) as events:
            events.add({"step": 1, "epoch": 0.1, "loss": 3.0, "verdicts": {}, "effective_rank": None})
            events.add({"step": 2, "epoch": 0.2, "loss": float("nan")})
            events.add({"step": 3, "epoch": 0.3, "loss": 9.0})
    # The run goes on from step 2: what was written later is written again.
    with tensorboard.Events(tmp_path, 2) as events:
        events.add({"step": 3, "epoch": 0.3, "loss": 2.0})
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 3.0), (3, 2.0)]
    assert set(read.Tags()["scalars"]) == {"epoch", "loss"}


def test_events_can_be_left_out_or_insisted_on(tmp_path: Path, monkeypatch: Any) -> None:
    with tensorboard.Events(tmp_path, 0, wanted=False) as events:
        events.add({"step": 1, "loss": 3.0})
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda _name: None)
    with tensorboard.Events(tmp_path, 0) as events:
        events.add({"step": 1, "loss": 3.0})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="pip install tensorboard"):
        tensorboard.Events(tmp_path, 0, wanted=True)


def test_recipes_can_say_so(tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    options = [*tiny_options(), "--set", "tensorboard=false"]
    assert CliRunner().invoke(cli, ["train", str(photos), "-o", str(run), *options]).exit_code == 0
    assert load_recipe(run / "recipe.yaml").tensorboard is False and not (run / "tensorboard").exists()


def test_the_clock_counts_waiting_and_leaves_out_pauses(monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr("dinokit.training.monitoring.pace.time.perf_counter", lambda: now[0])
    pace = Pace()
    for _ in range(2):
        now[0] += 1  # waits
        pace.arrived()
        now[0] += 3  # computes
        pace.stepped(16)
        with pace.paused():
            now[0] += 100  # saves
        pace.waiting()
    assert pace.measure() == {"images_per_s": 4.0, "data_wait": 0.25}
    now[0] += 2
    pace.arrived()
    pace.stepped(10)
    assert pace.measure() == {"images_per_s": 5.0, "data_wait": 1.0}
