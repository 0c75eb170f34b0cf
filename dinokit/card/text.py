"""The card as Markdown: sections, each from the facts that carry it; what is not known is not said."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dinokit.card.facts import CardFacts
from dinokit.card.head import LICENCE_LINKS, base_model, licence_metadata, yaml_head
from dinokit.card.markdown import cell, millions, number, percent, table
from dinokit.card.measured import at_k
from dinokit.card.onnx_section import marked_section
from dinokit.card.snippets import snippets
from dinokit.card.training_section import PAPERS, knn_while_training, training_section
from dinokit.loading.zoo import ZOO, ZooModel
from dinokit.pictures.bands import is_photographic

__all__ = ["render_card"]


def render_card(facts: CardFacts) -> str:
    """The whole card, metadata first."""
    parts = [
        facts.settings.mark(),
        f"# {cell(facts.config.name)}",
        *_introduction(facts),
        *_use(facts),
        *_reached(facts),
        *_neighbours(facts),
        *training_section(facts),
        *([marked_section(facts.report)] if facts.report else []),
        *_limits(facts),
        f"*Written by {cell(facts.config.written_by)} from the files beside it. Once a person has edited it, dinokit "
        "leaves it alone.*",
    ]
    return yaml_head(facts) + "\n" + "\n\n".join(part.strip("\n") for part in parts) + "\n"


def published(facts: CardFacts) -> ZooModel | None:
    """The known model whose published weights these are."""
    base = base_model(facts)
    return next((model for model in ZOO.values() if base is not None and model.repo == base), None)


# -- what it is


def _introduction(facts: CardFacts) -> Iterator[str]:
    known, dim = published(facts), facts.config.embed_dim
    if facts.record:
        how = "a backbone for image features, trained by `dinokit train` on pictures without labels"
    elif known:
        family = PAPERS[known.name.split("_")[0].replace("dino", "DINO")]
        how = (
            f"{known.name} of {family}: a backbone for image features, pretrained on pictures without labels"
        )
    elif facts.method:
        how = "a backbone for image features of the DINO family, pretrained on pictures without labels"
    else:
        how = "a backbone for image features"
    yield (
        f"This is {how}. A picture becomes {dim} numbers that lie near those of similar pictures: for search, "
        "grouping, near-duplicates, labels by neighbours, or a small classifier on top."
    )
    figure = facts.figures.get("attention")
    if figure:
        yield f"![What the model looks at](figures/{_file(figure)})"
        yield f"*{_attention_caption(figure)}*"
    yield table(("", ""), _size_rows(facts))


def _attention_caption(figure: Mapping[str, Any]) -> str:
    height, width = figure.get("image_size", ["?", "?"])
    credits = " The photographs are CC0 or in the public domain." if figure.get("bundled") else ""
    return (
        "What the model looks at: attention of the last block from the CLS token to the patches, the mean of all "
        f"heads and each head, at {height} × {width} pixels. Dark is little, yellow is much. Made by `dinokit card`."
        f"{credits}"
    )


def _size_rows(facts: CardFacts) -> Iterator[tuple[str, str]]:
    config = facts.config
    vit = getattr(config, "vit", None)
    if config.timm_architecture:
        yield "architecture (timm)", f"`{config.timm_architecture}`"
    yield "parameters", millions(facts.params)
    yield "features", f"{config.embed_dim} numbers a picture"
    depth, heads = getattr(vit, "depth", None), getattr(config, "num_heads", 0)
    if depth and heads:
        registers = getattr(config, "num_register_tokens", 0)
        extra = f", {registers} registers" if registers else ""
        yield (
            "blocks, heads, patches",
            f"{depth}, {heads}, {config.patch_size} × {config.patch_size} pixels{extra}",
        )
    yield "sees", _preprocessing(facts)
    yield "weights", f"{facts.stored_as}, {facts.weights_bytes / 1e6:.1f} MB; computed in float32"
    yield "licence", _licence(config.licence)
    yield "comes from", _source(facts)


def _preprocessing(facts: CardFacts) -> str:
    prepare = facts.config.preprocessing
    height, width = prepare.crop_px
    if isinstance(prepare.resize_px, tuple):
        resized = "squashed to {} × {}".format(*prepare.resize_px)
        crop = (
            ""
            if tuple(prepare.resize_px) == tuple(prepare.crop_px)
            else f", of which the middle {height} × {width}"
        )
    else:
        resized, crop = f"short side to {prepare.resize_px}", f", of which the middle {height} × {width}"
    multiple = getattr(facts.config, "size_multiple", facts.config.patch_size)
    sizes = "sizes" if multiple == 1 else f"multiples of {multiple}"
    others = f"; at other {sizes} it works, not judged here" if multiple else ""
    channels = {3: "", 1: " of one channel, grey"}.get(prepare.channels, f" of {prepare.channels} channels")
    return f"{height} × {width} pixels{channels}: {resized} ({prepare.interpolation}){crop}{others}"


def _licence(licence: str) -> str:
    if licence_metadata(licence) == {"license": "other"}:
        return "not stated; ask who trained it"
    link = LICENCE_LINKS.get(licence)
    return f"[{licence}]({link})" if link else cell(licence)


def _source(facts: CardFacts) -> str:
    base, source = base_model(facts), facts.config.source
    if base:
        return f"[{base}](https://huggingface.co/{base}), converted"
    if re.match(r"(?:[A-Za-z]:)?[/\\~]", source):  # a path of somebody's machine
        source = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    return cell(source) if source else "not stated"


# -- how it is used


def _use(facts: CardFacts) -> Iterator[str]:
    yield "## Use it"
    for title, language, code in snippets(facts):
        yield f"### {title}"
        yield f"```{language}\n{code.rstrip()}\n```"
    yield _agreement(facts)


def _agreement(facts: CardFacts) -> str:
    sentences = []
    if facts.for_timm or facts.for_transformers or facts.for_onnxruntime:
        sentences.append("From the same pixels all of these give the same vectors, to 1e-4.")
    channels = facts.config.preprocessing.channels
    if not is_photographic(channels):
        sentences.append(
            "transformers' `AutoImageProcessor`, timm's transforms and Transformers.js read pictures of 1 or 3 "
            f"channels only, so the {channels} channels are resized here one by one, as dinokit does it; for "
            "JavaScript there is no such code."
        )
    elif facts.for_transformers:
        sentences.append(
            "transformers makes the pixels with torchvision, which rounds otherwise than Pillow now and then, and at "
            "some sizes crops one pixel beside; its vectors of a photograph are near dinokit's, not equal."
        )
    if facts.for_transformers_js:
        sentences.append(
            "So are those of Transformers.js, which decodes and resizes photographs in its own way (a browser in "
            "another way than Node.js): compare vectors that the same library made."
        )
    return " ".join(sentences)


# -- what it reaches


def _reached(facts: CardFacts) -> Iterator[str]:
    known = published(facts)
    last = facts.record["runs"][-1] if facts.record else {}
    found = known.knn_top1 if known else None
    if not facts.measured and not last.get("knn") and found is None:
        return
    yield "## What it reaches"
    if facts.measured:
        yield (
            "Frozen features on labelled pictures, top-1 with its 95 % interval, measured by `dinokit eval`; raw "
            "pixels (16 × 16) are the floor that features must beat:"
        )
        yield _measured_table(facts)
    yield from knn_while_training(last)
    if known and found is not None:
        yield f"k-NN on ImageNet-1k as published, not measured here: {found} % ({known.knn_source})."


def _measured_table(facts: CardFacts) -> str:
    rows = []
    for entry in facts.measured:
        score, floor = at_k(entry["knn"]), entry.get("raw_pixels")
        loo = "" if entry["protocol"] == "queries" else ", each by the others"
        rows.append(
            (
                f"{cell(str(entry['set']))}, {number(entry.get('classes'))} classes",
                f"{number(entry['references'])} / {number(entry['judged'])}{loo}",
                f"{_interval(score['top1'])} (k = {score['k']})",
                _interval((entry.get("linear") or {}).get("top1")),
                _interval(at_k(floor["knn"])["top1"]) if floor else "–",
            )
        )
    return table(("set", "references / judged", "k-NN", "linear probe", "raw pixels, k-NN"), rows)


def _interval(share: Mapping[str, Any] | None) -> str:
    """``56.3 % (53.2 – 59.4)``"""
    if not share:
        return "–"
    low, high = share.get("low"), share.get("high")
    return percent(share.get("value")) + (
        f" ({100 * low:.1f} – {100 * high:.1f})" if low is not None and high is not None else ""
    )


def _neighbours(facts: CardFacts) -> Iterator[str]:
    figure = facts.figures.get("neighbours")
    if figure:
        yield "## What it finds similar"
        yield f"![Nearest neighbours](figures/{_file(figure)})"
        yield (
            f"*Photographs, and of {figure.get('pictures', '?')} in all those that are nearest by the cosine of their "
            "features, which stands below; made by `dinokit card`, queries chosen evenly and not by hand.*"
        )


# -- what it is not good for


def _limits(facts: CardFacts) -> Iterator[str]:
    prepare = facts.config.preprocessing
    height, width = prepare.crop_px
    n_images = facts.record["runs"][-1].get("n_images") if facts.record else None
    points = [
        "It gives features, not labels. Compare only vectors of the same weights and the same preprocessing."
    ]
    if n_images:
        points.append(f"It learned from {number(n_images)} pictures and knows little beyond what they show.")
    if isinstance(prepare.resize_px, tuple):
        points.append(f"It sees a picture squashed to {height} × {width} pixels; finer detail is lost.")
    else:
        points.append(
            f"It sees the middle of a picture at {height} × {width} pixels; what lies outside and finer detail is lost."
        )
    points.append(
        "It was not examined for bias, nor for faces, medicine or any other use where an error does harm."
    )
    yield "## Limits"
    yield "\n".join(f"- {point}" for point in points)


def _file(figure: Mapping[str, Any]) -> str:
    return str(figure["file"]).rsplit("/", 1)[-1]
