"""DINO pre-training: `dinokit train`. Needs the extra `[train]`."""

from __future__ import annotations

import importlib.util

from dinokit.errors import MissingExtraError

# Looked for, not imported: reading a recipe needs none of torch's seconds.
_missing = [name for name in ("torch", "timm", "yaml") if importlib.util.find_spec(name) is None]
if _missing:
    raise MissingExtraError("training", extra="train", package=" and ".join(_missing))
