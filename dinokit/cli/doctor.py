"""`dinokit doctor`: what works on this machine, and what to install for the rest to work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dinokit.diagnosis import Diagnosis

__all__ = ["doctor"]

_NOTHING_RUNS = 3


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def doctor(as_json: bool) -> int:
    """Report what is installed, what loads, and what is missing.

    The libraries of ONNX Runtime's GPU providers are loaded one by one, and each missing one is listed with the pip
    command that installs it. No server is contacted, and tokens are not shown. Exit code 0: models run, at least on
    the CPU; 3: they do not.

    \b
    dinokit doctor
    dinokit doctor --json > doctor.json      # for a bug report
    """
    from dinokit.diagnosis import diagnose

    found = diagnose()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        rows = list(_rows(found))
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            click.echo(f"{name:<{width}}  {text}".rstrip())
        for problem in found.problems:
            click.echo(f"\nProblem: {problem}")
        click.echo(f"\n{found.verdict}")
    return 0 if found.can_run else _NOTHING_RUNS


def _rows(found: Diagnosis) -> Iterator[tuple[str, str]]:
    yield "dinokit", found.dinokit
    yield "Python", found.python
    yield "system", found.platform
    for name, version in found.packages.items():
        # only one of the two ONNX Runtimes should be installed
        if version is not None or not name.startswith("onnxruntime"):
            yield name, version or "not installed"
    yield "CPU", f"{found.cpu_threads} threads; {found.cpu.detail}"
    if found.torch is not None:
        yield "torch engine", found.torch.detail
    for gpu in found.gpus:
        yield "GPU", f"{gpu.name}, {_size(gpu.memory_bytes)} (driver for CUDA {found.cuda_driver})"
    if not found.gpus:
        yield "GPU", "none that an NVIDIA driver offers"
    for provider in found.providers[1:]:  # the first is the CPU provider, printed above
        yield provider.name.removesuffix("ExecutionProvider"), provider.reason or "loads"
        for library in provider.missing:
            yield "", f"{library.name}: {library.fix}"
    yield "starter model", found.starter.detail
    if found.hub is not None:
        free = found.hub.cache_free_bytes
        space = "free space unknown" if free is None else f"{_size(free)} free"
        yield "Hub cache", f"{found.hub.cache} ({space})"
        yield "Hub", found.hub.endpoint + (", offline (HF_HUB_OFFLINE)" if found.hub.offline else "")
        yield "Hub token", "present" if found.hub.token else "none"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
