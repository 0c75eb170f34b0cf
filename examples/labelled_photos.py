"""The readable photographs of a folder with one subfolder per class, for the scripts that read them more than once.

python examples/labelled_photos.py labelled/          names the unreadable ones and counts the others
"""

from __future__ import annotations

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dinokit.classifiers.labelled import LabelledPictures, find_labelled
from dinokit.errors import DinokitError, ImageError
from dinokit.pictures.images import decode_image


def read_labelled(folder: Path) -> LabelledPictures:
    """Paths and labels. Prints the unreadable photographs, and ends the program if none or one class is left."""
    try:
        found = find_labelled(folder)
    except DinokitError as error:
        raise SystemExit(str(error)) from None
    with ThreadPoolExecutor() as threads:
        errors = list(threads.map(_error_of, found.paths))
    for path, error in zip(found.paths, errors, strict=True):
        if error:
            print(f"{path}: {error}; left out")
    rows = [row for row, error in enumerate(errors) if not error]
    labels = [found.labels[row] for row in rows]
    if len(set(labels)) < 2:
        raise SystemExit(
            f"{folder} has {len(set(labels))} classes with a readable photograph; expected two or more"
        )
    return LabelledPictures([found.paths[row] for row in rows], labels)


def _error_of(path: Any) -> str:
    try:
        decode_image(path)
    except ImageError as error:
        return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    for label, count in sorted(Counter(read_labelled(parser.parse_args().folder).labels).items()):
        print(f"{count:6} {label}")


if __name__ == "__main__":
    main()
