"""`dinokit pull`: download a model from the Hugging Face Hub into the cache or a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dinokit.cli._model_options import go_offline, offline_option

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["pull"]

# dinokit opens no pickles, so it fetches none, nor other frameworks' weights.
_LEFT_OUT = ["*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.pickle", "*.pkl", "*.pt", "*.pth", "*.tflite"]


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Write the model to this new folder. Default: only the Hub's cache.",
)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(model: str, output: Path | None, revision: str | None, offline: bool, as_json: bool) -> None:
    """Fetch MODEL and print where it is.

    MODEL is a Hub id (user/name), a known name (`dinokit models`), or a local folder, which is checked and, with -o,
    copied. Cached files are not fetched again. HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME are respected.

    \b
    dinokit pull me/shoes
    dinokit pull me/shoes -o shoes/ --revision v2
    dinokit pull dino_vits16 -o dino_vits16/    # a model folder, ready for machines without network
    """
    from dinokit.errors import UsageError

    if offline:
        go_offline()
    if output is not None and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder; choose another place or remove it")
    source, commit, write = _fetch(model, revision)
    if output is not None:
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise UsageError(
                f"{output} lies in {source}, which would be copied into itself; choose another place"
            )
        write(output)
    where = source if output is None else output.resolve()
    if as_json:
        click.echo(json.dumps({"model": model, "path": str(where), "revision": commit}, indent=2))
    else:
        click.echo(where)


def _fetch(model: str, revision: str | None) -> tuple[Path, str | None, Callable[[Path], object]]:
    """Where the model is, its commit, and a function that writes it into a folder."""
    from dinokit.loading.locate import locate
    from dinokit.loading.zoo import ZOO
    from dinokit.model_folder.folder import write_model_folder

    on_hub = model not in ZOO and not Path(model).expanduser().exists() and "/" in model
    if on_hub and not model.startswith(("/", ".", "~")) and model.count("/") == 1:
        folder, commit = _snapshot(model, revision)
        return folder, commit, lambda output: _copy(folder, output)
    found = locate(model, revision=revision)
    path = found.onnx_path if found.weights_path is None else found.weights_path
    assert path is not None  # every model that was located lies somewhere
    load = found.load_weights
    if (
        found.kind == "zoo" and load is not None
    ):  # a repository in timm's format: add what dinokit knows of it
        return path, found.revision, lambda output: write_model_folder(output, found.config, load())
    if found.kind in ("folder", "bundled"):
        folder = path.parent
        return folder, None, lambda output: _copy(folder, output)
    return path, None, lambda output: _copy_files([path, *_others_of(path)], output)


def _snapshot(repo: str, revision: str | None) -> tuple[Path, str | None]:
    """The whole repository in the cache, and its commit."""
    from huggingface_hub import errors, snapshot_download

    from dinokit.errors import ModelError
    from dinokit.loading.hub import connection_broke
    from dinokit.loading.locate import locate

    # Fetch what dinokit needs first: locate has specific error messages, refuses a repository that dinokit cannot read
    # before its weights are fetched, and gives the commit for all other files.
    commit = locate(repo, revision=revision).revision
    try:
        folder = Path(
            snapshot_download(repo, revision=commit, ignore_patterns=_LEFT_OUT, library_name="dinokit")
        )
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{repo} is only partly in the cache, and the rest cannot be fetched: offline mode is on "
            "(HF_HUB_OFFLINE) or the Hub cannot be reached. Pull it once while online"
        ) from error
    except Exception as error:
        # The Hub's own answers are OSErrors, too.
        if not isinstance(error, OSError) and not connection_broke(error):
            raise
        raise ModelError(
            f"fetching {repo} was interrupted ({type(error).__name__}); run the same command again to resume"
        ) from error
    locate(folder)  # checks the whole folder, including the weights for transformers
    return folder, commit


def _others_of(file: Path) -> list[Path]:
    """The other files that a model needs: the parts listed in an index, or the weights beside an ONNX file."""
    from dinokit.errors import ModelError
    from dinokit.model_folder.contract import data_file_of, missing_data_file
    from dinokit.model_folder.weight_files import INDEX_SUFFIX, find_weight_files

    if file.name.endswith(INDEX_SUFFIX):
        name = file.name.removesuffix(".index.json")
        found = find_weight_files(name, lambda part: _if_there(file.with_name(part)), str(file.parent))
        return list(found.parts.values()) if found else []
    if file.suffix != ".onnx":
        return []
    if missing := missing_data_file(file):
        raise ModelError(f"{file} has its weights in {missing.name}, which is not beside it; fetch both")
    data = data_file_of(file)
    return [] if data is None else [data]


def _if_there(file: Path) -> Path | None:
    return file if file.is_file() else None


def _copy(source: Path, output: Path) -> None:
    """Copies real files, since a snapshot in the cache consists of links. The folder appears once complete."""
    from dinokit.files.outputs import atomic_folder

    with atomic_folder(output.resolve()) as new:
        shutil.copytree(source, new)


def _copy_files(files: list[Path], output: Path) -> None:
    """The folder appears once complete."""
    from dinokit.files.outputs import atomic_folder

    with atomic_folder(output.resolve()) as new:
        new.mkdir()
        for file in files:
            shutil.copyfile(file, new / file.name)
