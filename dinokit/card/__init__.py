"""The card of a model folder: README.md, written from the folder's files unless it was edited by hand.

::

    write_card("shoes/")                       # README.md from config.json, training.json, export_report.json …
    draw_attention("shoes/", backbone)         # figures/attention.png, which the next card shows

Modules: ``facts`` reads the folder, ``head`` makes the Hub's metadata, ``text`` and ``onnx_section`` the sections,
``snippets`` the code; ``check`` applies the Hub's checks, ``record`` describes the training, ``measured`` the scores,
``figures`` draws figures with the model, ``write`` keeps manual edits. Neither torch nor network access is needed.
"""

from __future__ import annotations

from dinokit.card.check import card_problems
from dinokit.card.facts import CardFacts, CardSettings, read_facts
from dinokit.card.figures import DrawnFigure, draw_attention, draw_neighbours
from dinokit.card.record import RECORD_FILE, make_record, read_record, record_of_run
from dinokit.card.text import render_card
from dinokit.card.write import (
    card_is_ours,
    carry_over,
    first_card,
    keep_measured,
    keep_record,
    mark_as_edited,
    why_kept,
    write_card,
    write_card_elsewhere,
)

__all__ = [
    "RECORD_FILE",
    "CardFacts",
    "CardSettings",
    "DrawnFigure",
    "card_is_ours",
    "card_problems",
    "carry_over",
    "draw_attention",
    "draw_neighbours",
    "first_card",
    "keep_measured",
    "keep_record",
    "make_record",
    "mark_as_edited",
    "read_facts",
    "read_record",
    "record_of_run",
    "render_card",
    "why_kept",
    "write_card",
    "write_card_elsewhere",
]
