"""`dinokit models`: lists the model names that every command accepts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

__all__ = ["models"]

_COLUMNS = ("name", "dim", "patch", "params", "MB", "k-NN", "licence", "engines", "here")
_LESS_NEEDED = ("engines", "licence", "params", "k-NN", "patch", "MB", "dim")
"""Columns to hide in a narrow window, in this order."""
_NUMBERS = ("dim", "patch", "params", "MB", "k-NN")


@click.command()
@click.option("--plain", is_flag=True, help="Print one name per line, for scripts.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def models(plain: bool, as_json: bool) -> None:
    """List the models known by name.

    dim is the length of an embedding. MB is the size of the weights file; before a download, four bytes per weight.
    k-NN is the published top-1 accuracy on ImageNet, in percent. here: bundled, in the cache, or downloaded on first
    use. Every command also accepts a Hub id (user/model), a model folder or a file.

    \b
    dinokit models
    dinokit models --json | jq -r '.[] | select(.here == "in cache") | .name'
    """
    if plain and as_json:
        raise click.UsageError("--plain and --json exclude each other; give only one")
    if plain:
        from dinokit.loading.zoo import STARTER, ZOO

        click.echo("\n".join([STARTER, *ZOO]))
        return
    rows = [_starter_row(), *_zoo_rows()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def _starter_row() -> dict[str, Any]:
    from dinokit.errors import ModelError
    from dinokit.loading.locate import locate
    from dinokit.loading.zoo import STARTER
    from dinokit.model_folder.weights import safetensors_shapes

    row: dict[str, Any] = {"name": STARTER, "repo": None, "knn_top1_imagenet": None, "knn_source": ""}
    try:
        found = locate(STARTER)
    except ModelError as error:
        unknown = dict.fromkeys(("embed_dim", "patch_size", "params", "size_mb", "licence"))
        return {**row, **unknown, "engines": [], "here": "missing", "problem": str(error)}
    assert found.weights_path is not None
    return {
        **row,
        "embed_dim": found.config.embed_dim,
        "patch_size": found.config.patch_size,
        "params": sum(_size(shape) for shape in safetensors_shapes(found.weights_path).values()),
        "size_mb": _megabytes(found.weights_path.stat().st_size),
        "licence": found.config.licence,
        "engines": ["onnx", "torch"],
        "here": "bundled",
    }


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _zoo_rows() -> list[dict[str, Any]]:
    from dinokit.loading.hub import cached_file
    from dinokit.loading.zoo import ZOO

    rows = []
    for model in ZOO.values():
        cached = cached_file(model.repo, model.filename)
        rows.append(
            {
                "name": model.name,
                "repo": model.repo,
                "embed_dim": model.embed_dim,
                "patch_size": model.vit.patch_size,
                "params": model.params,
                "size_mb": _megabytes(4 * model.params),  # float32; the file's header is a few kilobytes
                "knn_top1_imagenet": model.knn_top1,
                "knn_source": model.knn_source,
                "licence": model.licence,
                "engines": list(model.engines),
                "here": "in cache" if cached else "download",
            }
        )
    return rows


def _megabytes(count: int) -> float:
    return round(count / 1e6, 1)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from dinokit.loading.zoo import DINOV3_LICENCE

    def table_of(columns: Sequence[str]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=True)
        for row in rows:
            cells = dict(zip(_COLUMNS, _cells(row), strict=True))
            table.add_row(*(cells[column] for column in columns))
        return table

    # A table in a file or a pipe is not cut to the width of a terminal.
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    columns = list(_COLUMNS)
    left_out = []
    for column in _LESS_NEEDED:  # a name that is cut cannot be typed
        if Console(width=1000).measure(table_of(columns)).maximum <= console.width:
            break
        columns.remove(column)
        left_out.append(column)
    console.print(table_of(columns))
    if left_out:
        console.print(f"\nNot shown in this narrow window: {', '.join(left_out)} (--json prints everything)")
    if any(row["licence"] == DINOV3_LICENCE for row in rows):
        console.print("\nTo use a DINOv3 model, accept its licence first: dinokit info dinov3_vits16")


def _cells(row: dict[str, Any]) -> list[str]:
    params = row["params"]
    return [
        row["name"],
        _text(row["embed_dim"]),
        _text(row["patch_size"]),
        f"{params / 1e6:,.1f} M" if params else "–",
        "–" if row["size_mb"] is None else f"{row['size_mb']:,.0f}",
        _text(row["knn_top1_imagenet"]),
        _text(row["licence"]),
        " or ".join(row["engines"]) or "–",
        row["here"],
    ]


def _text(value: object) -> str:
    return "–" if value is None else str(value)
