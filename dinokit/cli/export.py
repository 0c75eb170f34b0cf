"""`dinokit export`: write any model as a model folder with ONNX files, each compared with torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._model_options import go_offline, offline_option, parse_image_size

if TYPE_CHECKING:
    from dinokit.export import ExportReport
    from dinokit.export.triton_export import TritonExport

__all__ = ["export"]

_BATCH = 64  # pictures; a starting point for your own measurements


@click.command("export")
@click.argument("source")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Model folder to write. It may be SOURCE itself if that is a model folder.  [required, except with "
    "--triton]",
)
@click.option(
    "--precision",
    metavar="LIST",
    show_default="fp32; fp16 for ort-cuda",
    help="Comma-separated list of fp32, fp16 (for GPUs) and int8 (for CPUs).",
)
@click.option(
    "--target",
    metavar="LIST",
    show_default="portable; embedder for --triton",
    help="Comma-separated list of portable (normalised pixels in, all outputs), ort-cuda (the same with ONNX Runtime's "
    "fused operators, for its CUDA kernels) and embedder (uint8 crops in, embedding out).",
)
@click.option(
    "--image-size",
    metavar="H[xW]",
    callback=parse_image_size,
    help="Also write graphs for this fixed input size, for TensorRT and CUDA graphs.",
)
@click.option(
    "--external-data",
    is_flag=True,
    help="Store the weights in a second file beside each graph. Models of 2 GiB or more always are.",
)
@click.option(
    "--photos",
    metavar="PATH",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Photographs to compare on: a file, folder or pattern; may be given several times. At most eight are used, "
    "and eight more for int8, evenly over all. Default: the four bundled with dinokit.",
)
@click.option(
    "--labelled",
    metavar="SOURCE",
    help="Labelled pictures: one subfolder per class, a CSV, or another source with labels (.tar with .cls, Parquet, "
    "hf://datasets/…). Also compare the k-NN labels of at most 1000 of them.",
)
@click.option(
    "--triton",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Also write the files into this model repository of NVIDIA's Triton Inference Server.",
)
@click.option(
    "--triton-batch",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="64",
    help="Maximum number of pictures that Triton puts into a batch.",
)
@click.option(
    "--triton-tensorrt",
    is_flag=True,
    help="Run the model with TensorRT inside Triton; needs --image-size.",
)
@click.option("--allow-loss", is_flag=True, help="Keep files that fail the accuracy gate.")
@click.option("--revision", help="Branch, tag or commit of a SOURCE on the Hub.")
@offline_option
@click.option("--overwrite", is_flag=True, help="Replace the model folder at FOLDER if it has other weights.")
@click.option(
    "--name",
    metavar="NAME",
    show_default="unchanged; for a run, its folder's name",
    help="Name of the model in FOLDER, its ONNX files and its card.",
)
@click.option(
    "--trained-by",
    metavar="TEXT",
    show_default="from SOURCE and the runs it started from",
    help="One line on how the weights were made, for `dinokit info` and the card.",
)
@click.option(
    "--licence",
    metavar="ID",
    show_default="unchanged",
    help="Licence of the weights, by its identifier on the Hub: apache-2.0, cc-by-4.0, mit …",
)
@click.option(
    "--weights",
    "weights_dtype",
    type=click.Choice(["float32", "float16"]),
    show_default="unchanged",
    help="Type in which FOLDER stores the weights; computation is in float32 either way.",
)
@click.option(
    "--center",
    metavar="PHOTOS",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Subtract the mean embedding of these pictures (best: the training pictures) from all embeddings, so that "
    "cosines separate pictures better. Stored in the weights. Vision Transformers only; may be given several times.",
)
@click.option(
    "--own-size",
    metavar="H[xW]",
    callback=parse_image_size,
    show_default="unchanged",
    help="Default input size of the exported model in dinokit, timm and transformers; its position embedding is "
    "resized once. Vision Transformers only.",
)
@click.option(
    "--no-onnx",
    is_flag=True,
    help="Write FOLDER without ONNX files: smaller, but dinokit builds the graph each time it loads the model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(
    source: str,
    output: Path | None,
    precision: str | None,
    target: str | None,
    image_size: int | tuple[int, int] | None,
    external_data: bool,
    photos: tuple[Path, ...],
    labelled: str | None,
    triton: Path | None,
    triton_batch: int | None,
    triton_tensorrt: bool,
    allow_loss: bool,
    revision: str | None,
    offline: bool,
    overwrite: bool,
    name: str | None,
    trained_by: str | None,
    licence: str | None,
    weights_dtype: str | None,
    center: tuple[Path, ...],
    own_size: int | tuple[int, int] | None,
    no_onnx: bool,
    as_json: bool,
) -> None:
    """Write a model folder with ONNX files from SOURCE: a training run, a model folder, a known name, a Hub id,
    or weights of facebookresearch (.pth, .safetensors).

    Before a file is written, torch and ONNX Runtime run the same photographs at three image sizes and three batch
    sizes. The export fails and writes nothing if a file misses its accuracy gate:

    \b
    fp32   no number differs by more than 1e-4 of the largest
    fp16   the embeddings' mean cosine with torch's is at least 0.9999, that of patch tokens and attention 0.999
    int8   0.99 and 0.95, and 99 % of the k-NN labels are equal (with --labelled)

    For int8, the photographs determine how each weight is rounded and where activations need more than eight bits.
    If the gate would be missed, the most sensitive weights stay float32, and the report names them. Convolutional
    networks get fixed activation ranges from these photographs, so choose ones like yours, ideally 16 or more; one in
    four is held out, and the gate must hold for those too.

    Files for ort-cuda are compared on the GPU if there is one, otherwise with ONNX Runtime's CPU kernels for the
    same operators, and the report says so. dinokit's authors have not measured speed on a GPU.

    If FOLDER already holds the same weights, it keeps its name, licence and origin unless you give others.

    The report is printed and saved in the folder as export_report.json and in README.md, unless README.md has been
    edited. Needs the extra [train].

    \b
    dinokit export runs/shoes -o shoes
    dinokit export runs/shoes -o shoes --precision fp32,fp16,int8 --labelled my/labelled
    dinokit export dino_vits16 -o vits16 --target portable,embedder
    dinokit export runs/shoes -o shoes --name me/shoes --weights float16 --trained-by "my shoes, two evenings"
    dinokit export shoes -o shoes --no-onnx --licence apache-2.0        # existing ONNX files stay
    dinokit export runs/shoes -o shoes --center photos/shoes            # subtract what all pictures share
    dinokit export runs/shoes -o shoes --own-size 256                   # new default input size in every library
    dinokit export shoes -o shoes --precision fp16 --image-size 224     # adds a file to a model folder
    dinokit export shoes -o shoes --target ort-cuda     # model_cuda_fp16.onnx, which device cuda then takes for fp16
    dinokit export shoes --triton /srv/models --precision fp16
    tritonserver --model-repository=/srv/models
    """
    from rich.console import Console

    from dinokit.errors import UsageError

    if output is None and triton is None:
        raise UsageError("no output given; name a model folder with -o, or a Triton repository with --triton")
    if no_onnx and (triton is not None or output is None):
        raise UsageError("Triton serves ONNX files; leave out --no-onnx, or name a model folder with -o only")
    if triton_tensorrt and triton is None:
        raise UsageError(
            "--triton-tensorrt sets how Triton runs the model; name its repository with --triton"
        )
    if triton_batch is not None and triton is None:
        raise UsageError("--triton-batch sets how Triton runs the model; name its repository with --triton")
    if offline:
        go_offline()
    from dinokit.card.head import unlisted_licence
    from dinokit.export import export_folder
    from dinokit.export.triton_export import export_to_triton
    from dinokit.files.outputs import must_be_writable

    if (stated := (licence or "").strip()) and (remark := unlisted_licence(stated)):
        click.echo(f"Warning: {remark}", err=True)
    if output is not None:
        must_be_writable(output)  # before minutes of work
    report: ExportReport | None
    models: tuple[Path, ...] = ()
    with Console(stderr=True).status("starting") as status:
        options: dict[str, Any] = {
            "precision": precision,
            "target": target or ("embedder" if triton else "portable"),
            "image_size": image_size,
            "external_data": external_data,
            "photos": photos or None,
            "labelled": labelled,
            "allow_loss": allow_loss,
            "revision": revision,
            "overwrite": overwrite,
            "name": name,
            "trained_by": trained_by,
            "licence": licence,
            "weights_dtype": weights_dtype,
            "center": center or None,
            "own_size": own_size,
            "progress": status.update,
        }
        if triton is not None:
            served = export_to_triton(
                source,
                output,
                triton,
                max_batch_size=triton_batch or _BATCH,
                tensorrt=triton_tensorrt,
                **options,
            )
            report, models = served.report, served.models
        else:
            assert output is not None  # refused above
            report = export_folder(source, output, onnx=not no_onnx, **options)
    if report is None:
        _print_reused(served, as_json=as_json)
    else:
        _print_report(report, output, changed=own_size is not None or bool(center), as_json=as_json)
    for path in (output, *models):
        if path:
            click.echo(f"Wrote {path}", err=True)


def _print_reused(served: TritonExport, *, as_json: bool) -> None:
    from dinokit.export.onnx import REPORT_FILE

    assert served.reused is not None
    if as_json:
        click.echo((served.reused / REPORT_FILE).read_text(encoding="utf-8"), nl=False)
    click.echo(
        f"{served.reused} has {', '.join(served.files)} from an earlier export; nothing was exported again",
        err=True,
    )


def _print_report(report: ExportReport, output: Path | None, *, changed: bool, as_json: bool) -> None:
    from dinokit.card import why_kept

    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    elif report.variants:
        _print_tables(report)
    for variant in report.variants:
        for failure in variant.failures():
            click.echo(f"Warning: {variant.file} {failure}; kept because of --allow-loss", err=True)
        if variant.remark:
            click.echo(f"{variant.file}: {variant.remark}", err=True)
    for file in report.dropped:
        click.echo(
            f"Removed {file}: it is not in export_report.json, was changed since, or belongs to other weights or "
            "another input size",
            err=True,
        )
    if report.card == "kept" and output:
        stale = " Its figures show the model before this change." if changed else ""
        click.echo(f"README.md {why_kept(output)} and is kept.{stale}", err=True)


def _print_tables(report: ExportReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dinokit.card.onnx_section import compared_on
    from dinokit.cli._tables import visible

    console = Console()
    comparisons = next((v.comparisons for v in report.variants if v.comparisons), ())
    sizes = dict.fromkeys(f"{c.height}x{c.width}" for c in comparisons)
    batches = dict.fromkeys(str(c.batch_size) for c in comparisons)
    table = Table(
        title=f"{escape(visible(report.model))}: ONNX Runtime against torch",
        caption=f"{compared_on(report.photographs)}, batches of {', '.join(batches)}, {', '.join(sizes)} pixels. "
        "Largest and mean absolute difference; the same of attention; 1 - cosine of the embeddings, mean and worst; "
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
        if not v.comparisons:
            table.add_row(Path(v.file).stem, f"{v.bytes / 1e6:.1f}", *["–"] * 6)
            continue
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
    for speed in dict.fromkeys(v.speed_of for v in report.variants if v.speed_of):
        console.print(f"img/s: {speed}", highlight=False, soft_wrap=True)
