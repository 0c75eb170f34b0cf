"""`dinokit export`: a training run to a model folder with ONNX, compared with torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dinokit.export import ParityReport

__all__ = ["export"]


@click.command("export")
@click.argument("source", metavar="RUN_OR_FOLDER", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    required=True,
    type=click.Path(path_type=Path),
    help="The model folder to write. It may be RUN_OR_FOLDER itself, if that is a model folder.",
)
@click.option(
    "--photos",
    metavar="PATH",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Photographs to compare on: a file, folder or pattern; may be given several times. "
    "By default four that come with dinokit.",
)
@click.option("--force", is_flag=True, help="Replace a model folder at FOLDER that holds other weights.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(source: Path, output: Path, photos: tuple[Path, ...], force: bool, as_json: bool) -> None:
    """Write a model folder with onnx/model.onnx from a training run or a model folder.

    Before anything is left on disk, torch and ONNX Runtime run the same photographs at three image sizes and
    three batch sizes; if any number differs by more than 1e-4, the export fails. The report is printed and kept
    in the folder as export_report.json. Needs the extra [train].

    \b
    dinokit export runs/shoes -o shoes
    dinokit export runs/shoes -o shoes --photos my/photos --json
    dinokit export shoes -o shoes              # adds ONNX to a model folder
    """
    from rich.console import Console

    from dinokit.export import export_folder

    talk = Console(stderr=True)
    with talk.status("starting") as status:
        report = export_folder(source, output, photos=photos or None, force=force, progress=status.update)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print_table(report)
    talk.print(f"Wrote {output}", highlight=False, soft_wrap=True)


def _print_table(report: ParityReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{report.model}: {report.file} against torch",
        caption=f"absolute differences on {len(report.photographs)} photographs; "
        f"largest {report.max_difference:.1e}, allowed {report.tolerance:.0e}",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),  # 80 columns wide
    )
    for column in ("batch", "size", "CLS", "mean", "tokens", "mean", "attention", "1-cosine"):
        table.add_column(column, justify="right", no_wrap=True)
    for c in report.comparisons:
        numbers = (
            c.cls_max,
            c.cls_mean,
            c.tokens_max,
            c.tokens_mean,
            c.attention_max,
            max(0, 1 - c.cosine_min),
        )
        table.add_row(str(c.batch_size), f"{c.height}x{c.width}", *(f"{value:.1e}" for value in numbers))
    Console().print(table)
