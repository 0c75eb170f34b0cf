"""Distillation: a frozen model teaches another network; each part against its formula, then whole runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from pico_vit import PICO
from small_models import SMALL, config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.cli import cli as main
from dinokit.errors import UsageError
from dinokit.export import export_onnx
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.folder import write_model_folder
from dinokit.training import trainer
from dinokit.training.adapt import adapt
from dinokit.training.devices.processes import Processes
from dinokit.training.distillation.frozen_teacher import FrozenTeacher, FrozenTeachers, find_teachers
from dinokit.training.objectives.losses import InfoNCE, Relations, Similarity, SquaredError
from dinokit.training.objectives.targets import make_targets
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.run import checkpoint
from dinokit.training.trainer import train

ALONE = Processes(torch.device("cpu"))
CPU = torch.device("cpu")

SETTINGS = [
    f"arch={PICO}",
    "global_crop_px=32",
    "local_crop_px=16",
    "n_local_crops=1",
    "head_hidden_dim=16",
    "head_bottleneck_dim=8",
    "queue_length=16",
    "epochs=3",
    "batch_size=2",
    "warmup_epochs=0",
    "precision=fp32",
    "workers=0",
    "device=cpu",
    "log_every_steps=1",
    "tensorboard=false",
]


def recipe_of(teacher: Path | str, *settings: str) -> Recipe:
    return with_overrides(load_recipe("distill"), [*SETTINGS, f"distill_from={teacher}", *settings])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    return write_model_folder(folder, config_for(), random_weights()).path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        picture(seed=i).save(folder / f"{i}.png")
    return folder


def directions(*shape: int, seed: int = 0) -> Any:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# -- losses


def seed_cost(student: np.ndarray, target: np.ndarray, queue: np.ndarray, ts: float, tt: float) -> float:
    """One pair of views by Fang et al. 2021, equations 2 to 6: the target itself stands in the queue."""
    student = student.astype(np.float64) / np.linalg.norm(student)
    dictionary = np.vstack([queue, target]).astype(np.float64)
    p = np.exp(dictionary @ target / tt)
    q = np.exp(dictionary @ student / ts)
    return float(-(p / p.sum() * np.log(q / q.sum())).sum())


def test_similarity_is_the_papers_cross_entropy() -> None:
    loss = Similarity(4, 0.2, 0.07, 8, ALONE, same_view=True)
    earlier = directions(1, 5, 4, seed=1)
    loss.remember(earlier)
    student = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2))
    targets = directions(2, 2, 4, seed=3)
    queue = earlier[0].numpy()
    # two global crops with their own target, one local crop with both
    pairs = [(0, 0), (1, 1), (2, 0), (2, 1)]
    expected = np.mean(
        [
            seed_cost(student[s, b].numpy(), targets[t, b].numpy(), queue, 0.2, 0.07)
            for s, t in pairs
            for b in range(2)
        ]
    )
    assert float(loss(student, targets)) == pytest.approx(expected, rel=1e-5)


def test_similarity_with_an_empty_queue_is_zero_and_has_a_finite_gradient() -> None:
    student = torch.randn(2, 3, 4, requires_grad=True)
    cost = Similarity(4, 0.2, 0.04, 8, ALONE, same_view=True)(student, directions(2, 3, 4))
    cost.backward()
    assert cost.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_similarity_falls_to_the_targets_entropy_when_the_student_is_the_teacher() -> None:
    loss = Similarity(4, 0.1, 0.1, 8, ALONE, same_view=True)
    loss.remember(directions(1, 8, 4, seed=1))
    targets = directions(2, 3, 4, seed=2)
    at_teacher = float(loss(targets * 5, targets))
    assert at_teacher < float(loss(directions(2, 3, 4, seed=3), targets))
    # the least that a cross-entropy can be
    shares = torch.softmax(
        torch.cat([torch.ones(2, 3, 1), targets @ loss.queue.T], dim=-1).double() / 0.1, dim=-1
    )
    assert at_teacher == pytest.approx(float(-(shares * shares.log()).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("same_view", [False, True])
def test_pairs_of_views(same_view: bool) -> None:
    student, targets = directions(4, 3, 5, seed=1), directions(2, 3, 5, seed=2)
    pairs = [(s, t) for s in range(4) for t in range(2) if s >= 2 or (s == t) == same_view]
    expected = np.mean([2 - 2 * float(student[s, b] @ targets[t, b]) for s, t in pairs for b in range(3)])
    assert float(SquaredError(same_view=same_view)(student, targets)) == pytest.approx(expected, rel=1e-5)


def test_info_nce_of_the_same_view() -> None:
    loss = InfoNCE(4, 0.2, 8, ALONE, same_view=True)
    earlier = directions(1, 5, 4, seed=1)
    loss.remember(earlier)
    student, targets = directions(2, 3, 4, seed=2), directions(2, 3, 4, seed=3)
    costs = [
        F.cross_entropy(
            torch.cat([student[v, b] @ targets[v, b, :, None], earlier[0] @ student[v, b]])[None] / 0.2,
            torch.zeros(1, dtype=torch.long),
        )
        for v in range(2)
        for b in range(3)
    ]
    assert float(loss(student, targets)) == pytest.approx(float(torch.stack(costs).mean()), rel=1e-5)


def test_relations_are_cosines_among_the_students_own_embeddings() -> None:
    """CompRess with two queues, one by one: the student's picture beside the student's earlier ones."""
    g = torch.Generator().manual_seed(0)
    loss = Relations(
        5, 4, student_temp=0.2, teacher_temp=0.05, queue_length=8, processes=ALONE, same_view=True
    )

    def directions(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=g), dim=-1)

    first, first_targets = torch.randn(2, 3, 4, generator=g).requires_grad_(), directions(2, 3, 5)
    at_first = loss(first, first_targets)
    assert float(at_first.detach()) == 0.0
    at_first.backward()
    assert first.grad is not None and first.grad.abs().max() == 0  # and no NaN
    loss._seen.clear()
    loss(first, first_targets)
    loss.remember(first_targets)
    student, targets = torch.randn(2, 3, 4, generator=g).requires_grad_(), directions(2, 3, 5)
    found = loss(student, targets)

    own, theirs = F.normalize(first.detach()[0], dim=-1), first_targets[0]
    costs = []
    for view in range(2):
        for b in range(3):
            shares = torch.softmax(torch.stack([targets[view, b] @ t for t in theirs]) / 0.05, dim=0)
            cosines = torch.stack([F.normalize(student[view, b], dim=0) @ e for e in own])
            costs.append(-(shares * torch.log_softmax(cosines / 0.2, dim=0)).sum())
    assert float(found.detach()) == pytest.approx(float(torch.stack(costs).mean().detach()), rel=1e-5)
    found.backward()
    assert student.grad is not None and student.grad.abs().min() > 0


def test_relations_forget_the_oldest_and_keep_pairs_together() -> None:
    loss = Relations(2, 3, student_temp=0.1, teacher_temp=0.1, queue_length=4, processes=ALONE)
    for step in range(3):
        for piece in range(2):  # a batch in two pieces enters once
            loss(torch.full((1, 1, 3), 2.0 * step + piece + 1), torch.ones(1, 1, 2))
        loss.remember(torch.full((1, 2, 2), float(step)) + torch.tensor([[[0.0], [0.5]]]))
    assert loss.queue[:, 0].tolist() == [2.0, 2.5, 1.0, 1.5]
    assert int(loss.n_queued) == 6 and loss._seen == []
    torch.testing.assert_close(loss.own, torch.full((4, 3), 3**-0.5))


def test_relations_train_without_a_head(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        f"[{teacher}, hog]", "loss=relations", "epochs=8", "n_local_crops=0", "batch_size=6", "lr=0.02"
    )
    state = train([pictures], tmp_path / "run", recipe)
    assert {name.split(".")[0] for name, _ in state.student.named_parameters()} == {"backbone"}
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[0] == 0 < losses[-1] < max(losses)
    assert "CompRess" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    further = with_overrides(recipe, [f"init_from={tmp_path / 'run'}", "epochs=1"])
    train([pictures], tmp_path / "further", further)  # and a run begins with it
    guessing = with_overrides(further, ["loss=similarity"])
    told: list[str] = []

    class Listening(trainer.Observer):
        def warned(self, message: str) -> None:
            told.append(message)

    assert train([pictures], tmp_path / "guessing", guessing, observer=Listening()).student.head is not None
    assert any("has no projection head; a new one starts" in message for message in told)
    back = with_overrides(further, [f"init_from={tmp_path / 'guessing'}"])
    train([pictures], tmp_path / "back", back, observer=Listening())
    assert any("the projection head of" in message and "left out" in message for message in told)
    with pytest.raises(UsageError, match="the embeddings themselves, without a head"):
        with_overrides(recipe, ["predictor=true"])
    with pytest.raises(UsageError, match="loss=relations learns from a pretrained model"):
        find_teachers(with_overrides(load_recipe("distill"), ["loss=relations"]))


def test_relations_to_other_teachers_begin_with_a_run_and_a_new_centre(
    teacher: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = ("loss=relations", "target_normalisation=centering", "epochs=1")
    train([pictures], tmp_path / "both", recipe_of(f"[{teacher}, hog]", *settings))
    told: list[str] = []

    class Listening(trainer.Observer):
        def warned(self, message: str) -> None:
            told.append(message)

    begun = f"init_from={tmp_path / 'both'}"
    train([pictures], tmp_path / "one", recipe_of(teacher, *settings, begun), observer=Listening())
    assert told == [f"the centre of {tmp_path / 'both'} belongs to other teachers; it starts at 0"]
    told.clear()
    same = recipe_of(f"[{teacher}, hog]", *settings, begun)
    train([pictures], tmp_path / "same", same, observer=Listening())
    assert told == []


def test_relations_of_a_student_wider_than_its_teacher(pictures: Path, tmp_path: Path) -> None:
    narrow = VitArchitecture(embed_dim=24, depth=1, num_heads=3, patch_size=8, image_size=(32, 32))
    teacher = write_model_folder(tmp_path / "narrow", config_for(narrow), random_weights(narrow)).path
    recipe = recipe_of(teacher, "loss=relations", "keep_checkpoints=9", "lr=0.02")
    state = train([pictures], tmp_path / "whole", recipe)
    assert (state.student.embed_dim, state.recipe.n_prototypes) == (48, 24)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for later in checkpoint.checkpoints(tmp_path / "again" / "checkpoint")[1:]:
        later.unlink()
    train([pictures], tmp_path / "again", recipe)

    def seen(run: Path) -> list[Any]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["effective_rank"], line["uniformity"]) for line in lines]

    whole = seen(tmp_path / "whole")
    assert len(whole) == 9 and all(rank is not None for _, rank, _ in whole)
    assert seen(tmp_path / "again") == whole


# -- the teacher


def test_its_outputs_are_the_models_embeddings_whatever_the_students_normalisation(teacher: Path) -> None:
    recipe = recipe_of(teacher, "mean=[0.1, 0.2, 0.3]", "std=[0.5, 0.4, 0.3]")
    (located,) = find_teachers(recipe)
    frozen = FrozenTeacher(located, recipe, CPU)
    pixels = torch.rand(2, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3)))
    embeddings = frozen((pixels - mean) / std)

    backbone = load_backbone(teacher, engine="onnx")
    own = backbone.preprocessing
    own_mean, own_std = (np.array(v, np.float32)[:, None, None] for v in (own.mean, own.std))
    expected = backbone._engine.run((pixels.flatten(0, 1).numpy() - own_mean) / own_std, ("pooler_output",))[
        "pooler_output"
    ]
    np.testing.assert_allclose(embeddings.flatten(0, 1).numpy(), expected, atol=2e-4)


def test_several_teachers_count_alike(teacher: Path, tmp_path: Path) -> None:
    wide = replace(SMALL, embed_dim=24, num_heads=3)
    other = write_model_folder(tmp_path / "other", config_for(wide), random_weights(wide, seed=1)).path
    recipe = recipe_of(f"[{teacher}, {other}]")
    found = find_teachers(recipe)
    complete, _ = adapt(recipe, 10, teacher_dim=72)
    teachers = FrozenTeachers(found, complete, CPU)
    assert teachers.widths == (48, 24)
    crops = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    targets = make_targets(complete, ALONE, teachers.widths).targets(teachers(crops), 0.1)
    alone = [F.normalize(FrozenTeacher(one, complete, CPU)(crops), dim=-1).flatten(0, 1) for one in found]
    expected = (alone[0] @ alone[0].T + alone[1] @ alone[1].T) / 2
    flat = targets.flatten(0, 1)
    torch.testing.assert_close(flat @ flat.T, expected, atol=1e-5, rtol=1e-5)


def test_crops_that_it_cannot_take_are_made_larger(teacher: Path) -> None:
    recipe = recipe_of(teacher)
    (located,) = find_teachers(recipe)
    frozen = FrozenTeacher(located, recipe, CPU)  # patches of 8 pixels
    assert frozen.takes((32, 48)) == (32, 48)
    assert frozen.takes((33, 25)) == (40, 32)
    assert frozen(torch.zeros(2, 1, 3, 33, 25)).shape == (2, 1, SMALL.embed_dim)


def test_a_convolutional_teacher_stays_as_it_is(pictures: Path, tmp_path: Path) -> None:
    large = with_overrides(
        load_recipe("resnet50"), [*SETTINGS, "arch=resnet10t", "epochs=1", "n_prototypes=16"]
    )
    train([pictures], tmp_path / "large", large)
    recipe = recipe_of(tmp_path / "large")
    (located,) = find_teachers(recipe)
    frozen = FrozenTeacher(located, recipe, CPU).train()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    crops = torch.randn(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    embeddings = frozen(crops)
    assert embeddings.shape == (2, 2, 512)
    # a picture's embedding is its own, whatever else is in the batch: BatchNorm as it was trained
    torch.testing.assert_close(frozen(crops[:, :1]), embeddings[:, :1], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


# -- runs


def test_a_student_comes_nearer_to_its_teacher(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        teacher, "loss=squared_error", "epochs=12", "lr=0.1", "n_local_crops=0", "batch_size=6"
    )
    state = train([pictures], tmp_path / "run", recipe)
    assert state.recipe.n_prototypes == SMALL.embed_dim
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert lines[-1]["effective_rank"] is not None  # of the student: the teacher does not change
    # what comes out is the student's moving average
    found = load_backbone(tmp_path / "run", engine="torch").module.state_dict()
    assert torch.equal(found["norm.weight"], state.teacher.state_dict()["backbone.norm.weight"])
    assert not torch.equal(found["norm.weight"], torch.ones(192))


def test_a_convolutional_student_comes_out_with_its_statistics(
    teacher: Path, pictures: Path, tmp_path: Path
) -> None:
    """Nobody shows pictures to the moving average, so BatchNorm's statistics must come from the student."""
    recipe = recipe_of(teacher, "arch=resnet10t", "initialisation=reference", "teacher=student", "epochs=1")
    state = train([pictures], tmp_path / "run", recipe)
    student = state.student.backbone.eval()
    found = load_backbone(tmp_path / "run", engine="torch").module
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found(pixels), student(pixels))


@pytest.mark.parametrize("loss", ["similarity", "info_nce", "relations"])
def test_going_on_is_as_never_stopped(teacher: Path, pictures: Path, tmp_path: Path, loss: str) -> None:
    recipe = recipe_of(teacher, f"loss={loss}", "keep_checkpoints=9", "target_normalisation=centering")
    whole = train([pictures], tmp_path / "whole", recipe)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for later in checkpoint.checkpoints(tmp_path / "again" / "checkpoint")[1:]:
        later.unlink()
    again = train([pictures], tmp_path / "again", recipe)
    assert again.step == whole.step == 9
    for part in ("student", "teacher", "targets", "loss"):
        ours, theirs = getattr(again, part).state_dict(), getattr(whole, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_teacher_cannot_go_on_with_a_run(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(teacher, mine)
    train([pictures], tmp_path / "run", recipe_of(mine, "epochs=1"))
    shutil.rmtree(mine)
    write_model_folder(mine, config_for(), random_weights(seed=1))
    with pytest.raises(UsageError, match="has other weights"):
        train([pictures], tmp_path / "run", recipe_of(mine, "epochs=1"))


def test_a_teacher_may_move_while_a_run_waits(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    here, moved, other = tmp_path / "here", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(teacher, here)
    run = tmp_path / "run"
    train([pictures], run, recipe_of(here, "epochs=2", "keep_checkpoints=9"))
    checkpoint.checkpoints(run / "checkpoint")[-1].unlink()
    here.rename(moved)
    before = (run / "recipe.yaml").read_bytes()
    write_model_folder(other, config_for(), random_weights(seed=1))
    with pytest.raises(UsageError, match=r"distill_from=.*other has other weights"):
        train([pictures], run, recipe_of(other, "epochs=2", "keep_checkpoints=9"))
    assert (run / "recipe.yaml").read_bytes() == before
    assert train([pictures], run, recipe_of(moved, "epochs=2", "keep_checkpoints=9")).step == 6
    assert load_recipe(run / "recipe.yaml").distill_from == str(moved)


# -- what cannot be


def test_what_cannot_teach_is_refused_with_what_to_do(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    onnx = tmp_path / "teacher.onnx"
    export_onnx(load_backbone(teacher, engine="torch").module, onnx, photos=pictures)
    with pytest.raises(UsageError, match="dino_vits16"):
        find_teachers(recipe_of("dino_vits61"))
    with pytest.raises(UsageError, match="ONNX file"):
        find_teachers(recipe_of(onnx))
    with pytest.raises(UsageError, match="use channels=3"):
        find_teachers(recipe_of(teacher, "channels=1"))
    with pytest.raises(UsageError, match="leave n_prototypes open: --set n_prototypes=null"):
        find_teachers(recipe_of(teacher, "n_prototypes=7"))
    with pytest.raises(UsageError, match="--distill-from MODEL"):
        find_teachers(load_recipe("distill"))
    with pytest.raises(UsageError, match="--recipe distill"):
        replace(load_recipe("default"), distill_from="starter")
    assert find_teachers(load_recipe("default")) == []


def test_the_heads_width_is_the_teachers() -> None:
    recipe = replace(load_recipe("distill"), distill_from="starter", teacher_momentum=None)
    complete, choices = adapt(recipe, 1000, teacher_dim=192)
    reasons = {choice.key: choice.reason for choice in choices}
    assert "the moving average must follow faster" in reasons["teacher_momentum"]
    assert complete.n_prototypes == 192
    assert "starter" in reasons["n_prototypes"]


def test_the_command(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    words = ["train", str(pictures), "--recipe", "distill", "--distill-from", str(teacher)]
    words += [word for setting in [*SETTINGS, "epochs=1"] for word in ("--set", setting)]
    explained = CliRunner().invoke(main, [*words, "--explain"])
    assert explained.exit_code == 0, explained.output
    assert "n_prototypes: 48" in explained.output
    labelled = tmp_path / "labelled.csv"
    rows = [f"{path},{'ab'[i % 2]}\n" for i, path in enumerate(sorted(pictures.glob("*.png")))]
    labelled.write_text("path,label\n" + "".join(rows), encoding="utf-8")
    trained = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "run"), "--labelled", str(labelled)])
    assert trained.exit_code == 0, trained.output
    assert "k-NN after epoch 1: moving average " in trained.output  # the teacher is not what was measured
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert record["runs"][-1]["recipe"]["distill_from"] == teacher.parent.name  # no path of the machine
    without = CliRunner().invoke(
        main, ["train", str(pictures), "--recipe", "distill", "-o", str(tmp_path / "x")]
    )
    assert without.exit_code == 2
    assert "--distill-from MODEL" in without.output
