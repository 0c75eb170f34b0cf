"""One training step: schedules, teacher, student, loss, gradients, optimiser, moving average.

Source: Caron et al. 2021, Algorithm 1; facebookresearch/dino `main_dino.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinokit.training.distillation.assignment import weigh
from dinokit.training.monitoring.collapse import teacher_entropy
from dinokit.training.networks.gradient_checkpointing import keep_buffers
from dinokit.training.objectives.koleo import koleo_loss
from dinokit.training.objectives.masks import HiddenPatches
from dinokit.training.objectives.teacher import update_teacher
from dinokit.training.optim import clip_gradients
from dinokit.training.run.state import TrainingState

__all__ = ["StepMeans", "StepResult", "pass_over", "training_step"]


@dataclass(frozen=True)
class StepResult:
    """Results of one step. Scalars are tensors on the device: reading them, which waits, is up to the caller."""

    loss: Tensor
    teacher_entropy: Tensor | None
    """None if targets are not probabilities."""
    grad_norm: Tensor
    ibot_loss: Tensor | None = None
    """On hidden patches, without its weight; None without ``ibot_weight``."""
    foreground_kl: Tensor | None = None
    """Of the student's attention, without its weight, in nats; None without ``foreground_weight``."""


class StepMeans(NamedTuple):
    """Means over the pictures of a piece, or of a whole batch; packed into one vector so that they move in one sum."""

    loss: Tensor
    entropy: Tensor
    """Of the targets; 0 where targets are not probabilities."""
    foreground_kl: Tensor
    """0 without ``foreground_weight``."""
    teacher_logits: Tensor
    """(K) mean teacher output, towards which the centre moves."""

    def pack(self) -> Tensor:
        """(3 + K), the inverse of :meth:`unpack`."""
        return torch.cat([torch.stack([self.loss, self.entropy, self.foreground_kl]), self.teacher_logits])

    @classmethod
    def unpack(cls, packed: Tensor) -> StepMeans:
        return cls(packed[0], packed[1], packed[2], packed[3:])


def training_step(
    state: TrainingState,
    *pieces: Sequence[Tensor],
    hidden: Sequence[HiddenPatches] | None = None,
    teaching: Sequence[Tensor] | None = None,
) -> StepResult:
    """One step of DINO, or of the method whose parts the recipe names (`parts.py`).

    The batch may come in pieces and be divided over processes: gradients, centre and loss are those of the whole batch,
    and weights, centre and queues are updated once. Only KoLeo, Sinkhorn, stochastic depth and BatchNorm treat each
    piece separately.

    Args:
        state: changed in place; ``state.step`` rises by one.
        pieces: each of normalised global crops (2, B, 3, G, G), then local crops (L, B, 3, S, S) if there are any.
        hidden: per piece the patches of its global crops that the student must predict, with ``ibot_weight``.
        teaching: per piece the weights (B, N) of the frozen teachers for its pictures, with ``distill_pictures``.
    """
    recipe, schedules, step, processes = state.recipe, state.schedules, state.step, state.processes

    # Schedules: only the groups with weight decay get its new value.
    for group in state.optimizer.param_groups:
        group["lr"] = float(schedules.lr[step]) * group["lr_mult"]
        if group["decays"]:
            group["weight_decay"] = float(schedules.weight_decay[step])

    # Unreadable pictures make pieces unequal: each is weighted by its share of all pictures.
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
        sums.append(means.pack() * n_piece)
        if state.loss.remembers:
            seen.append(targets)

    # The centre moves towards the mean of the whole batch.
    batch = StepMeans.unpack(processes.sum(torch.stack(sums).sum(dim=0)) / n_images)
    state.targets.update_with(batch.teacher_logits)
    if seen:
        state.loss.remember(torch.cat(seen, dim=1))
    ibot_loss = None if state.masked_patches is None else state.masked_patches.finish_step()

    # Student: clip, freeze backbone and prototypes during the first epochs, step.
    state.scaler.unscale_(state.optimizer)
    if state.epoch < recipe.freeze_backbone_epochs:  # before clipping: only the head's gradients count
        _forget_gradients(state.student, "backbone.")
    grad_norm = clip_gradients(
        state.student.parameters(), recipe.clip_grad, per_parameter=recipe.clip_per_parameter
    )
    if state.epoch < recipe.freeze_last_layer_epochs:
        _forget_gradients(state.student, "head.last_layer.", "patch_head.last_layer.")
    state.scaler.step(state.optimizer)
    state.scaler.update()

    # Teacher: a moving average of the student, unless the recipe names another rule.
    state.step += 1
    _move_teacher(state, float(schedules.teacher_momentum[step]))
    return StepResult(
        batch.loss,
        batch.entropy if state.targets.are_probabilities else None,
        grad_norm,
        ibot_loss,
        None if state.foreground is None else batch.foreground_kl,
    )


def pass_over(state: TrainingState) -> None:
    """Counts a step without training on it: order and schedules advance, the student's weights stay."""
    state.step += 1
    _move_teacher(state, 1.0)


def _back_propagate(
    state: TrainingState,
    crops: Sequence[Tensor],
    patches: HiddenPatches | None,
    weights: Tensor | None,
    *,
    share: Tensor,
    more_to_come: bool,
) -> tuple[StepMeans, Tensor]:
    """Adds the gradients of one piece of the batch; its graph and activations are freed on return.

    Args:
        state: its gradients are added to.
        crops, patches, weights: of the piece, see :func:`training_step`.
        share: scalar on the device, the weight of the piece.
        more_to_come: whether other pieces follow, so that gradients are not exchanged yet.

    Returns:
        The means over the piece, and the targets (T, B, K).
    """
    recipe = state.recipe
    n_views = len(crops[0])
    with state.processes.without_sync(state.forward, enabled=more_to_come):
        # The teacher sees the complete global crops; the student sees all crops, with hidden patches if any.
        with torch.autocast(state.device.type, state.dtype, enabled=state.autocast):
            with torch.no_grad():
                teacher_logits, teacher_patches = _teacher_outputs(state, crops[0], patches)
            student = state.forward(crops, patches)

        # Targets use the centre of the previous steps, if there is one.
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
    mean_logits = teacher_logits.float().mean(dim=(0, 1))
    return StepMeans(loss.detach(), entropy, foreground_kl.detach(), mean_logits), targets


def _forget_gradients(network: nn.Module, *parts: str) -> None:
    """Drops gradients, so that the optimiser skips these parameters, weight decay included."""
    for name, parameter in network.named_parameters():
        if name.startswith(parts):
            parameter.grad = None


def _move_teacher(state: TrainingState, momentum: float) -> None:
    """Updates the teacher by the recipe's rule. In a distillation it sees no pictures, so it averages the student's
    BatchNorm statistics too."""
    momentum = state.teacher_rule(momentum, state.step % state.steps_per_epoch == 0)
    if momentum < 1.0:
        update_teacher(state.student, state.teacher, momentum, statistics=state.frozen_teachers is not None)


def _teacher_outputs(
    state: TrainingState, global_crops: Tensor, patches: HiddenPatches | None
) -> tuple[Tensor, Tensor | None]:
    """(T, B, K) of the moving average, or of the frozen teachers of a distillation; (M, K) of hidden patches."""
    if state.frozen_teachers is not None:
        return state.frozen_teachers(global_crops), None
    output = state.teacher([global_crops], patches)
    return output.logits, output.patch_logits
