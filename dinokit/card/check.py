"""Checks whether the Hub would understand a card: its client's own checks, offline, and dinokit's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dinokit.card.head import TASK

__all__ = ["card_problems"]


def card_problems(text: str, licence: str) -> Iterator[str]:
    """Describes what the Hub would refuse or misunderstand in the YAML front matter of README.md.

    Args:
        text: the whole card.
        licence: what ``config.json`` says.
    """
    from huggingface_hub import ModelCard

    try:
        # Parses the YAML, and model-index as the Hub's own evaluation results.
        values: Mapping[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception as error:  # the YAML library's own errors, ValueError, KeyError of a model-index
        reason = " ".join(str(error).split())
        yield f"the YAML front matter of README.md cannot be read ({type(error).__name__}: {reason})"
        return
    if not values:
        yield "README.md does not begin with YAML between two lines ---; the Hub reads licence and task there"
        return
    if not isinstance(values.get("library_name"), str):
        yield f"README.md has library_name {values.get('library_name')!r}; expected a library's name, such as timm"
    if values.get("pipeline_tag") != TASK:
        yield f"README.md has pipeline_tag {values.get('pipeline_tag')!r}; expected {TASK}"
    yield from _licence_problems(values, licence)


def _licence_problems(values: Mapping[str, Any], expected: str) -> Iterator[str]:
    licence = values.get("license")
    named = values.get("license_name") if licence == "other" else licence
    if expected == "other" and licence == "other":
        return  # a custom licence that only its owner can name
    if licence == "other" and named is None:
        yield "README.md has license: other without license_name; the Hub requires both"
    elif named != expected:
        yield f"README.md has license {named!r}, but config.json says {expected!r}; make them agree"
