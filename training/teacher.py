"""The teacher: how it follows the student. One part of a method, to be exchanged for another.

Source: Caron et al. 2021, §3.1 ("momentum encoder") and Figure 6 (the other rules); facebookresearch/dino
`main_dino.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinokit.training.sharding import local

__all__ = ["TEACHER_RULES", "TeacherRule", "copy_student", "is_students_own", "update_teacher"]

TeacherRule = Callable[[nn.Module, nn.Module, float, bool], None]
"""Called once a step with student, teacher, the momentum of the step and whether an epoch ends with it."""


@torch.no_grad()
def copy_student(student: nn.Module, teacher: nn.Module) -> None:
    """Gives the teacher the student's weights, but for those that are the student's alone, and takes it out of the
    gradient."""
    theirs = teacher.state_dict().keys()
    teacher.load_state_dict(
        {n: t for n, t in student.state_dict().items() if n in theirs or not is_students_own(n)}
    )
    teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, teacher_momentum: float) -> None:
    """``teacher ← teacher_momentum · teacher + (1 − teacher_momentum) · student`` for every parameter.

    A higher momentum means a slower teacher: 1 freezes it, 0 copies the student. Buffers are left alone, as in
    the reference. Two multi-tensor calls instead of one small kernel a parameter.
    """
    into: list[Tensor] = [local(p) for p in teacher.parameters()]
    torch._foreach_mul_(into, teacher_momentum)
    students = [local(p.detach()) for name, p in student.named_parameters() if not is_students_own(name)]
    torch._foreach_add_(into, students, alpha=1.0 - teacher_momentum)


def is_students_own(name: str) -> bool:
    """Whether a tensor of the student is of a part that no teacher has: a predictor, or the mask token."""
    return name.startswith("predictor.") or name == "mask_token"


def _by_momentum(student: nn.Module, teacher: nn.Module, momentum: float, epoch_ends: bool) -> None:
    update_teacher(student, teacher, momentum)


def _be_the_student(student: nn.Module, teacher: nn.Module, momentum: float, epoch_ends: bool) -> None:
    update_teacher(student, teacher, 0.0)


def _student_of_the_previous_epoch(
    student: nn.Module, teacher: nn.Module, momentum: float, epoch_ends: bool
) -> None:
    if epoch_ends:
        update_teacher(student, teacher, 0.0)


TEACHER_RULES: dict[str, TeacherRule] = {
    "momentum": _by_momentum,
    "student": _be_the_student,
    "previous_epoch": _student_of_the_previous_epoch,
}
"""momentum: moving average, DINO's. student: a copy of it (SwAV's). previous_epoch: a copy once an epoch."""
