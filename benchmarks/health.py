"""What watching a run costs, beside the step that it watches.

    python benchmarks/health.py --batch-size 8 --n-prototypes 65536

Prints the milliseconds of a training step of a ViT-S/16 (2 × 224, 8 × 96 pixels, AdamW, CPU, one thread), of taking
in the teacher's outputs (every step), and of measuring (every `log_every_steps`), and their share of ten steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from dinokit.training.monitoring.health import Health
from dinokit.training.recipe import Recipe
from dinokit.training.trainer import TrainingState, build_network, training_step


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The median over the repeats, in CPU time, which other programs on the machine do not lengthen."""
    took = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        took.append(1000 * (time.process_time() - began))
    return sorted(took)[len(took) // 2]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--n-prototypes", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = Recipe(
        arch=options.arch,
        batch_size=options.batch_size,
        n_prototypes=options.n_prototypes,
        teacher_momentum=0.996,
        teacher_temp=0.04,
        warmup_teacher_temp=0.04,
        device="cpu",
    )
    networks = [build_network(recipe, is_student=is_student) for is_student in (True, False)]
    state = TrainingState.create(recipe, *networks, steps_per_epoch=100)
    crops = [
        torch.randn(2, options.batch_size, 3, 224, 224),
        torch.randn(recipe.n_local_crops, options.batch_size, 3, 96, 96),
    ]
    step = milliseconds(lambda: training_step(state, crops), options.repeats)

    health = Health(options.n_prototypes)
    logits = torch.randn(2, options.batch_size, options.n_prototypes)
    embeddings = torch.randn(2, options.batch_size, networks[1].backbone.embed_dim)
    for _ in range(600 // options.batch_size + 1):
        health.observe(logits, embeddings)
    center = torch.zeros(1, options.n_prototypes)
    observe = milliseconds(lambda: health.observe(logits - center, embeddings), 20)
    measure = milliseconds(lambda: health.measure(loss=5.0, entropy=2.0, progress=0.5), 20)
    share = (10 * observe + measure) / (10 * step)
    print(
        f"step {step:.0f} ms, observing {observe:.2f} ms, measuring {measure:.1f} ms; of ten steps {share:.2%}"
    )


if __name__ == "__main__":
    main()
