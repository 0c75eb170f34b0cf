"""The teacher: an exponential moving average of the student.

Source: Caron et al. 2021, §3.1 ("momentum encoder"); facebookresearch/dino `main_dino.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["copy_student", "update_teacher"]


@torch.no_grad()
def copy_student(student: nn.Module, teacher: nn.Module) -> None:
    """Gives the teacher the student's weights and takes it out of the gradient."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, teacher_momentum: float) -> None:
    """``teacher ← teacher_momentum · teacher + (1 − teacher_momentum) · student`` for every parameter.

    A higher momentum means a slower teacher: 1 freezes it, 0 copies the student. Buffers are left alone, as in
    the reference. Two multi-tensor calls instead of one small kernel a parameter.
    """
    into: list[Tensor] = list(teacher.parameters())
    torch._foreach_mul_(into, teacher_momentum)
    torch._foreach_add_(into, [p.detach() for p in student.parameters()], alpha=1.0 - teacher_momentum)
