"""Adapts the first layer of a network of three channels to any other number of channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

__all__ = ["spread_over_channels"]


def spread_over_channels(
    module: nn.Module, theirs: Mapping[str, Tensor], tell: Callable[[str], None] = lambda _: None
) -> dict[str, Tensor]:
    """Converts convolutions of three input channels to n channels where ``module`` has n; other weights stay.

    Each channel gets the mean over red, green and blue, times 3 / n: a picture whose channels are all equal gives the
    same result as the grey picture before. timm's ``adapt_input_conv`` repeats red, green and blue in turn instead, so
    that of four channels the first and the last would be red; which channels resemble red is unknown.

    Args:
        module: the network that gets the weights.
        theirs: weights of another network; tensors that already fit, or do not fit at all, stay unchanged.
        tell: called with each converted layer.
    """
    fitting = dict(theirs)
    for name, here in module.state_dict().items():
        there = fitting.get(name)
        if there is None or here.ndim != 4 or there.ndim != 4 or there.shape[1] != 3 or here.shape[1] == 3:
            continue
        n = here.shape[1]
        spread = there.mean(dim=1, keepdim=True).mul(3 / n).repeat(1, n, 1, 1)
        if spread.shape == here.shape:
            fitting[name] = spread
            tell(f"{name} has 3 channels and needs {n}: each starts as the mean of the 3, times 3/{n}")
    return fitting
