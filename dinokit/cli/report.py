"""`dinokit report`: writes the page of curves of a training run again."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["report"]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> int:
    """Write report.html of a training RUN again, from its metrics.jsonl, and print its path.

    `dinokit train` writes it at every save. The page is one file that works offline.

    \b
    dinokit report runs/mine
    """
    from dinokit.training.monitoring.report import write_report

    click.echo(str(write_report(run)))
    return 0
