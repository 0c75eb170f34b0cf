"""How the teacher follows the student: one interchangeable part of a method.

Source: Caron et al. 2021, §3.1 ("momentum encoder") and Figure 6 (the other rules); facebookresearch/dino
`main_dino.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinokit.training.devices.sharding import local

__all__ = ["TEACHER_RULES", "TeacherRule", "copy_student", "is_students_own", "update_teacher"]

TeacherRule = Callable[[float, bool], float]
"""Called once per step with its momentum and whether an epoch ends; returns the momentum to use."""


@torch.no_grad()
def copy_student(student: nn.Module, teacher: nn.Module) -> None:
    """Copies the student's weights to the teacher, except those that only a student has, and freezes the teacher."""
    theirs = teacher.state_dict().keys()
    teacher.load_state_dict(
        {n: t for n, t in student.state_dict().items() if n in theirs or not is_students_own(n)}
    )
    teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(
    student: nn.Module, teacher: nn.Module, teacher_momentum: float, *, statistics: bool = False
) -> None:
    """``teacher ← teacher_momentum · teacher + (1 − teacher_momentum) · student`` for every parameter.

    A higher momentum means a slower teacher: 1 freezes it, 0 copies the student. Two multi-tensor calls instead of
    one small kernel per parameter.

    Args:
        student: not changed.
        teacher: changed in place.
        teacher_momentum: in 0…1.
        statistics: average the running statistics of BatchNorm too. The reference does not, since its teacher sees
            pictures and measures its own; a moving average that sees none needs the student's.
    """
    into: list[Tensor] = [local(p) for p in teacher.parameters()]
    students = [local(p.detach()) for name, p in student.named_parameters() if not is_students_own(name)]
    if statistics:
        theirs = {name: b for name, b in teacher.named_buffers() if b.is_floating_point()}
        measured = dict(student.named_buffers())
        into += [local(b) for b in theirs.values()]
        students += [local(measured[name]) for name in theirs]
    torch._foreach_mul_(into, teacher_momentum)
    torch._foreach_add_(into, students, alpha=1.0 - teacher_momentum)


def is_students_own(name: str) -> bool:
    """Whether a tensor of the student belongs to a part that no teacher has: a predictor, or the mask token."""
    return name.startswith("predictor.") or name == "mask_token"


TEACHER_RULES: dict[str, TeacherRule] = {
    "momentum": lambda momentum, epoch_ends: momentum,
    "student": lambda momentum, epoch_ends: 0.0,
    "previous_epoch": lambda momentum, epoch_ends: 0.0 if epoch_ends else 1.0,
}
"""momentum: moving average, DINO's. student: a copy of it (SwAV's). previous_epoch: a copy once an epoch."""
