"""A training step in three ways: a pass for each crop size, both sizes through shared layers, compiled.

    python benchmarks/training_step.py [--device cuda] [--compile] [-o benchmarks/results/training_step_cpu.json]

One process, the same network and the same made-up crops for all ways, which take turns round by round, so that a busy
machine slows all alike. Ratios are time / time of a pass for each size, of the medians: below 1 is faster. Decoding and
making crops are not part of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from provenance import command

from dinokit.training.adapt import adapt
from dinokit.training.networks.network import build_network
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.run.state import TrainingState
from dinokit.training.trainer import training_step

SETUPS = {
    "ViT-Ti/16, 2 × 64 and 4 × 32 pixels": "vit_tiny_patch16_224 64 32 4",
    "ViT-S/16, 2 × 224 and 8 × 96 pixels": "vit_small_patch16_224 224 96 8",
}
KEYS = ("arch", "global_crop_px", "local_crop_px", "n_local_crops")


def make_state(recipe: Recipe, *, shared: bool) -> TrainingState:
    torch.manual_seed(0)
    networks = (build_network(recipe, is_student=True), build_network(recipe, is_student=False))
    for network in networks:
        network._shares_layers = shared
    return TrainingState.create(recipe, *networks, steps_per_epoch=10_000)


def milliseconds(state: TrainingState, crops: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    float(training_step(state, crops).loss)  # reading it waits for the device
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--setup", choices=[*SETUPS, "all"], default=next(iter(SETUPS)))
    parser.add_argument(
        "--compile", action="store_true", help="also with torch.compile; takes minutes to begin"
    )
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    results: dict[str, Any] = {}
    for name in SETUPS if options.setup == "all" else [options.setup]:
        settings = [f"{key}={value}" for key, value in zip(KEYS, SETUPS[name].split(), strict=True)]
        settings += [f"batch_size={options.batch_size}", f"device={options.device}"]
        recipe, _ = adapt(with_overrides(load_recipe("default"), settings), 10_000)
        ways = {
            "a pass for each size": make_state(recipe, shared=False),
            "shared layers": make_state(recipe, shared=True),
        }
        if options.compile:
            ways["shared layers, compiled"] = make_state(
                with_overrides(recipe, ["compile=true"]), shared=True
            )
        device = next(iter(ways.values())).device
        sizes = ((2, recipe.global_crop_px), (recipe.n_local_crops, recipe.local_crop_px))
        crops = [torch.randn(n, options.batch_size, 3, side, side, device=device) for n, side in sizes]
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds + 2):
            for way, state in ways.items():
                times[way].append(milliseconds(state, crops))
        medians = {way: sorted(all_[2:])[options.rounds // 2] for way, all_ in times.items()}
        base = next(iter(medians.values()))
        results[name] = {
            way: {"ms": round(ms, 1), "ratio": round(ms / base, 3)} for way, ms in medians.items()
        } | {"precision": str(next(iter(ways.values())).dtype).removeprefix("torch.")}
        for way, ms in medians.items():
            print(f"{name}: {way:24} {ms:8.1f} ms, ratio {ms / base:.2f}")
    report = {
        "command": command(),
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "device": options.device if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "results": results,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
