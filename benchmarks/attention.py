"""Attention there and back on this processor: torch's fused kernel beside two matrix products and a softmax.

    python benchmarks/attention.py

Both ways compute the same shapes in one run: 3 heads of width 64, in the number of tokens that crops of 32 to 224
pixels have in patches of 16. The ratio is plain time / fused time: below 1 plain is faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, WIDTH = 3, 64
TOKENS_AND_BATCH = ((5, 512), (17, 256), (37, 128), (65, 64), (101, 32), (197, 32))


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * WIDTH**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def milliseconds(attention: Callable[..., Tensor], inputs: list[Tensor], rounds: int) -> float:
    """Median of the rounds, there and back."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        attention(*inputs).sum().backward()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[2:])[rounds // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype in (torch.bfloat16, torch.float32):
        for n_tokens, batch in TOKENS_AND_BATCH:
            inputs = [
                torch.randn(batch, HEADS, n_tokens, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)
            ]
            slow, quick = (milliseconds(a, inputs, rounds) for a in (fused, plain))
            times = f"fused {slow:7.2f} ms, plain {quick:7.2f} ms, ratio {quick / slow:.2f}"
            print(f"{dtype!s:15} {n_tokens:4} tokens: {times}")


if __name__ == "__main__":
    main()
