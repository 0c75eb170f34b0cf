"""The parts that DINO is built of, exchanged for those of SwAV, BYOL and MoCo: each against its formula, then a run."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from pico_vit import PICO
from stop_after import StopAfter

from dinokit.errors import UsageError
from dinokit.training.adapt import adapt
from dinokit.training.devices.processes import Processes
from dinokit.training.networks.network import build_network
from dinokit.training.objectives.koleo import koleo_loss
from dinokit.training.objectives.losses import InfoNCE, SquaredError
from dinokit.training.objectives.predictor import Predictor
from dinokit.training.objectives.targets import Directions, Sinkhorn
from dinokit.training.objectives.teacher import TEACHER_RULES, copy_student, update_teacher
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.run import checkpoint
from dinokit.training.run.state import TrainingState
from dinokit.training.step import pass_over
from dinokit.training.trainer import train, training_step

ALONE = Processes(torch.device("cpu"))

SETTINGS = [
    f"arch={PICO}",
    "global_crop_px=32",
    "local_crop_px=16",
    "n_local_crops=1",
    "n_prototypes=16",
    "head_hidden_dim=16",
    "head_bottleneck_dim=8",
    "epochs=3",
    "batch_size=2",
    "warmup_epochs=1",
    "precision=fp32",
    "workers=0",
    "device=cpu",
    "log_every_steps=1",
    "tensorboard=false",
]
METHODS = {
    "dino-sinkhorn": ["target_normalisation=sinkhorn"],
    "swav": ["target_normalisation=sinkhorn", "teacher=student"],
    "byol": ["loss=squared_error", "target_normalisation=none", "predictor=true", "head_batch_norm=true"],
    "moco": ["loss=info_nce", "target_normalisation=none", "queue_length=5", "head_batch_norm=true"],
    "previous-epoch": ["teacher=previous_epoch"],
}


def recipe_of(*settings: str) -> Recipe:
    return with_overrides(load_recipe("default"), [*SETTINGS, *settings])


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def directions(*shape: int, seed: int = 0) -> Any:
    return F.normalize(random(*shape, seed=seed), dim=-1)


# -- targets


def scaled_by_turns(logits: np.ndarray, temp: float, turns: int) -> np.ndarray:
    """The algorithm as the paper states it, on (views, K), in float64."""
    q = np.exp(logits.astype(np.float64) / temp).T
    q /= q.sum()
    n_prototypes, n_views = q.shape
    for _ in range(turns):
        q /= q.sum(axis=1, keepdims=True) * n_prototypes
        q /= q.sum(axis=0, keepdims=True) * n_views
    return (q * n_views).T


@pytest.mark.parametrize("turns", [1, 3])
def test_sinkhorn_is_the_papers_algorithm(turns: int) -> None:
    logits = random(2, 6, 5)
    targets = Sinkhorn(ALONE, turns).targets(logits, 0.3)
    assert targets.shape == (2, 6, 5)
    expected = scaled_by_turns(logits.flatten(0, 1).numpy(), 0.3, turns)
    np.testing.assert_allclose(targets.flatten(0, 1).numpy(), expected, atol=1e-6)
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(2, 6))


def test_sinkhorn_uses_all_prototypes_alike_and_stays_finite() -> None:
    logits = random(2, 40, 4) + torch.tensor([9.0, 0.0, 0.0, 0.0])  # one prototype that all are near to
    targets = Sinkhorn(ALONE, 50).targets(logits, 0.5)
    torch.testing.assert_close(targets.mean(dim=(0, 1)), torch.full((4,), 0.25), atol=1e-4, rtol=0)
    # float32's exp ends at 88; logits over a temperature go far beyond.
    far = Sinkhorn(ALONE).targets(logits * 100, 0.01)
    assert torch.isfinite(far).all()
    torch.testing.assert_close(far.sum(dim=-1), torch.ones(2, 40))


def test_sinkhorn_over_processes_is_that_of_the_whole_batch() -> None:
    logits = random(2, 6, 5)
    whole = Sinkhorn(ALONE).targets(logits, 0.3)
    halves = [logits[:, :3], logits[:, 3:]]

    shared: dict[int, Any] = {}
    barrier = threading.Barrier(2, timeout=30)

    class Half(Processes):
        """One of two threads that reduce as two processes do."""

        def _reduce(self, tensor: Any, how: Any) -> Any:
            shared[self.rank] = tensor
            barrier.wait()
            reduced = how(torch.stack([shared[0], shared[1]]))
            barrier.wait()
            return reduced

        def max(self, tensor: Any) -> Any:
            return self._reduce(tensor, lambda both: both.amax(dim=0))

        def sum(self, tensor: Any) -> Any:
            return self._reduce(tensor, lambda both: both.sum(dim=0))

    results: dict[int, Any] = {}

    def compute(rank: int) -> None:
        results[rank] = Sinkhorn(Half(torch.device("cpu"), rank=rank, world_size=2)).targets(
            halves[rank], 0.3
        )

    threads = [threading.Thread(target=compute, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    torch.testing.assert_close(torch.cat([results[0], results[1]], dim=1), whole, atol=1e-6, rtol=0)


def test_directions_have_length_1_and_no_centre_unless_asked() -> None:
    outputs = random(2, 3, 4)
    plain, centred = Directions(4), Directions(4, center_momentum=0.0)
    torch.testing.assert_close(plain.targets(outputs, 0.04), F.normalize(outputs, dim=-1))
    plain.update_with(outputs.mean(dim=(0, 1)))
    torch.testing.assert_close(plain.targets(outputs, 0.04), F.normalize(outputs, dim=-1))
    centred.update_with(outputs.mean(dim=(0, 1)))
    expected = F.normalize(outputs - outputs.mean(dim=(0, 1)), dim=-1)
    torch.testing.assert_close(centred.targets(outputs, 0.04), expected)
    assert not plain.state_dict() and list(centred.state_dict()) == ["centering.center"]


# -- losses


def pairs(n_student: int, n_teacher: int) -> list[tuple[int, int]]:
    return [(s, t) for t in range(n_teacher) for s in range(n_student) if s != t]


def test_squared_error_is_the_distance_of_directions() -> None:
    student, targets = random(4, 3, 8), directions(2, 3, 8, seed=1)
    expected = torch.stack(
        [(F.normalize(student[s], dim=-1) - targets[t]).pow(2).sum(dim=-1).mean() for s, t in pairs(4, 2)]
    ).mean()
    torch.testing.assert_close(SquaredError()(student, targets), expected)
    same = targets[:1].expand(2, -1, -1)
    assert float(SquaredError()(same * 7, same)) == pytest.approx(0, abs=1e-6)


def test_info_nce_is_the_cross_entropy_of_the_right_one() -> None:
    student, targets, queue = random(4, 3, 8), directions(2, 3, 8, seed=1), directions(2, 5, 8, seed=2)
    loss = InfoNCE(8, temperature=0.2, queue_length=7, processes=ALONE)
    loss.remember(queue)
    torch.testing.assert_close(loss.queue[:5], queue[0])
    expected = []
    for s, t in pairs(4, 2):
        query = F.normalize(student[s], dim=-1)
        right = (query * targets[t]).sum(dim=-1, keepdim=True)
        logits = torch.cat([right, query @ queue[0].T], dim=1) / 0.2  # the two empty places do not count
        expected.append(F.cross_entropy(logits, torch.zeros(3, dtype=torch.long)))
    torch.testing.assert_close(loss(student, targets), torch.stack(expected).mean())


def test_the_queue_forgets_the_oldest() -> None:
    loss = InfoNCE(4, temperature=0.2, queue_length=5, processes=ALONE)
    batches = [directions(1, 2, 4, seed=seed) for seed in range(4)]
    for batch in batches:
        loss.remember(batch)
    newest = torch.cat([batch[0] for batch in batches])[-5:]
    held = {tuple(row.tolist()) for row in loss.queue}
    assert held == {tuple(row.tolist()) for row in newest}
    longer = directions(1, 9, 4, seed=9)
    loss.remember(longer)
    assert {tuple(row.tolist()) for row in loss.queue} == {tuple(row.tolist()) for row in longer[0, -5:]}


def test_an_empty_queue_costs_nothing_and_keeps_gradients_finite() -> None:
    student = random(3, 2, 4).requires_grad_()
    loss = InfoNCE(4, temperature=0.2, queue_length=5, processes=ALONE)(student, directions(2, 2, 4))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.isfinite(student.grad).all()


# -- teacher and predictor


@pytest.mark.parametrize(
    ("rule", "epoch_ends", "momentum"),
    [
        ("momentum", False, 0.75),
        ("student", False, 0.0),
        ("previous_epoch", False, 1.0),
        ("previous_epoch", True, 0.0),
    ],
)
def test_teacher_rules(rule: str, epoch_ends: bool, momentum: float) -> None:
    assert TEACHER_RULES[rule](0.75, epoch_ends) == momentum


def test_an_epoch_may_end_with_a_step_that_is_passed_over() -> None:
    recipe, _ = adapt(recipe_of("teacher=previous_epoch"), 4)
    networks = (build_network(recipe, is_student=flag) for flag in (True, False))
    state = TrainingState.create(recipe, *networks, steps_per_epoch=2)
    bias, before = state.teacher.backbone.norm.bias, state.teacher.backbone.norm.bias.clone()
    with torch.no_grad():
        state.student.backbone.norm.bias.add_(1.0)
    pass_over(state)
    torch.testing.assert_close(bias, before)
    pass_over(state)
    torch.testing.assert_close(bias, before + 1.0)


def test_only_the_student_has_a_predictor() -> None:
    recipe = replace(recipe_of("predictor=true"), teacher_momentum=0.5)
    student, teacher = (build_network(recipe, is_student=flag) for flag in (True, False))
    assert isinstance(student.predictor, Predictor) and teacher.predictor is None
    copy_student(student, teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    update_teacher(student, teacher, 0.5, statistics=True)
    moving = dict(teacher.named_parameters())
    for name, value in before.items():
        if name in moving:
            torch.testing.assert_close(moving[name].detach(), value + 0.5, msg=name)
    crops = [random(2, 3, 3, 32, 32)]
    assert student(crops).logits.shape == teacher(crops).logits.shape == (2, 3, 16)


def test_a_step_adds_koleo_over_the_global_crops() -> None:
    crops = [random(2, 4, 3, 32, 32), random(1, 4, 3, 16, 16)]

    def after_a_step(weight: float) -> Any:
        settings = (f"koleo_weight={weight}", "batch_size=4", "clip_grad=0", "drop_path_rate=0")
        recipe, _ = adapt(recipe_of(*settings), 4)
        torch.manual_seed(0)
        networks = (build_network(recipe, is_student=flag) for flag in (True, False))
        state = TrainingState.create(recipe, *networks, steps_per_epoch=1)
        training_step(state, crops)  # at a learning rate of 0
        return state.student

    plain, own, both = after_a_step(0.0), after_a_step(0.0), after_a_step(0.5)
    own.zero_grad()
    (0.5 * koleo_loss(own(crops[:1]).embeddings)).backward()
    for (name, one), two, sum_ in zip(
        plain.backbone.named_parameters(), own.backbone.parameters(), both.backbone.parameters(), strict=True
    ):
        torch.testing.assert_close(sum_.grad, one.grad + two.grad, atol=1e-5, rtol=1e-3, msg=name)
    assert max(float(parameter.grad.abs().max()) for parameter in own.backbone.parameters()) > 1e-3


# -- whole runs


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_goes_on_exactly(tmp_path: Path, photos: Path, method: str) -> None:
    recipe = recipe_of(*METHODS[method])
    whole = train([photos], tmp_path / "whole", recipe)
    begun = train([photos], tmp_path / "cut", replace(recipe, epochs=3), observer=StopAfter(3))
    assert 0 < begun.step < whole.step
    resumed = train([photos], tmp_path / "cut", recipe)
    assert resumed.step == whole.step
    saved = [checkpoint.load_newest(tmp_path / run / "checkpoint")[0] for run in ("whole", "cut")]
    for part in ("student", "teacher", "targets", "loss"):
        one, other = (contents[part] for contents in saved)
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), f"{part}.{name}"
    if isinstance(whole.loss, InfoNCE):  # the step hands on its targets
        assert int(whole.loss.n_queued) == whole.step * recipe.batch_size
    torch.manual_seed(recipe.seed)
    start = build_network(whole.recipe, is_student=True).state_dict()
    assert not torch.equal(whole.teacher.head.mlp[0].weight, start["head.mlp.0.weight"])


def test_where_targets_are_no_probabilities_there_is_no_entropy(tmp_path: Path, photos: Path) -> None:
    train([photos], tmp_path / "run", recipe_of(*METHODS["byol"], "epochs=1"))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["teacher_entropy"] is None and line["kl"] is None and line["loss_over_ln_k"] is None
    assert 0 <= line["loss"] <= 4
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "ln K =" not in report  # nothing is guessed among prototypes


def test_parts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UsageError, match="sinkhorn makes probabilities"):
        recipe_of("loss=squared_error", "target_normalisation=sinkhorn")
    with pytest.raises(UsageError, match="teacher='ema' is not known; use one of momentum, student"):
        recipe_of("teacher=ema")


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(tmp_path: Path, photos: Path) -> None:
    """Minutes of compiling for a few steps; the numbers agree but for the order of additions."""
    plain = train([photos], tmp_path / "plain", recipe_of("epochs=1"))
    compiled = train([photos], tmp_path / "compiled", recipe_of("epochs=1", "compile=true"))
    assert compiled.student.state_dict().keys() == plain.student.state_dict().keys()
    for name, value in plain.student.state_dict().items():
        torch.testing.assert_close(compiled.student.state_dict()[name], value, atol=1e-4, rtol=0, msg=name)
