"""The training loop of DINO, to be read from top to bottom.

Source: Caron et al. 2021, Algorithm 1; facebookresearch/dino `main_dino.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dinokit.errors import TrainingError, UsageError
from dinokit.training.adapt import Choice, adapt, advice, slow_average
from dinokit.training.devices.pieces import as_many_pieces
from dinokit.training.devices.processes import Processes
from dinokit.training.devices.transfer import sent
from dinokit.training.distillation.assignment import Teaching, weigh
from dinokit.training.distillation.frozen_teacher import FrozenTeachers, find_teachers, width_of
from dinokit.training.monitoring.collapse import teacher_entropy
from dinokit.training.monitoring.monitor import Monitor, evaluation_due
from dinokit.training.monitoring.pace import Pace
from dinokit.training.networks.gradient_checkpointing import keep_buffers
from dinokit.training.networks.initial_weights import begin_with, licence_at_start
from dinokit.training.networks.network import pictures_of_a_piece
from dinokit.training.objectives.koleo import koleo_loss
from dinokit.training.objectives.masks import HiddenPatches
from dinokit.training.objectives.teacher import update_teacher
from dinokit.training.optim import clip_gradients
from dinokit.training.recipe import Recipe
from dinokit.training.run import checkpoint
from dinokit.training.run.failures import failures_in_words
from dinokit.training.run.run_folder import MetricsLog, claim_run_folder, recipe_of
from dinokit.training.run.state import TrainingState, build_network
from dinokit.training.run.teacher_folder import is_behind, write_teacher
from dinokit.training.views.bit_depth import bits_found
from dinokit.training.views.data import Batch, CropLoader
from dinokit.training.views.normalisation import measured, normalisation
from dinokit.training.views.pictures import digest_of_names, find_pictures

__all__ = ["Observer", "StepResult", "TrainingState", "build_network", "train", "training_step"]


_GIVE_UP = 16  # pictures in a row that cannot be read


@dataclass(frozen=True)
class StepResult:
    """What one step gave; scalars are tensors on the device, so that reading them is the caller's choice."""

    loss: Tensor
    teacher_entropy: Tensor | None
    """None where targets are no probabilities."""
    grad_norm: Tensor
    ibot_loss: Tensor | None = None
    """Of hidden patches, without its weight; None where none are hidden."""
    foreground_kl: Tensor | None = None
    """Of what the student looks at, without its weight, in nats; None without ``foreground_weight``."""


def training_step(
    state: TrainingState,
    *pieces: Sequence[Tensor],
    hidden: Sequence[HiddenPatches] | None = None,
    teaching: Sequence[Tensor] | None = None,
) -> StepResult:
    """One step of DINO, or of the method whose parts the recipe names (`parts.py`).

    The batch may come in pieces and be shared out over processes: gradients, centre and loss are those of the whole
    batch, and all that moves at a step moves once. Only KoLeo, Sinkhorn, stochastic depth and BatchNorm look at each
    piece for itself.

    Args:
        state: changed in place; ``state.step`` goes up by one.
        pieces: each of normalised global crops (2, B, 3, G, G), then local crops (L, B, 3, S, S) if there are any.
        hidden: for each piece the patches of its global crops that the student is to guess, with ``ibot_weight``.
        teaching: for each piece how much each frozen teacher counts for its pictures (B, N), with
            ``distill_pictures``.
    """
    recipe, schedules, step, processes = state.recipe, state.schedules, state.step, state.processes

    # Schedules: weight decay moves for the groups that decay only.
    for group in state.optimizer.param_groups:
        group["lr"] = float(schedules.lr[step]) * group["lr_mult"]
        if group["decays"]:
            group["weight_decay"] = float(schedules.weight_decay[step])

    # Pictures that cannot be read make pieces unequal: each counts by its share of all pictures.
    n_here = sum(crops[0].shape[1] for crops in pieces)
    n_images = processes.sum(torch.full((), float(n_here), device=state.device))
    state.optimizer.zero_grad(set_to_none=True)
    sums, seen = [], []
    for number, crops in enumerate(pieces):
        n_piece = crops[0].shape[1]
        means, targets = _back_propagate(
            state,
            crops,
            hidden[number] if hidden else None,
            teaching[number] if teaching else None,
            # Gradients are averaged over the processes, and summed over the pieces.
            share=n_piece / n_images * processes.world_size,
            more_to_come=number < len(pieces) - 1,
        )
        sums.append(means * n_piece)
        if state.loss.remembers:
            seen.append(targets)

    # The centre moves towards the mean of the whole batch.
    means = processes.sum(torch.stack(sums).sum(dim=0)) / n_images
    state.targets.update_with(means[3:])
    if seen:
        state.loss.remember(torch.cat(seen, dim=1))
    ibot_loss = None if state.masked_patches is None else state.masked_patches.finish_step()

    # Student: clip, keep backbone and prototypes still during the first epochs, step.
    state.scaler.unscale_(state.optimizer)
    if state.epoch < recipe.freeze_backbone_epochs:  # before clipping: the head's share is all there is
        _forget_gradients(state.student, "backbone.")
    grad_norm = clip_gradients(
        state.student.parameters(), recipe.clip_grad, per_parameter=recipe.clip_per_parameter
    )
    if state.epoch < recipe.freeze_last_layer_epochs:
        _forget_gradients(state.student, "head.last_layer.", "patch_head.last_layer.")
    state.scaler.step(state.optimizer)
    state.scaler.update()

    # Teacher: a moving average of the student, if no other rule is asked for.
    state.step += 1
    _move_teacher(state, float(schedules.teacher_momentum[step]))
    return StepResult(
        means[0],
        means[1] if state.targets.are_probabilities else None,
        grad_norm,
        ibot_loss,
        None if state.foreground is None else means[2],
    )


def _back_propagate(
    state: TrainingState,
    crops: Sequence[Tensor],
    patches: HiddenPatches | None,
    weights: Tensor | None,
    *,
    share: Tensor,
    more_to_come: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of one piece of the batch; of all that is computed for them nothing is kept.

    Args:
        state: its gradients are added to.
        crops, patches, weights: of the piece, see :func:`training_step`.
        share: scalar on the device, by which the piece counts.
        more_to_come: whether gradients stay in this process for now.

    Returns:
        (3 + K) means over the piece (loss, entropy of the targets, foreground's divergence, the teacher's outputs), and
        the targets (T, B, K).
    """
    recipe = state.recipe
    n_views = len(crops[0])
    with state.processes.without_sync(state.forward, enabled=more_to_come):
        # The teacher sees the global crops whole, the student all of them, with patches hidden if asked for.
        with torch.autocast(state.device.type, state.dtype, enabled=state.autocast):
            with torch.no_grad():
                teacher_logits, teacher_patches = _teacher_outputs(state, crops[0], patches)
            student = state.forward(crops, patches)

        # Targets come from the centre of the steps before, where there is one.
        teacher_temp = float(state.schedules.teacher_temp[state.step])
        targets = state.targets.targets(teacher_logits, teacher_temp)
        asked = targets
        if weights is not None:
            assert state.frozen_teachers is not None
            asked = weigh(targets, weights, state.frozen_teachers.widths)
        loss = state.loss(student.logits, asked)
        total = loss
        if recipe.koleo_weight:
            total = loss + recipe.koleo_weight * koleo_loss(student.embeddings[:n_views])
        if state.masked_patches is not None:
            patch_loss = state.masked_patches(student.patch_logits, teacher_patches, patches, teacher_temp)
            total = total + recipe.ibot_weight * patch_loss
        foreground_kl = torch.zeros_like(loss)
        if state.foreground is not None:
            foreground_kl = state.foreground(crops[0], student.attention)
            total = total + recipe.foreground_weight * foreground_kl
        with keep_buffers(state.student.backbone, enabled=recipe.gradient_checkpointing):
            state.scaler.scale(total * share).backward()
    has_entropy = state.targets.are_probabilities
    entropy = teacher_entropy(targets) if has_entropy else torch.zeros_like(loss)
    means = torch.stack([loss.detach(), entropy, foreground_kl.detach()])
    return torch.cat([means, teacher_logits.float().mean(dim=(0, 1))]), targets


def _forget_gradients(network: nn.Module, *parts: str) -> None:
    """The optimiser passes over what has no gradient, weight decay included."""
    for name, parameter in network.named_parameters():
        if name.startswith(parts):
            parameter.grad = None


def _move_teacher(state: TrainingState, momentum: float) -> None:
    """By the recipe's rule. In a distillation it sees no pictures of its own, and follows in its statistics too."""
    momentum = state.teacher_rule(momentum, state.step % state.steps_per_epoch == 0)
    if momentum < 1.0:
        update_teacher(state.student, state.teacher, momentum, statistics=state.frozen_teachers is not None)


def _teacher_outputs(
    state: TrainingState, global_crops: Tensor, patches: HiddenPatches | None
) -> tuple[Tensor, Tensor | None]:
    """(T, B, K) of the moving average or of the frozen models of a distillation; (M, K) of hidden patches."""
    if state.frozen_teachers is not None:
        return state.frozen_teachers(global_crops), None
    output = state.teacher([global_crops], patches)
    return output.logits, output.patch_logits


class Observer(Protocol):
    """What a run tells while it goes on; the command line draws a progress bar."""

    def told(self, message: str) -> None:
        """Called for what is worth knowing and no warning, such as a copy of remote pictures that takes time."""

    def started(self, state: TrainingState, n_images: int, choices: list[Choice]) -> None:
        """Called once, before the first step; ``state.step`` is above 0 when the run goes on."""

    def stepped(self, state: TrainingState, n_images: int, metrics: dict[str, Any] | None) -> None:
        """Called after each step with its number of pictures, and its metrics where they were logged."""

    def saved(self, state: TrainingState, model: Path) -> None:
        """Called when a checkpoint and a model folder were written."""

    def warned(self, message: str) -> None:
        """Called for anything worth a warning."""


class _Silence:
    def told(self, message: str) -> None: ...
    def started(self, state: TrainingState, n_images: int, choices: list[Choice]) -> None: ...
    def stepped(self, state: TrainingState, n_images: int, metrics: dict[str, Any] | None) -> None: ...
    def saved(self, state: TrainingState, model: Path) -> None: ...
    def warned(self, message: str) -> None: ...


class _WarningsAlone(_Silence):
    def warned(self, message: str) -> None:
        warnings.warn(message, stacklevel=2)


def train(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    run: str | os.PathLike[str],
    recipe: Recipe,
    *,
    observer: Observer | None = None,
) -> TrainingState:
    """Pre-trains a backbone, or goes on with the run that is in the folder.

    Two at once in threads of one process draw from one generator of torch, so neither can be repeated exactly: for that
    give each a process.

    Args:
        sources: pictures, see :func:`dinokit.training.views.pictures.find_pictures`: one source, or several.
        run: folder for ``recipe.yaml``, ``checkpoint/``, ``metrics.jsonl`` and ``model/``.
        recipe: settings; what is None is filled in for the number of pictures.
        observer: told what happens; by default warnings are Python's, and all else is silent.

    Returns:
        The state at the end, or where Ctrl-C or SIGTERM stopped it (``state.step < state.n_steps``).

    Raises:
        UsageError: no pictures, an impossible recipe, or a folder that holds another run, or in which another training
            is at work.
        TrainingError: the loss is not finite, nothing can be read or written, memory is not enough, or a process that
            reads pictures was killed.
    """
    several = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    with ExitStack() as held:
        return _train(several, Path(run), recipe, observer or _WarningsAlone(), held)


def _train(
    sources: Sequence[str | os.PathLike[str]],
    run: Path,
    recipe: Recipe,
    observer: Observer,
    held: ExitStack,
) -> TrainingState:
    """The body of :func:`train`; ``held`` gives the run folder back, whatever happens."""
    pictures = find_pictures(
        sources, channels=recipe.channels, run=run, warn=observer.warned, tell=observer.told
    )
    models = find_teachers(recipe)
    teacher_dim = width_of(models) or None
    recipe, choices = adapt(
        recipe,
        len(pictures),
        teacher_dim=teacher_dim,
        licence=licence_at_start(recipe, run),
        began=recipe_of(run),
    )
    recipe = measured(recipe, pictures, run=run, tell=observer.told)
    if recipe.distill_pictures is not None:
        Teaching(recipe).check(pictures)
    monitor: Monitor | None = None
    if Processes.will_be_first():
        monitor = Monitor(run, recipe, pictures, observer.warned)
        held.enter_context(claim_run_folder(run, recipe))
    held.enter_context(failures_in_words(run, recipe))
    processes = Processes.start(recipe.device, recipe.devices, recipe.num_nodes, strategy=recipe.strategy)
    held.push(lambda error, *_: processes.end_with_this_one() if error else None)
    _check_shares(recipe, processes)
    if not processes.is_first:
        observer, monitor = _Silence(), None

    # Networks, and the state of an earlier start if there is one.
    torch.manual_seed(recipe.seed)
    state = TrainingState.create(
        recipe,
        build_network(recipe, is_student=True),
        build_network(recipe, is_student=False),
        steps_per_epoch=len(pictures) // recipe.batch_size,
        processes=processes,
        frozen_teachers=FrozenTeachers(models, recipe, processes.device) if models else None,
    )
    if not processes.is_first:  # stochastic depth of its own
        torch.manual_seed(recipe.seed + processes.rank)
    names = digest_of_names(pictures)
    saved, warnings = checkpoint.load_newest(run / "checkpoint")
    for message in warnings:
        observer.warned(message)
    if saved is not None:
        if saved["n_images"] != len(pictures):
            raise UsageError(
                f"{run} holds a run on {saved['n_images']} pictures, and there are {len(pictures)} now. Give the same "
                "ones to go on with it, or another -o with --init-from to train its weights on the new ones"
            )
        if saved.get("names", names) != names:
            observer.warned(
                f"{run} was begun with pictures of other names, or in another order; it goes on with those given now. "
                "For an exact resume give the same ones"
            )
        state.load_state_dict(saved)
    elif recipe.init_from is not None:
        begin_with(state, recipe.init_from, observer.warned)
    if state.step == 0:
        momenta = state.schedules.teacher_momentum
        for counsel in (advice(recipe, len(pictures)), slow_average(recipe, momenta)):
            if counsel is not None:
                observer.told(counsel)
    if state.step == 0 and processes.is_first and (found := bits_found(pictures, recipe)) is not None:
        observer.told(found)
    observer.started(state, len(pictures), choices)

    def save() -> None:
        contents = {**state.state_dict(), "n_images": len(pictures), "names": names}
        whole = state.gathered(contents)
        if monitor is not None:
            contents |= {"health": monitor.state_dict(), "unreadable": unreadable_seen}
            checkpoint.save_checkpoint(run / "checkpoint", state.step, contents, keep=recipe.keep_checkpoints)
            model = write_teacher(run, whole.teacher, recipe, state.step, state.n_steps, len(pictures))
            observer.saved(state, model)
            monitor.saved(whole)
        processes.wait()

    loader = CropLoader(
        pictures,
        recipe,
        first_step=state.step,
        device=state.device,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    normalise = _Normalise(recipe, state.device)
    least = pictures_of_a_piece(recipe, state.student) if processes.world_size == 1 else 1
    unreadable_seen, in_a_row = saved.get("unreadable", 0) if saved else 0, 0
    learned = saved is not None
    listed: set[str] = set()
    last_save = time.monotonic()
    with ExitStack() as stack:
        interrupted = stack.enter_context(_Interruption(observer.told, processes.world_size))
        whole = state if state.step else state.gathered()
        if monitor is not None:
            log = stack.enter_context(MetricsLog(run / "metrics.jsonl", state.step))
            stack.enter_context(monitor)
            untrained = monitor.begin(state, whole, saved.get("health") if saved else None)
            if untrained is not None:
                log.write(untrained)
                observer.told(f"k-NN before training: {untrained['knn_teacher']:.1%}")
        del whole
        # A finished run has no step left after which it would save again.
        if any(
            processes.any(state.step == state.n_steps and processes.is_first and is_behind(run, state.step))
        ):
            save()
        pace = Pace()
        for readable, unreadable in _steps(loader, recipe.accumulate):
            pace.arrived()
            unreadable_seen += len(unreadable)
            for line in unreadable:
                if line not in listed:  # it comes again in every epoch
                    listed.add(line)
                    observer.warned(f"left out, cannot be read: {line}")
            result: StepResult | None = None
            batches = [batch for batch in readable if batch.n_images >= least]
            n_images = sum(batch.n_images for batch in batches) * processes.world_size
            if batches:
                in_a_row = 0
                if processes.world_size > 1:
                    batches = as_many_pieces(batches, recipe.accumulate)
                crops = [normalise(batch) for batch in batches]
                result = training_step(
                    state,
                    *crops,
                    hidden=_hidden(batches, state.device),
                    teaching=_teaching(batches, state.device),
                )
                learned = True
            else:
                # A few bad pictures may meet in one small batch; where nothing can be read any more, it is the disk.
                in_a_row = 0 if readable else in_a_row + len(unreadable)
                if processes.world_size > 1 or in_a_row >= min(_GIVE_UP, state.n_steps * recipe.batch_size):
                    raise TrainingError(
                        f"none of {in_a_row} pictures, up to those of step {state.step + 1}, can be read; the first: "
                        f"{unreadable[0]}. Look at them, then run the same command again: it goes on from the last "
                        "save"
                    )
                _pass_over(state)
                if state.step == state.n_steps and not learned:
                    raise TrainingError(
                        f"none of {state.n_steps} steps had {least} pictures that can be read, which BatchNorm needs; "
                        f"one that cannot: {unreadable[0]}. Look at them, or give more pictures or a larger batch_size"
                    )
            pace.stepped(n_images)

            # Log. Reading the loss waits for the device, so not at every step.
            metrics = None
            log_due = state.step % recipe.log_every_steps == 0 or state.step == state.n_steps
            knn_due = evaluation_due(state)
            if result is not None and (log_due or knn_due):
                whole = state.gathered() if knn_due else state
                metrics = {**_metrics(state, result), **pace.measure(), "unreadable": unreadable_seen}
                _stop_unless_finite(metrics, run, state.dtype)
                if monitor is not None:
                    with pace.paused():
                        metrics |= monitor.measure(whole, metrics)
                    log.write(monitor.logged(metrics))
                del whole  # it may be a second pair of networks
            observer.stepped(state, n_images, metrics)

            # Save.
            epoch_done = state.step % state.steps_per_epoch == 0
            due = epoch_done and state.epoch % recipe.save_every_epochs == 0
            late = 0 < recipe.save_every_minutes * 60 < time.monotonic() - last_save
            late, stop = processes.any(late, interrupted())
            # What has learned nothing yet is no model.
            if learned and (due or late or stop or state.step == state.n_steps):
                if result is not None:
                    _stop_unless_finite(_metrics(state, result), run, state.dtype)
                with pace.paused():
                    save()
                last_save = time.monotonic()
            if stop:
                break
            pace.waiting()
    return state


def _check_shares(recipe: Recipe, processes: Processes) -> None:
    """The recipe checked this for the processes it names; a launcher may have started others."""
    pieces = recipe.accumulate * processes.world_size
    if recipe.batch_size % pieces:
        raise UsageError(
            f"batch_size={recipe.batch_size} cannot be shared out over {processes.world_size} processes with "
            f"accumulate={recipe.accumulate}; use a multiple of {pieces}"
        )


def _steps(loader: Iterable[Batch | list[str]], accumulate: int) -> Iterator[tuple[list[Batch], list[str]]]:
    """The pieces of each step, and a line for each of its pictures that could not be read."""
    pieces = iter(loader)
    while group := list(itertools.islice(pieces, accumulate)):
        batches = [piece for piece in group if isinstance(piece, Batch)]
        unreadable = [
            line for piece in group for line in (piece.unreadable if isinstance(piece, Batch) else piece)
        ]
        yield batches, unreadable


class _Normalise:
    """Crops of 0…255 to normalised float32 on the device, global crops first."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        # Taken to the device once: a copy from ordinary memory waits for all that the device has yet to do.
        self.mean, self.std = (
            torch.tensor(v, device=device).view(-1, 1, 1) * 255 for v in normalisation(recipe)
        )

    def __call__(self, batch: Batch) -> list[Tensor]:
        device = self.mean.device
        crops = [c for c in (batch.global_crops, batch.local_crops) if c is not None]
        return [(sent(c, device).float() - self.mean) / self.std for c in crops]


def _hidden(batches: Sequence[Batch], device: torch.device) -> list[HiddenPatches] | None:
    """Of each piece, where patches are hidden."""
    return [HiddenPatches.of(batch.masks, device) for batch in batches if batch.masks is not None] or None


def _teaching(batches: Sequence[Batch], device: torch.device) -> list[Tensor] | None:
    """Of each piece, where not every teacher teaches all."""
    return [sent(batch.teaching, device) for batch in batches if batch.teaching is not None] or None


def _pass_over(state: TrainingState) -> None:
    """A step none of whose pictures can be read: order and schedules go on, the weights stay."""
    state.step += 1
    _move_teacher(state, 1.0)


def _metrics(state: TrainingState, result: StepResult) -> dict[str, Any]:
    """Plain numbers of the step that was just done."""
    done = state.step - 1
    loss = float(result.loss)
    entropy = None if result.teacher_entropy is None else float(result.teacher_entropy)
    return {
        "step": state.step,
        "epoch": round(state.step / state.steps_per_epoch, 4),
        "loss": loss,
        "teacher_entropy": entropy,
        "kl": None if entropy is None else loss - entropy,
        **({} if result.ibot_loss is None else {"ibot_loss": float(result.ibot_loss)}),
        **({} if result.foreground_kl is None else {"foreground_kl": float(result.foreground_kl)}),
        # Not finite at a step that float16's scaler passes over; JSON has no such numbers.
        "grad_norm": norm if math.isfinite(norm := float(result.grad_norm)) else None,
        "lr": float(state.schedules.lr[done]),
        "weight_decay": float(state.schedules.weight_decay[done]),
        "teacher_momentum": float(state.schedules.teacher_momentum[done])
        if state.recipe.teacher == "momentum"
        else None,
        # Directions have none; a loss that compares similarities has one of its own, which does not change.
        "teacher_temp": float(state.schedules.teacher_temp[done])
        if state.targets.are_probabilities
        else state.loss.teacher_temp,
    }


def _stop_unless_finite(metrics: dict[str, Any], run: Path, dtype: torch.dtype) -> None:
    watched = ("loss", "ibot_loss", "foreground_kl")
    wrong = [key for key in watched if not math.isfinite(metrics.get(key, 0.0))]
    if wrong:
        kept = checkpoint.checkpoints(run / "checkpoint")
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        finer = "" if dtype == torch.float32 else " or train with --set precision=fp32"
        raise TrainingError(
            f"the {wrong[0]} is {metrics[wrong[0]]} at step {metrics['step']} (learning rate "
            f"{metrics.get('lr', 'unknown')}); {last}. Lower lr{finer}: changed settings are another run, which needs "
            "another -o"
        )


@contextlib.contextmanager
def _Interruption(tell: Callable[[str], None], world_size: int) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C lets the step finish, so that what is saved is whole; the second stops at once.

    So does SIGTERM, which batch systems and containers send, to one process; of several, some may be told to end
    because another has ended, and would wait for it.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if world_size == 1 else (signal.SIGINT,)
    before: dict[int, Any] = {}

    def answer(number: int, _frame: object) -> None:
        came.append(number)
        for caught, handler in before.items():
            signal.signal(caught, signal.default_int_handler if caught == signal.SIGINT else handler)
        with contextlib.suppress(RuntimeError):  # in the middle of another line
            tell("interrupted: this step is finished and all is saved; a second time stops at once")

    try:
        for number in numbers:
            before[number] = signal.signal(number, answer)
    except ValueError:  # not in the main thread: there is no signal to catch
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
