"""Weights of a network of three channels for one that sees any other number: the first layer is spread over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

__all__ = ["spread_over_channels"]


def spread_over_channels(
    module: nn.Module, theirs: Mapping[str, Tensor], tell: Callable[[str], None] = lambda _: None
) -> dict[str, Tensor]:
    """The same weights, but that a convolution of three channels becomes one of n where ``module`` has n.

    Each channel gets the mean over red, green and blue, times 3 / n: a picture whose channels are all alike is seen as
    the grey one was. timm's ``adapt_input_conv`` repeats red, green and blue in turn instead, so that of four channels
    the first and the last would be red; which of these are like red, nobody knows.

    Args:
        module: the network here.
        theirs: weights of another; what fits already, and what fits in no way, stays as it is.
        tell: told of each layer that was spread.
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
            tell(f"{name} sees 3 channels and is to see {n}: each begins with the mean of the 3, times 3/{n}")
    return fitting
