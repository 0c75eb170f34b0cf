"""BatchNorm with the statistics of the whole batch, of which each process has a share; on any device.

torch's SyncBatchNorm has kernels for GPUs only. This one uses operators that every device has, so that several
processes on CPUs train the same network as one process.

Source: Ioffe & Szegedy 2015, Algorithms 1 and 2, and the gradients of §3; the means and squared deviations of the
shares are combined as in Chan, Golub & LeVeque 1979, since sums of squares lose digits where a mean is large.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinokit.errors import UsageError

__all__ = ["SharedBatchNorm1d", "SharedBatchNorm2d", "SharedBatchNormAct2d", "share_statistics"]


def share_statistics(network: nn.Module) -> None:
    """Makes every BatchNorm of a network take its statistics over all processes, in place.

    Only the class of each instance changes, to one with the same state: parameters, buffers, their names and a norm's
    activation stay. Evaluation mode is unaffected.

    Raises:
        UsageError: the network has a kind of BatchNorm that is not supported.
    """
    for name, part in network.named_modules():
        if type(part) in _SHARED:
            part.__class__ = _SHARED[type(part)]
        elif isinstance(part, nn.modules.batchnorm._BatchNorm) and type(part) not in _SHARED.values():
            raise UsageError(
                f"{name} is a {type(part).__name__}, whose statistics cannot be shared between processes; use "
                "devices=1, or another network such as resnet50"
            )


class _Shared(nn.modules.batchnorm._BatchNorm):
    """The forward pass in training mode; the other base class does the rest."""

    def _normalise(self, x: Tensor) -> Tensor:
        """(B, C, …) to the same shape and dtype; called by all processes together."""
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        y: Tensor
        y, mean, variance, count = _normalised(x, self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            # Without momentum: the mean over all batches so far.
            share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean += share * (mean - self.running_mean)
            self.running_var += share * (variance * (count / (count - 1)) - self.running_var)
        return y

    @property
    def _by_batch(self) -> bool:
        return self.training or self.running_mean is None


class SharedBatchNorm1d(_Shared, nn.BatchNorm1d):
    """As torch's, for (B, C) or (B, C, L)."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._normalise(x) if self._by_batch else super().forward(x)
        return y


class SharedBatchNorm2d(_Shared, nn.BatchNorm2d):
    """As torch's, for (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._normalise(x) if self._by_batch else super().forward(x)
        return y


class SharedBatchNormAct2d(_Shared, BatchNormAct2d):
    """As timm's, with its activation, for (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._by_batch:
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        y: Tensor = self.act(self.drop(self._normalise(x)))
        return y


_SHARED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SharedBatchNorm1d,
    nn.BatchNorm2d: SharedBatchNorm2d,
    BatchNormAct2d: SharedBatchNormAct2d,
}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised values; mean (C,), variance (C,) and count () float32 over the batch of all processes."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Normalise.apply(x, weight, bias, eps)
    return found


class _Normalise(torch.autograd.Function):
    """One collective operation in each direction; the backward pass needs the input and two numbers per channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _statistics(x)
        y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        others = _all_but_channels(x)
        deviation = x.float() - _along(mean, x)
        dy = dy.float()
        # Gradients of bias and weight over this process's share; they are averaged with all other gradients.
        d_bias = dy.sum(others)
        d_weight = (dy * deviation).sum(others) * inverse_std
        dx = None
        if ctx.needs_input_grad[0]:
            # Each value contributed to the mean and variance of the whole batch: these terms are summed over processes.
            sums = torch.stack([d_bias, d_weight])
            torch.distributed.all_reduce(sums)
            mean_dy, mean_dy_y = sums / count
            scale = inverse_std if weight is None else inverse_std * weight.float()
            dx = dy - _along(mean_dy, x) - deviation * _along(inverse_std * mean_dy_y, x)
            dx = (dx * _along(scale, x)).to(x.dtype)
        return (
            dx,
            d_weight.to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None,
            d_bias.to(weight.dtype) if weight is not None and ctx.needs_input_grad[2] else None,
            None,
        )


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (C,) and the number of values per channel, over all processes; shares may be unequal."""
    n_here = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x.float(), dim=_all_but_channels(x), correction=0)
    here = torch.stack([mean, variance, torch.full_like(mean, n_here)])
    shares = [torch.empty_like(here) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shares, here)
    means, variances, counts = torch.stack(shares, dim=1)  # (processes, C) each
    count = counts[:, 0].sum()
    if count < 2:
        raise ValueError("BatchNorm needs at least 2 values per channel in training, and the batch has 1")
    mean = (counts * means).sum(dim=0) / count
    variance = (counts * (variances + (means - mean).square())).sum(dim=0) / count
    return mean, variance, count


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """(C,) reshaped to broadcast with ``x``."""
    return values.view(-1, *[1] * (x.ndim - 2))
