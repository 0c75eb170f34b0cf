"""`dinokit info MODEL`: describes a model without running it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._model_options import go_offline, offline_option

if TYPE_CHECKING:
    from dinokit.loading.locate import Located
    from dinokit.loading.zoo import ZooModel
    from dinokit.model_folder.architecture import TimmArchitecture
    from dinokit.model_folder.config import BackboneConfig

__all__ = ["info"]


@click.command()
@click.argument("model", default="starter")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def info(model: str, revision: str | None, offline: bool, as_json: bool) -> None:
    """Describe MODEL: sizes, preprocessing, licence and origin. The model is not run.

    MODEL is a known name (`dinokit models`), a run or model folder, a file, or a Hub id. Models with a known name are
    described without downloading them.

    \b
    dinokit info
    dinokit info runs/mine
    dinokit info dino_vits16 --json
    """
    from dinokit.cli._tables import visible
    from dinokit.loading.locate import locate
    from dinokit.loading.zoo import ZOO

    if offline:
        go_offline()
    if model in ZOO and revision is None:
        facts = _zoo_facts(ZOO[model])
    else:
        facts = _located_facts(locate(model, revision=revision))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        click.echo(f"{key.replace('_', ' '):<{width}}  {visible(_text(value))}")


def _zoo_facts(model: ZooModel) -> dict[str, Any]:
    from dinokit.loading.hub import cached_file
    from dinokit.loading.locate import LICENCE_VARIABLE
    from dinokit.loading.zoo import DINOV3_LICENCE, DINOV3_LICENCE_URL

    facts = {
        "name": model.name,
        "kind": "known name",
        "source": f"{model.repo} on the Hugging Face Hub",
        "here": _place(cached_file(model.repo, model.filename)),
        **_config_facts(model.config),
        "params": model.params,
        "engines": list(model.engines),
    }
    if model.knn_top1 is not None:
        facts["knn_top1_imagenet"] = f"{model.knn_top1} % ({model.knn_source})"
    if model.licence == DINOV3_LICENCE:
        facts["to_accept"] = f"read {DINOV3_LICENCE_URL} and set {LICENCE_VARIABLE}=1"
    return facts


def _place(path: object) -> str:
    return "not downloaded yet" if path is None else str(path)


def _located_facts(found: Located) -> dict[str, Any]:
    from dinokit.model_folder.config import TIMM_FILE
    from dinokit.model_folder.contract import classifier_of
    from dinokit.vit_graph import can_write

    config, weights = found.config, found.weights_path
    head = None if found.onnx_path is None else classifier_of(found.onnx_path)
    onnx = found.onnx_path is not None or can_write(config.architecture)
    possible = {"onnx": onnx, "torch": found.load_weights is not None}
    by_dinokit = weights is None or (weights.name == TIMM_FILE and found.kind != "weights")
    facts = {
        "name": config.name,
        "kind": found.kind,
        "source": found.source,
        "trained_by": config.source if config.source not in ("", found.source) else None,
        "revision": found.revision,
        **_config_facts(config),
        "classifier": head,
        "engines": [engine for engine, can in possible.items() if can],
        "onnx_file": None if found.onnx_path is None else str(found.onnx_path),
        "weights_sha256": found.weights_sha256,
        "written_by": config.written_by if by_dinokit else None,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _config_facts(config: BackboneConfig) -> dict[str, Any]:
    from dinokit.model_folder.architecture import VitArchitecture

    known, prepare = config.architecture, config.preprocessing
    if isinstance(known, VitArchitecture):
        sizes: dict[str, Any] = {
            "depth": known.depth,
            "num_heads": known.num_heads,
            "patch_size": known.patch_size,
            "num_register_tokens": known.num_register_tokens,
        }
    else:
        sizes = _network_facts(known)
    return {
        "architecture": config.timm_architecture or None,
        "embed_dim": config.embed_dim,
        **sizes,
        "image_size": list(config.image_size),
        "preprocessing": prepare.to_json(),
        "licence": config.licence,
    }


def _network_facts(known: TimmArchitecture) -> dict[str, Any]:
    """The sizes of a network other than a ViT: its feature map, and the pictures that it accepts."""
    rows, columns = known.grid(*known.image_size)
    height, width = known.image_size
    cells = f"{rows} x {columns} cells of {known.stride} x {known.stride} px from {height} x {width} px"
    multiple = known.size_multiple
    return {
        "feature_map": f"{cells}, {known.token_dim} numbers each" if known.token_dim else "none to show",
        "stride": known.stride,
        "attention": "none to show",
        "takes": f"pictures of {height} x {width} px only"
        if multiple is None
        else "any size"
        if multiple == 1
        else f"sides that are multiples of {multiple} px",
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key.replace('_', ' ')} {_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return "–" if value is None else str(value)
