"""What changes during a run: networks, centre, optimiser, schedules; how it is created, saved and restored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.errors import UsageError
from dinokit.model_folder.architecture import is_vit_name
from dinokit.runtime.torch import pick_device
from dinokit.training.devices.processes import Processes
from dinokit.training.devices.sharding import (
    fill_outline,
    load_whole,
    load_whole_optimizer,
    outline,
    shard,
    whole_optimizer_state,
    whole_state,
)
from dinokit.training.distillation.frozen_teacher import FrozenTeachers
from dinokit.training.networks.network import Network
from dinokit.training.objectives.foreground import Foreground, make_foreground
from dinokit.training.objectives.losses import make_loss
from dinokit.training.objectives.masked_patches import MaskedPatches, make_masked_patches
from dinokit.training.objectives.parts import Loss, Targets
from dinokit.training.objectives.targets import make_targets
from dinokit.training.objectives.teacher import TEACHER_RULES, TeacherRule, copy_student
from dinokit.training.optim import make_optimizer
from dinokit.training.recipe import Recipe
from dinokit.training.schedules import Schedule, cosine, teacher_temperature

__all__ = ["TrainingState", "make_schedules", "saved_targets"]


@dataclass(frozen=True)
class Schedules:
    """One value per step of the run."""

    lr: Schedule
    weight_decay: Schedule
    teacher_momentum: Schedule
    teacher_temp: Schedule


@dataclass
class TrainingState:
    """Everything that changes during a run."""

    recipe: Recipe
    student: Network
    teacher: Network
    targets: Targets
    loss: Loss
    teacher_rule: TeacherRule
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    steps_per_epoch: int
    processes: Processes
    forward: nn.Module
    """What the training step calls: the student, or its wrapper that averages gradients over the processes."""
    dtype: torch.dtype
    """Dtype of matrix products: float32, or bfloat16 or float16 under autocast."""
    scaler: torch.amp.GradScaler
    """Prevents float16 gradients from underflowing; disabled in the other precisions."""
    frozen_teachers: FrozenTeachers | None = None
    """They make the targets instead of ``teacher``, which is then only the student's moving average."""
    masked_patches: MaskedPatches | None = None
    """The loss on patches hidden from the student, with ``ibot_weight``."""
    foreground: Foreground | None = None
    """Loss between the student's attention and the foreground, with ``foreground_weight``."""
    outlines: tuple[Network, Network] | None = None
    """Student and teacher without weights, in the first process, if weights are sharded (`sharding.py`)."""
    step: int = 0
    """Steps done."""

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        student: Network,
        teacher: Network,
        *,
        steps_per_epoch: int,
        processes: Processes | None = None,
        frozen_teachers: FrozenTeachers | None = None,
    ) -> TrainingState:
        """Starts a run from the student's weights; the teacher becomes a copy of it.

        Args:
            recipe: complete settings (`dinokit.training.adapt`).
            student, teacher: networks of the same shape.
            steps_per_epoch: optimiser steps per epoch.
            processes: of this run; by default only this one.
            frozen_teachers: of a distillation, on the same device.
        """
        for key in ("n_prototypes", "teacher_momentum", "teacher_temp", "warmup_teacher_temp"):
            if getattr(recipe, key) is None:
                raise UsageError(
                    f"the recipe does not set {key}; complete it with dinokit.training.adapt.adapt"
                )
        processes = processes or Processes(pick_device(recipe.device))
        device = processes.device
        # Sharded weights are moved to the device by `shard`, in one memory layout only.
        if not processes.shares_weights:
            # Convolutions are faster with channels last in memory; a ViT has one only, the patch embedding.
            layout = torch.preserve_format if is_vit_name(recipe.arch) else torch.channels_last
            for network in (student, teacher):
                network.to(device, memory_format=layout)  # type: ignore[call-overload]
        copy_student(student, teacher)
        student.train(), teacher.train()
        dtype = _dtype(recipe.precision, device)
        if dtype == torch.bfloat16 and device.type == "cpu":
            _use_plain_attention(student)
            _use_plain_attention(teacher)
            if frozen_teachers is not None:
                _use_plain_attention(frozen_teachers)
        if recipe.compile:
            if recipe.gradient_checkpointing and processes.world_size > 1:
                _compile_each_pass_whole()
            for network in (student, teacher):
                network.compile_passes(hides_patches=recipe.ibot_weight > 0)
        outlines = None
        if processes.shares_weights:
            if processes.is_first:
                outlines = (outline(student), outline(teacher))
            for network in (student, teacher):
                shard(network, processes)
        assert recipe.n_prototypes is not None
        return cls(
            recipe=recipe,
            student=student,
            teacher=teacher,
            targets=make_targets(
                recipe, processes, widths=frozen_teachers.widths if frozen_teachers else None
            ),
            loss=make_loss(recipe, processes, student.embed_dim),
            teacher_rule=TEACHER_RULES[recipe.teacher],
            optimizer=make_optimizer(
                recipe.optimizer, student, patch_embed_lr_mult=recipe.patch_embed_lr_mult
            ),
            schedules=make_schedules(recipe, steps_per_epoch),
            steps_per_epoch=steps_per_epoch,
            processes=processes,
            forward=processes.parallel(student),
            dtype=dtype,
            scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            frozen_teachers=frozen_teachers,
            masked_patches=make_masked_patches(recipe, processes),
            foreground=make_foreground(recipe, device),
            outlines=outlines,
        )

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        return self.processes.device

    @property
    def autocast(self) -> bool:
        """Whether matrix products use another dtype than the weights."""
        return self.dtype != torch.float32

    @property
    def n_steps(self) -> int:
        """Length of the run in steps."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Index of the epoch that the next step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which the run resumes exactly; called by all processes together."""
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        networks, optimizer = self._networks_and_optimizer()
        return {
            "format": 3,
            "step": self.step,
            **networks,
            "targets": self.targets.state_dict(),
            "loss": self.loss.state_dict(),
            "masked_patches": self.masked_patches.state_dict() if self.masked_patches is not None else {},
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "frozen_teachers": self.frozen_teachers and self.frozen_teachers.sha256,
            # one row per process
            "torch_rng": self.processes.gather(torch.get_rng_state()),
            "cuda_rng": None if cuda_rng is None else self.processes.gather(cuda_rng),
            "mps_rng": torch.mps.get_rng_state() if self.device.type == "mps" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            UsageError: the run has another frozen teacher.
        """
        taught_by, here = state.get("frozen_teachers"), self.frozen_teachers and self.frozen_teachers.sha256
        if taught_by != here:
            raise UsageError(
                f"distill_from={self.recipe.distill_from} has other weights (sha256 {str(here)[:12]}…) than the "
                f"teacher this run began with ({str(taught_by)[:12]}…); restore that one, or choose another -o for a "
                "new run"
            )
        load_whole(self.student, state["student"])
        load_whole(self.teacher, state["teacher"])
        self.targets.load_state_dict(saved_targets(state))
        self.loss.load_state_dict(state.get("loss", {}))
        if self.masked_patches is not None:
            self.masked_patches.load_state_dict(state["masked_patches"])
        load_whole_optimizer(self.optimizer, state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        rank = self.processes.rank
        torch_rng = _rows(state["torch_rng"])
        if rank < len(torch_rng):  # additional processes keep their seed
            torch.set_rng_state(torch_rng[rank].clone())  # torch would save the whole storage of a view
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            cuda_rng = _rows(state["cuda_rng"])
            if rank < len(cuda_rng):
                torch.cuda.set_rng_state(cuda_rng[rank].clone(), self.device)
        if state.get("mps_rng") is not None and self.device.type == "mps":
            torch.mps.set_rng_state(state["mps_rng"])
        self.step = int(state["step"])

    def _networks_and_optimizer(self) -> tuple[dict[str, Any], dict[str, Any]]:
        networks = {"student": self.student, "teacher": self.teacher}
        if not self.processes.shares_weights:
            return {name: n.state_dict() for name, n in networks.items()}, self.optimizer.state_dict()
        wanted = self.processes.is_first  # it writes them
        return (
            {name: whole_state(n, wanted=wanted) for name, n in networks.items()},
            whole_optimizer_state(self.optimizer, wanted=wanted),
        )

    def gathered(self, saved: dict[str, Any] | None = None) -> TrainingState:
        """A state with whole networks in the first process, for monitoring; called by all processes together.

        Returns ``self`` if weights are not sharded, and in the other processes, which do not monitor.

        Args:
            saved: the current ``state_dict()``, if only the teacher is needed: its weights are taken from there, and
                the student stays sharded, which saves memory and communication.
        """
        if not self.processes.shares_weights:
            return self
        if saved is not None:
            if self.outlines is None:
                return self
            return replace(self, teacher=fill_outline(self.outlines[1], saved["teacher"], self.device))
        networks, wanted = (self.student, self.teacher), self.processes.is_first
        weights = [whole_state(network, wanted=wanted) for network in networks]
        if self.outlines is None:
            return self
        student, teacher = (
            fill_outline(empty, found, self.device)
            for empty, found in zip(self.outlines, weights, strict=True)
        )
        return replace(self, student=student, teacher=teacher)


def saved_targets(state: dict[str, Any]) -> dict[str, Tensor]:
    """The targets' part of a checkpoint; up to format 2 it was always the centre, and named ``centering``."""
    found: dict[str, Tensor] = state["targets"] if "targets" in state else state["centering"]
    return found


def _rows(rng: Tensor) -> Tensor:
    """A generator's state per process; checkpoints of format 1 had one process and no axis for it."""
    return rng if rng.ndim == 2 else rng[None]


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        # Not is_bf16_supported(): it includes GPUs that emulate bfloat16, which is slower than float32.
        has_bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    else:
        # Without these instructions a CPU is far slower in bfloat16 than in float32.
        has_bf16 = device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return torch.bfloat16 if has_bf16 else torch.float32


def _compile_each_pass_whole(version: str = torch.__version__) -> None:
    """torch 2.6 fails to split a compiled pass at DistributedDataParallel's buckets if blocks are recomputed
    (pytorch#104674); 2.14 can, versions between were not tried. Unsplit, gradients are sent once all are computed."""
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < (2, 14):
        import torch._dynamo

        torch._dynamo.config.optimize_ddp = False


def _use_plain_attention(network: nn.Module) -> None:
    """Attention as matrix products and a softmax: in bfloat16 on a CPU, forward and backward, torch 2.14 computes it
    1.7 to 5 times faster than its fused kernel at 5 to 197 tokens (`benchmarks/attention.py`)."""
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 - a Module's attributes are typed as tensors


def make_schedules(recipe: Recipe, steps_per_epoch: int) -> Schedules:
    """The four schedules of a complete recipe."""
    n_steps = recipe.epochs * steps_per_epoch
    assert recipe.teacher_momentum is not None
    assert recipe.teacher_temp is not None and recipe.warmup_teacher_temp is not None
    return Schedules(
        lr=cosine(
            recipe.scaled_lr,
            recipe.min_lr,
            n_steps,
            warmup_steps=round((recipe.warmup_epochs or 0) * steps_per_epoch),
        ),
        weight_decay=cosine(recipe.weight_decay, recipe.weight_decay_end, n_steps),
        teacher_momentum=cosine(recipe.teacher_momentum, 1.0, n_steps),
        teacher_temp=teacher_temperature(
            recipe.warmup_teacher_temp,
            recipe.teacher_temp,
            recipe.epochs,
            steps_per_epoch,
            warmup_epochs=recipe.warmup_teacher_temp_epochs or 0,
        ),
    )
