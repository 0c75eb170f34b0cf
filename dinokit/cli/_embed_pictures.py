"""Embeds pictures for commands that need the vectors only while they run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.sources import Item
    from dinokit.tables.embeddings import EmbeddingTable

__all__ = ["embed_pictures"]


def embed_pictures(
    pictures: Sequence[Item],
    backbone: Backbone,
    *,
    what: str = "cls",
    task: str = "embedding",
    batch_size: int = 32,
    quiet: bool = False,
) -> EmbeddingTable:
    """The table that `dinokit embed` would write, in memory; nothing stays on the disk."""
    from dinokit.cli._progress import counting_failures, open_progress
    from dinokit.errors import DinokitError
    from dinokit.tables.embeddings import read_embeddings
    from dinokit.tables.run import embed_to_table

    with (
        tempfile.TemporaryDirectory(prefix="dinokit-") as folder,
        open_progress(len(pictures), task=task, quiet=quiet) as progress,
    ):
        table = Path(folder) / "embeddings.parquet"
        try:
            embed_to_table(
                pictures,
                table,
                backbone,
                what=what,
                batch_size=batch_size,
                on_progress=counting_failures(progress),
            )
        except DinokitError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            full = error.__cause__
            raise DinokitError(
                f"{tempfile.gettempdir()} cannot take more temporary files ({full.strerror or full}); set TMPDIR to "
                "another folder, or embed the pictures first with dinokit embed"
            ) from full
        return read_embeddings(table)
