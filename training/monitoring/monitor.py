"""Monitors a run without changing it: health, k-NN, attention through time, TensorBoard, the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dinokit.errors import DinokitError, TrainingError
from dinokit.training.monitoring.evaluation import KNNProbe
from dinokit.training.monitoring.health import Health
from dinokit.training.monitoring.report import write_report
from dinokit.training.monitoring.snapshots import Snapshots
from dinokit.training.monitoring.tensorboard import Events
from dinokit.training.recipe import Recipe
from dinokit.training.run.run_folder import first_line, recipe_of
from dinokit.training.run.teacher_folder import evaluation_preprocessing
from dinokit.training.views.pictures import Pictures

if TYPE_CHECKING:
    from dinokit.training.run.state import TrainingState

__all__ = ["Monitor", "evaluation_due"]


def evaluation_due(state: TrainingState) -> bool:
    """Whether k-NN is measured after the step that was just done; the same in all processes."""
    if state.recipe.labelled is None:
        return False
    epoch_done = state.step % state.steps_per_epoch == 0
    return state.step == state.n_steps or (epoch_done and state.epoch % state.recipe.knn_every_epochs == 0)


class Monitor:
    """Measures a run and reports on it. A context manager, since it holds a file open.

    Nothing here draws from a global random generator. A report that cannot be written is a warning; it does not end the
    run.

    Args:
        run: the run folder.
        recipe: complete settings; ``labelled``, ``labelled_queries``, ``knn_*`` and ``tensorboard`` are used here.
        pictures: what is trained on; a few are shown with the teacher's attention.
        warn: called with each warning; a verdict is reported once per kind, not at every line.

    Raises:
        UsageError: the labelled pictures are not as expected.
    """

    def __init__(self, run: Path, recipe: Recipe, pictures: Pictures, warn: Callable[[str], None]) -> None:
        assert recipe.n_prototypes is not None
        self.run, self.recipe, self.warn = run, recipe, warn
        self.health = Health(recipe.n_prototypes)
        preprocessing = evaluation_preprocessing(recipe)
        self._snapshots = Snapshots(run, pictures, preprocessing)
        self._probe: KNNProbe | None = None
        if recipe.labelled is not None:
            self._probe = KNNProbe(
                recipe.labelled,
                recipe.labelled_queries,
                preprocessing,
                limit=recipe.knn_images,
                on_problem=warn,
            )
        self._events: Events | None = None
        self._reported: set[str] = set()
        self._knn_before: float | None = None
        self._lost: str | None = None  # the verdict of the last k-NN
        # They may change when a run resumes; then k-NN before training was measured on other pictures.
        self._labels_at_start = _labels(recipe_of(run) or recipe)

    def begin(
        self, state: TrainingState, whole: TrainingState, saved_health: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Starts to watch; returns a line for metrics.jsonl about the untrained network, if there is one to write.

        Args:
            state: at the step from which the run resumes.
            whole: ``state.gathered()``.
            saved_health: ``state_dict()`` of the checkpoint.
        """
        if saved_health is not None:
            self.health.load_state_dict(saved_health)
            self._labels_at_start = saved_health.get("labels_at_start", self._labels_at_start)
        # A frozen teacher does not change, so in a distillation the student is watched.
        watched = state.teacher if state.frozen_teachers is None else state.student
        self.health.watch(watched, state.targets)
        finished = state.step >= state.n_steps
        self._events = Events(self.run, state.step, wanted=False if finished else self.recipe.tensorboard)
        if state.step:
            if self._labels_at_start == _labels(self.recipe):
                self._knn_before = first_line(self.run / "metrics.jsonl").get("knn_teacher")
                self._lost = (saved_health or {}).get("lost_features")
            return None
        self._attempt(lambda: self._snapshots.take(whole.teacher.backbone, 0, state.device))
        line = {"step": 0, "epoch": 0.0, **self._knn(whole)}
        self._knn_before = line.get("knn_teacher")
        return self.logged(line) if len(line) > 2 else None

    def measure(self, state: TrainingState, metrics: dict[str, Any]) -> dict[str, Any]:
        """What to log beside ``metrics`` (``loss``, ``teacher_entropy``) of the step that was just done.

        Args:
            state: with whole networks where :func:`evaluation_due`.
            metrics: so far.
        """
        measured = self.health.measure(
            loss=metrics["loss"],
            entropy=metrics["teacher_entropy"],
            progress=state.step / state.n_steps,
            warming_up=state.step <= (self.recipe.warmup_epochs or 0) * state.steps_per_epoch,
        )
        knn = self._knn(state) if evaluation_due(state) else {}
        if knn:
            self._lost = self._lost_features(knn["knn_teacher"])
        if (verdict := self._lost) is not None:  # valid until the next k-NN
            measured["verdicts"] = {**measured["verdicts"], "lost-features": verdict}
        return {**measured, **knn}

    def logged(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Passes a whole line of metrics to TensorBoard, warns of new verdicts, and returns the line."""
        if self._events is not None:
            self._events.add(metrics)
        for kind, sentence in metrics.get("verdicts", {}).items():
            if kind not in self._reported:
                self._reported.add(kind)
                self.warn(
                    f"step {metrics['step']}: {sentence} (reported once; metrics.jsonl has it at each logged step)"
                )
        return metrics

    def saved(self, state: TrainingState) -> None:
        """After a checkpoint, with whole networks: attention of this moment, and the report."""
        if state.step:
            self._attempt(lambda: self._snapshots.take(state.teacher.backbone, state.step, state.device))
        self._attempt(lambda: write_report(self.run))

    def state_dict(self) -> dict[str, Any]:
        """What goes into the checkpoint."""
        return {
            **self.health.state_dict(),
            "labels_at_start": self._labels_at_start,
            "lost_features": self._lost,
        }

    def _knn(self, state: TrainingState) -> dict[str, float]:
        if self._probe is None:
            return {}
        return {
            "knn_teacher": round(self._probe.score(state.teacher.backbone, state.device), 5),
            "knn_student": round(self._probe.score(state.student.backbone, state.device), 5),
        }

    def _lost_features(self, now: float) -> str | None:
        """A sentence if k-NN is below that of the initial weights by more than chance: two standard errors of a
        share."""
        before = self._knn_before
        if self._probe is None or before is None or self.recipe.init_from is None:
            return None
        if now >= before - 2 * (before * (1 - before) / self._probe.n_queries) ** 0.5:
            return None
        has_head = self.recipe.loss != "relations"
        first = ", freeze_backbone_epochs=1 (the new head learns alone first)" if has_head else ""
        return (
            f"k-NN is {now:.1%} and was {before:.1%} before training: the run loses what {self.recipe.init_from} knew. "
            f"Start again with a lower lr{first} or milder crops"
        )

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, DinokitError) as error:
            self.warn(f"the report was not updated: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.__exit__(kind, error, trace)
        if isinstance(error, TrainingError):  # its curves show why
            self._attempt(lambda: write_report(self.run))


def _labels(recipe: Recipe) -> list[str | int | None]:
    """What k-NN is measured on."""
    return [recipe.labelled, recipe.labelled_queries, recipe.knn_images]
