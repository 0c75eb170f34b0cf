"""`dinokit export`: any model to a model folder with ONNX files, each compared with torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dinokit.cli._model_options import offline_option, parse_image_size

if TYPE_CHECKING:
    from dinokit.export import ExportReport

__all__ = ["export"]


@click.command("export")
@click.argument("source")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    required=True,
    type=click.Path(path_type=Path),
    help="The model folder to write. It may be SOURCE itself, if that is a model folder.",
)
@click.option(
    "--precision",
    metavar="LIST",
    default="fp32",
    show_default=True,
    help="Of fp32, fp16 (for GPUs) and int8 (for CPUs), with commas between.",
)
@click.option(
    "--target",
    metavar="LIST",
    default="portable",
    show_default=True,
    help="Of portable (normalised pixels in, all outputs) and embedder (uint8 crops in, embedding out).",
)
@click.option(
    "--image-size",
    metavar="H[xW]",
    callback=parse_image_size,
    help="Write graphs for this one size, beside those for every size: for TensorRT and CUDA graphs.",
)
@click.option(
    "--photos",
    metavar="PATH",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Photographs to compare on: a file, folder or pattern; may be given several times. "
    "By default four that come with dinokit.",
)
@click.option(
    "--labelled",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="A folder a class (or a CSV): compare the k-NN labels of its pictures too, 1000 at most.",
)
@click.option("--allow-loss", is_flag=True, help="Keep files whose accuracy is below the gate.")
@click.option("--revision", help="Branch, tag or commit of a SOURCE on the Hub.")
@offline_option
@click.option("--force", is_flag=True, help="Replace a model folder at FOLDER that holds other weights.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(
    source: str,
    output: Path,
    precision: str,
    target: str,
    image_size: int | tuple[int, int] | None,
    photos: tuple[Path, ...],
    labelled: Path | None,
    allow_loss: bool,
    revision: str | None,
    offline: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a model folder with ONNX files from SOURCE: a training run, a model folder, a known name, a Hub id,
    or weights of facebookresearch (.pth, .safetensors).

    Before a file is left on disk, torch and ONNX Runtime run the same photographs at three image sizes and three
    batch sizes. The export fails, and writes nothing, where a file is below its gate:

    \b
    fp32   no number differs by more than 1e-4
    fp16   the embeddings' mean cosine with torch's is at least 0.9999
    int8   it is at least 0.99, and 99 % of the k-NN labels are equal (with --labelled)

    The report is printed, and kept in the folder as export_report.json and, unless a person has edited it, in
    README.md. Needs the extra [train].

    \b
    dinokit export runs/shoes -o shoes
    dinokit export runs/shoes -o shoes --precision fp32,fp16,int8 --labelled my/labelled
    dinokit export dino_vits16 -o vits16 --target portable,embedder
    dinokit export shoes -o shoes --precision fp16 --image-size 224     # adds a file to a model folder
    """
    from rich.console import Console

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
    from dinokit.export import export_folder

    talk = Console(stderr=True)
    with talk.status("starting") as status:
        report = export_folder(
            source,
            output,
            precision=precision,
            target=target,
            image_size=image_size,
            photos=photos or None,
            labelled=labelled,
            allow_loss=allow_loss,
            revision=revision,
            force=force,
            progress=status.update,
        )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print_tables(report)
    for variant in report.variants:
        for failure in variant.failures():
            click.echo(f"Warning: {variant.file} {failure}; kept, as --allow-loss asks", err=True)
    if report.card == "kept":
        click.echo("README.md was edited by a person and stays as it is.", err=True)
    click.echo(f"Wrote {output}", err=True)


def _print_tables(report: ExportReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    comparisons = report.variants[0].comparisons
    sizes = dict.fromkeys(f"{c.height}x{c.width}" for c in comparisons)
    batches = dict.fromkeys(str(c.batch_size) for c in comparisons)
    table = Table(
        title=f"{report.model}: ONNX Runtime against torch",
        caption=f"{len(report.photographs)} photographs, batches of {', '.join(batches)}, {', '.join(sizes)} pixels. "
        "Largest and mean absolute difference; of attention; 1 - cosine of the embeddings, on average and at worst; "
        "equal k-NN labels",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),  # 80 columns wide
    )
    table.add_column("file", no_wrap=True)
    for column in ("MB", "max", "mean", "attn", "1-cos", "worst", "labels", "img/s"):
        table.add_column(column, justify="right", no_wrap=True, min_width=5)
    for v in report.variants:
        attention = [c.attention_max for c in v.comparisons if c.attention_max is not None]
        mean, _, least = v.cosines
        table.add_row(
            Path(v.file).stem,
            f"{v.bytes / 1e6:.1f}",
            f"{v.max_difference:.0e}",
            f"{v.mean_difference:.0e}",
            f"{max(attention):.0e}" if attention else "–",
            f"{max(0.0, 1 - mean):.0e}",
            f"{max(0.0, 1 - least):.0e}",
            f"{v.labels.equal:.1%}" if v.labels else "–",
            f"{v.images_per_second:.0f}" if v.images_per_second else "–",
        )
    console.print(table)
    for v in report.variants:
        if v.labels:
            console.print(
                f"{v.file}: k-NN labels of {v.labels.pictures} pictures, {v.labels.accuracy:.1%} right "
                f"(torch {v.labels.accuracy_torch:.1%})",
                highlight=False,
                soft_wrap=True,
            )
    if report.variants[0].speed_of:
        console.print(f"img/s: {report.variants[0].speed_of}", highlight=False, soft_wrap=True)
