"""The card of an exported folder: written again by ``dinokit.card`` once the report is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinokit.card import card_is_ours, carry_over, mark_as_edited, write_card
from dinokit.card.onnx_section import onnx_section as card_section

__all__ = ["card_is_ours", "card_section", "carry_over", "mark_as_edited", "write_section"]


def write_section(folder: Path, report: Mapping[str, Any] | None) -> None:
    """Brings README.md up to date: all of it, or its section about ONNX files where the rest was handed in as text.

    Args:
        folder: whose card is dinokit's own.
        report: the content of export_report.json; None: there is none.
    """
    write_card(folder, report=report)
