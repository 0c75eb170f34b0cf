"""DINO pre-training: `dinokit train`. Needs the extra `[train]`."""
