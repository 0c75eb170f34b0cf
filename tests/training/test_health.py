"""What shows that a run learns or collapses: the measures against numpy, the verdicts, and runs that do collapse."""

from __future__ import annotations

import io
import json
import math
import random
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from stop_after import StopAfter
from tiny_runs import RECIPE, tiny_options, weights
from torch import nn

from dinokit import load_backbone
from dinokit.card.run_files import logged_metrics
from dinokit.classifiers.knn import KNNClassifier
from dinokit.cli import cli
from dinokit.errors import UsageError
from dinokit.pictures.preprocess import Preprocessing
from dinokit.training.monitoring.collapse import alignment, effective_rank, uniformity
from dinokit.training.monitoring.evaluation import KNNProbe, embed_crops, find_labelled_set
from dinokit.training.monitoring.health import Health
from dinokit.training.monitoring.monitor import Monitor
from dinokit.training.monitoring.verdicts import Signs, verdicts
from dinokit.training.networks.head import ProjectionHead
from dinokit.training.networks.network import Network, NetworkOutput
from dinokit.training.recipe import Recipe
from dinokit.training.trainer import TrainingState, train, training_step
from dinokit.training.views.pictures import TrainingPictures, collect_pictures

# -- measures


def rank_by_numpy(x: Any) -> float:
    singular = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    share = singular / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (30, 30)])
def test_the_effective_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * rng.uniform(0.1, 3, shape[1])).astype(np.float32)
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(rank_by_numpy(x), rel=1e-5)


def test_the_effective_rank_of_what_is_known() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(50, 9) * torch.arange(9)) == pytest.approx(1, abs=1e-5)  # all the same
    assert effective_rank(torch.zeros(4, 3)) is None
    assert effective_rank(torch.full((4, 3), math.nan)) is None


def test_alignment_and_uniformity_pair_by_pair() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9, 5))
    unit_a, unit_b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    expected = np.mean([((p - q) ** 2).sum() for p, q in zip(unit_a, unit_b, strict=True)])
    assert alignment(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-5)
    pairs = [np.exp(-2 * ((unit_a[i] - unit_a[j]) ** 2).sum()) for i in range(9) for j in range(i)]
    assert uniformity(torch.tensor(a)) == pytest.approx(np.log(np.mean(pairs)), rel=1e-5)
    assert uniformity(torch.ones(3, 5)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.ones(1, 5)) is None


# -- verdicts

SOUND = Signs(
    n_prototypes=1024,
    loss=3.5,
    teacher_entropy=1.8,
    prototypes_used=0.3,
    views_seen=100_000,
    effective_rank=150.0,
    n_embeddings=512,
    n_dimensions=192,
    progress=0.5,
    steps_at_chance=0,
)
LN_K = math.log(1024)


@pytest.mark.parametrize(
    ("changes", "kind", "remedy"),
    [
        ({"loss": LN_K, "teacher_entropy": LN_K - 0.01}, "uniform", "lower teacher_temp"),
        (
            {"loss": 0.02, "teacher_entropy": 0.01, "prototypes_used": 1 / 1024},
            "one-prototype",
            "lower center_momentum",
        ),
        (
            {"prototypes_used": 5 / 1024},  # with sharp targets, which a lower temperature would sharpen more
            "few-prototypes",
            "only 5 of 1024 .* lower n_prototypes or center_momentum",
        ),
        (
            {"prototypes_used": 5 / 1024, "teacher_entropy": 5.0, "loss": 5.5},
            "few-prototypes",
            "only 5 of 1024 .* lower n_prototypes or teacher_temp",
        ),
        ({"effective_rank": 10.0}, "low-rank", "use 10 of 192 dimensions.*lower teacher_temp"),
        (
            {"effective_rank": 10.0, "teacher_entropy": None},  # BYOL, MoCo, a distillation
            "low-rank",
            "will be hard to tell apart; use milder crops",
        ),
        (
            {"loss": 6.9, "steps_at_chance": 20},
            "loss-at-chance",
            "stays at chance: for 20 logged steps.*97% of ln K = 6.93, .*now 6.90",
        ),
    ],
)
def test_verdicts_name_what_is_wrong_and_the_remedy(changes: dict[str, Any], kind: str, remedy: str) -> None:
    assert verdicts(SOUND) == {}
    found = verdicts(replace(SOUND, **changes))
    assert list(found) == [kind]
    assert re.search(remedy, found[kind]), found[kind]


@pytest.mark.parametrize(
    "changes",
    [
        # At the start the teacher is near uniform, but the student does not agree yet.
        {"loss": LN_K + 0.7, "teacher_entropy": LN_K - 0.01},
        # A student that has learned sharp targets by heart, over many prototypes.
        {"loss": 0.02, "teacher_entropy": 0.01},
        # Too few views or embeddings, or too early, to tell.
        {"prototypes_used": 5 / 1024, "views_seen": 500},
        {"effective_rank": 10.0, "n_embeddings": 100},
        {"effective_rank": 10.0, "progress": 0.05},
        {"effective_rank": None},
    ],
)
def test_no_false_alarm(changes: dict[str, Any]) -> None:
    assert verdicts(replace(SOUND, **changes)) == {}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"loss": 0.985 * LN_K, "teacher_entropy": 0.981 * LN_K}, "uniform"),
        ({"loss": 0.98 * LN_K, "teacher_entropy": 0.979 * LN_K}, None),
        (
            {"loss": 0.019 * LN_K, "teacher_entropy": 0.019 * LN_K, "prototypes_used": 1 / 1024},
            "one-prototype",
        ),
        ({"prototypes_used": 10 / 1024, "views_seen": 4096}, "few-prototypes"),
        ({"prototypes_used": 11 / 1024, "views_seen": 4096}, None),
        ({"prototypes_used": 10 / 1024, "views_seen": 4095}, None),
        ({"effective_rank": 19.1, "n_embeddings": 256, "progress": 0.11}, "low-rank"),
        ({"effective_rank": 19.3, "n_embeddings": 256, "progress": 0.11}, None),
        ({"effective_rank": 19.1, "n_embeddings": 255, "progress": 0.11}, None),
        ({"effective_rank": 19.1, "n_embeddings": 256, "progress": 0.1}, None),
        ({"loss": 6.9, "steps_at_chance": 19}, None),
    ],
)
def test_where_the_limits_of_the_verdicts_lie(changes: dict[str, Any], kind: str | None) -> None:
    assert list(verdicts(replace(SOUND, **changes))) == ([] if kind is None else [kind])


def test_steps_at_chance_count_in_a_row_and_over_an_interruption() -> None:
    def told(health: Health, count: int, loss: float = 0.975 * LN_K, warming_up: bool = False) -> bool:
        found = [
            health.measure(loss=loss, entropy=1.8, progress=0.5, warming_up=warming_up) for _ in range(count)
        ]
        return any("loss-at-chance" in line["verdicts"] for line in found)

    health, resumed = Health(1024), Health(1024)
    assert not told(health, 30, warming_up=True) and not told(health, 30, loss=0.965 * LN_K)
    assert not told(health, 19) and not told(health, 1, loss=3.0) and not told(health, 12)
    resumed.load_state_dict(health.state_dict())
    assert not told(resumed, 7) and told(resumed, 1)


# -- the windows


def test_the_windows_hold_the_last_views_and_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    health, chosen, embedded = Health(8), [], []
    for _ in range(40):
        logits = torch.randn(2, 30, 8, generator=generator) + torch.tensor([4.0, 4, 1, 1, 0, 0, 0, 0])
        embeddings = torch.randn(2, 30, 6, generator=generator) * torch.arange(1, 7)
        health.observe(logits, embeddings)
        chosen.append(logits.argmax(dim=-1).flatten().numpy())
        embedded.append(embeddings.transpose(0, 1).numpy())
    measured = health.measure(loss=2.0, entropy=1.0, progress=0.5)
    # 4K = 32 views are fewer than one batch of 60, which counts whole.
    assert measured["prototypes_used"] == pytest.approx(len(set(chosen[-1])) / 8)
    last = np.concatenate(embedded)[-512:]
    assert measured["effective_rank"] == pytest.approx(rank_by_numpy(last[:, 0]), abs=1e-4)
    expected = alignment(torch.from_numpy(last[:, 0]), torch.from_numpy(last[:, 1]))
    assert measured["alignment"] == pytest.approx(expected, abs=1e-4)
    assert measured["loss_over_ln_k"] == pytest.approx(2 / math.log(8), abs=1e-5)

    again = Health(8)
    again.load_state_dict(health.state_dict())
    assert again.measure(loss=2.0, entropy=1.0, progress=0.5) == measured
    again.observe(logits, embeddings), health.observe(logits, embeddings)
    assert again.measure(loss=2.0, entropy=1.0, progress=0.5) == health.measure(
        loss=2.0, entropy=1.0, progress=0.5
    )
    other = Health(9)  # another number of prototypes: the window begins anew
    other.load_state_dict(health.state_dict())
    assert other.views_seen == 0


def test_a_prototype_that_is_no_longer_chosen_is_forgotten() -> None:
    health = Health(4)
    for prototype, steps in ((0, 3), (1, 10)):
        for _ in range(steps):
            health.observe(torch.eye(4)[prototype].expand(1, 2, 4), torch.ones(1, 2, 3))
        expected = {0: 1 / 4, 1: 1 / 4}[prototype]  # the window is 16 views, 8 steps
        assert health.measure(loss=1.0, entropy=0.5, progress=0)["prototypes_used"] == expected


def test_nothing_seen_and_nothing_finite_do_not_stop_a_run() -> None:
    health = Health(4)
    assert health.measure(loss=1.0, entropy=0.5, progress=0)["effective_rank"] is None
    health.observe(torch.full((2, 3, 4), math.nan), torch.full((2, 3, 5), math.nan))
    measured = health.measure(loss=math.nan, entropy=math.nan, progress=0.5)
    assert measured["effective_rank"] is None and measured["alignment"] is None and measured["verdicts"] == {}


def test_the_centre_is_taken_off_what_is_watched() -> None:
    class Teacher(nn.Module):
        def forward(self, _x: Any) -> NetworkOutput:
            return NetworkOutput(torch.tensor([[[3.0, 2.0, 0.0]]]), torch.ones(1, 1, 4))

    teacher, centering, health = Teacher(), nn.Module(), Health(3)
    centering.center = torch.tensor([[3.0, 0.0, 0.0]])
    health.watch(teacher, centering)
    teacher(None)
    assert health.state_dict()["last_chosen"].tolist() == [-1, 1, -1]


# -- runs that collapse


def short_run(**changes: Any) -> tuple[list[float], dict[str, Any]]:
    """Teacher entropies of 200 steps of a two-layer network on 32 noisy patterns, and what is said at the end."""
    torch.manual_seed(2)
    values = {
        "n_prototypes": 16, "epochs": 1, "batch_size": 32, "teacher_momentum": 0.95, "teacher_temp": 0.03,
        "warmup_teacher_temp": 0.03, "warmup_teacher_temp_epochs": 0, "warmup_epochs": 0, "lr": 0.02, "min_lr": 0.002,
        "weight_decay": 0.0, "weight_decay_end": 0.0, "freeze_last_layer_epochs": 0, "precision": "fp32",
        "device": "cpu",
    }  # fmt: skip

    def network() -> Network:
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 16))
        return Network(backbone, ProjectionHead(16, 16, hidden_dim=32, bottleneck_dim=8))

    state = TrainingState.create(Recipe(**(values | changes)), network(), network(), steps_per_epoch=200)
    health, generator = Health(16), torch.Generator().manual_seed(3)
    health.watch(state.teacher, state.targets)
    patterns = torch.randn(32, 3, 4, 4, generator=generator)
    entropies = []
    for _ in range(200):
        views = [patterns + 0.3 * torch.randn(patterns.shape, generator=generator) for _ in range(2)]
        result = training_step(state, [torch.stack(views)])
        entropies.append(float(result.teacher_entropy))
    return entropies, health.measure(loss=float(result.loss), entropy=entropies[-1], progress=1.0)


def test_with_centering_and_sharpening_a_run_does_not_collapse() -> None:
    entropies, measured = short_run()
    assert 0.05 < entropies[-1] < 0.9 * math.log(16)
    assert measured["prototypes_used"] > 2 / 16 and not {"uniform", "one-prototype"} & set(
        measured["verdicts"]
    )


def test_without_sharpening_the_entropy_rises_to_ln_k() -> None:
    # The teacher's temperature is the student's (paper, §5.3).
    entropies, measured = short_run(teacher_temp=0.1, warmup_teacher_temp=0.1)
    assert entropies[0] < 0.5 * math.log(16)
    assert entropies[-1] == pytest.approx(math.log(16), abs=0.02)
    assert "uniform" in measured["verdicts"]


def test_without_centering_the_entropy_falls_to_0() -> None:
    entropies, measured = short_run(center_momentum=1.0)  # the centre stays at 0
    assert entropies[0] > 0.2
    assert entropies[-1] < 0.005
    assert measured["prototypes_used"] == 1 / 16
    assert "one-prototype" in measured["verdicts"]


# -- k-NN during training


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes of six pictures: reddish and bluish noise."""
    rng = random.Random(0)
    for name, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(6):
            noisy = tuple(channel + rng.randint(-30, 30) for channel in colour)
            Image.new("RGB", (40, 36), noisy).save(tmp_path / "classes" / name / f"{number}.png")
    return tmp_path / "classes"


def test_labels_from_folders_csv_shards_and_tables_are_the_same(classes: Path, tmp_path: Path) -> None:
    files = sorted(classes.rglob("*.png"))
    expected = [path.parent.name for path in files]
    (classes / "labels.csv").write_text(
        "path,label\n" + "".join(f"{p.relative_to(classes)},{p.parent.name}\n" for p in files)
    )
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for number, path in enumerate(files):
            for name, content in (
                (f"v1.0/{number:03}.png", path.read_bytes()),
                (f"v1.0/{number:03}.cls", path.parent.name.encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    table = pa.table({"image": [p.read_bytes() for p in files], "label": expected})
    pq.write_table(table, tmp_path / "table.parquet")
    packed = tmp_path / "packed.tar.gz"  # which can be read in its own order only
    with tarfile.open(packed, "w:gz") as tar:
        for path in files:
            tar.add(path, path.relative_to(classes))
    for source in (classes, classes / "labels.csv", tmp_path / "shards", tmp_path / "table.parquet"):
        found = find_labelled_set(source)
        assert found.labels == expected, source
        for number, path in enumerate(files):
            content = TrainingPictures(found.paths).read(number)
            assert (content.read_bytes() if isinstance(content, Path) else content) == path.read_bytes()
    see = Preprocessing(resize_px=(32, 32), crop_px=(32, 32))
    seen: list[Any] = []
    network = nn.Sequential(nn.Flatten())
    network.register_forward_hook(lambda _module, pixels, _out: seen.append(pixels[0].numpy()))
    assert KNNProbe(packed, None, see).score(network, torch.device("cpu")) == 1  # colours tell them apart
    right = see.normalise(np.stack([see.crop(Image.open(path)) for path in files]))
    np.testing.assert_array_equal(np.concatenate(seen), right)


def test_sources_without_labels_are_refused_with_a_way_out(
    classes: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no folders; expected one subfolder per class"):
        find_labelled_set(photos)
    with pytest.raises(UsageError, match="one class only, 'red'"):
        (tmp_path / "one").mkdir()
        (classes / "red").rename(tmp_path / "one" / "red")
        find_labelled_set(tmp_path / "one")
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "bare.parquet")
    with pytest.raises(UsageError, match="none of its 1 pictures has a label; expected a column of labels"):
        find_labelled_set(tmp_path / "bare.parquet")
    pq.write_table(pa.table({"embedding": [[0.0]]}), tmp_path / "embedded.parquet")
    with pytest.raises(
        UsageError, match="is a table of embeddings, and k-NN during training needs the pictures"
    ):
        find_labelled_set(tmp_path / "embedded.parquet")
    with tarfile.open(tmp_path / "bare.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(UsageError, match=r"none of its 1 pictures has a label.* a \.cls file beside each"):
        find_labelled_set(tmp_path / "bare.tar")


def test_k_nn_in_training_is_k_nn_of_the_model_that_comes_out(
    classes: Path, photos: Path, tmp_path: Path
) -> None:
    labelled = replace(RECIPE, labelled=str(classes))
    state = train([photos], tmp_path / "run", labelled)
    lines = list(logged_metrics(tmp_path / "run"))
    assert [line["step"] for line in lines if "knn_teacher" in line] == [0, 2, 4]
    assert lines[0]["knn_teacher"] == lines[0]["knn_student"] and set(lines[0]) == {
        "step", "epoch", "knn_teacher", "knn_student",
    }  # fmt: skip

    files = sorted(classes.rglob("*.png"))
    features = load_backbone(str(tmp_path / "run")).embed([str(path) for path in files])
    knn = KNNClassifier(k=11).fit(features, [path.parent.name for path in files])
    assert lines[-1]["knn_teacher"] == pytest.approx(knn.leave_one_out_score(), abs=1e-5)

    # It changes nothing in the run: the weights are those of a run without labels.
    plain = train([photos], tmp_path / "plain", RECIPE)
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(state)[name]), name


def test_the_probe_leaves_the_network_and_the_generators_as_they_were(classes: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 8), nn.BatchNorm1d(8))
    net[1].eval()  # not all parts need be in the same mode
    before, drawn, numpy_drawn = (
        net[3].running_mean.clone(),
        torch.get_rng_state(),
        str(np.random.get_state()),
    )
    small = Preprocessing(resize_px=18, crop_px=(16, 16))
    told: list[str] = []
    (classes / "red" / "9.png").write_text("no picture")
    probe = KNNProbe(classes, None, small, on_problem=told.append)
    assert probe.score(net, torch.device("cpu")) == probe.score(net, torch.device("cpu")) > 0.9
    assert [part.training for part in net] == [True, False, True, True] and net.training
    assert torch.equal(net[3].running_mean, before) and torch.equal(torch.get_rng_state(), drawn)
    assert str(np.random.get_state()) == numpy_drawn
    assert len(told) == 1 and "9.png" in told[0]

    # Queries of their own, and no more than asked for.
    few = KNNProbe(classes, classes, small, limit=7)
    assert few.score(net, torch.device("cpu")) > 0.4
    assert len(embed_crops(net, np.zeros((0, 16, 16, 3), np.uint8), small, torch.device("cpu"))) == 0
    others = classes.parent / "others"
    for name in ("cat", "dog"):
        (others / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(others / name / "1.png")
    with pytest.raises(UsageError, match="have no label in common"):
        KNNProbe(classes, others, small)


def test_the_command_tells_k_nn_and_refuses_what_has_no_labels(
    classes: Path, photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def invoke(*more: Any) -> Any:
        return CliRunner().invoke(
            cli, ["train", str(photos), "-o", str(run), *tiny_options(), *map(str, more)]
        )

    refused = invoke("--labelled", photos)
    assert (
        refused.exit_code == 2 and "expected one subfolder per class" in refused.stderr and not run.exists()
    )
    assert "labelled_queries needs labelled" in invoke("--labelled-queries", classes).stderr
    done = invoke("--labelled", classes, "--json")
    assert done.exit_code == 0, done.output
    assert "k-NN after epoch 2: teacher " in done.stderr
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(done.stdout)["knn_teacher"] == last["knn_teacher"]


def test_features_that_are_lost_are_told_of_and_the_licence_comes_along(
    classes: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invoke(run: Path, *more: Any) -> Any:
        words = ["train", str(photos), "-o", str(run), *tiny_options(), *map(str, more)]
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, done.output
        return done

    first, second = tmp_path / "first", tmp_path / "second"
    invoke(first, "--set", "licence=cc-by-4.0")
    # teacher and student before training, after one epoch (by chance, of 12 pictures) and after two (not by chance)
    measured = iter([0.9, 0.9, 0.75, 0.75, 0.7, 0.9])
    monkeypatch.setattr(KNNProbe, "score", lambda *_: next(measured))
    freeze = ("--set", "freeze_backbone_epochs=1")  # which needs --init-from
    told = invoke(second, "--init-from", first, "--labelled", classes, *freeze).stderr
    assert "k-NN before training: 90.0%" in told
    assert (
        "step 4: k-NN is 70.0% and was 90.0% before training" in told and "freeze_backbone_epochs=1" in told
    )
    lines = list(logged_metrics(second))
    assert [list(line.get("verdicts", {})) for line in lines if "knn_teacher" in line] == [
        [], [], ["lost-features"],
    ]  # fmt: skip
    assert f"licence = cc-by-4.0 (that of {first}" in told
    assert load_backbone(str(second)).config.licence == "cc-by-4.0"


def test_a_verdict_of_k_nn_holds_until_the_next_whatever_comes_between(
    classes: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train([photos], tmp_path / "first", replace(RECIPE, epochs=1))
    recipe = replace(
        RECIPE, epochs=5, init_from=str(tmp_path / "first"), labelled=str(classes), knn_every_epochs=2
    )
    # After epochs 0, 2, 4 and 5, of teacher and student.
    scores = [0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9]

    def measured(run: str, scores: list[float], *stops: int, then: Recipe = recipe) -> list[list[str]]:
        left = iter(scores)
        monkeypatch.setattr(KNNProbe, "score", lambda *_: next(left))
        for stop in stops:
            train([photos], tmp_path / run, recipe, observer=StopAfter(stop))
        train([photos], tmp_path / run, then, observer=StopAfter(-1))
        assert next(left, None) is None
        lines = list(logged_metrics(tmp_path / run))
        assert [line["step"] for line in lines] == list(range(11))
        return [list(line.get("verdicts", {})) for line in lines]

    lost = [[]] * 4 + [["lost-features"]] * 6 + [[]]
    assert measured("whole", scores) == measured("cut", scores, 3, 5, 7) == lost
    # Other labels have no beginning to compare with, and go back to it when they are the first ones again.
    others = replace(recipe, knn_images=11)
    assert measured("others", scores, 5, then=others) == [[]] * 4 + [["lost-features"]] * 2 + [[]] * 5
    monkeypatch.setattr(KNNProbe, "score", lambda *_: 0.1)
    begun = tmp_path / "back"
    train([photos], begun, replace(recipe, epochs=5), observer=StopAfter(5))
    train([photos], begun, others, observer=StopAfter(9))
    train([photos], begun, others, observer=StopAfter(-1))
    assert not any(line["verdicts"] for line in list(logged_metrics(begun))[6:])


def test_without_a_head_none_is_told_to_learn_alone(tmp_path: Path, photos: Path, classes: Path) -> None:
    for loss, told in (("relations", False), ("similarity", True)):
        recipe = replace(RECIPE, init_from="runs/x", labelled=str(classes), distill_from="hog", loss=loss)
        watch = Monitor(tmp_path, replace(recipe, n_prototypes=8), collect_pictures([photos]), print)
        watch._knn_before = 0.9
        said = watch._lost_features(0.1)
        assert said is not None and "Start again with a lower lr" in said
        assert ("freeze_backbone_epochs" in said) == told
