"""--overwrite replaces what dinokit has drawn, and no photograph."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from small_models import config_for, picture, random_weights

from dinokit.cli import cli
from dinokit.errors import UsageError
from dinokit.files.outputs import must_be_drawn, save_picture
from dinokit.model_folder.folder import write_model_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model_folder(Path("model"), config_for(), random_weights())
    Path("photos").mkdir()
    for name in ("a.png", "b.png"):
        picture(40, 40, seed=1).save(f"photos/{name}")


def contents() -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path("photos").iterdir()}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_drawing_is_known_and_a_photograph_is_not(suffix: str) -> None:
    file = Path(f"x{suffix}")
    must_be_drawn(file)  # there is none
    save_picture(picture(16, 16), file)
    must_be_drawn(file)
    picture(16, 16).save(file)
    with pytest.raises(UsageError, match="was not drawn by dinokit, so it is not replaced"):
        must_be_drawn(file)
    file.write_bytes(b"text")
    with pytest.raises(UsageError, match="was not drawn by dinokit"):
        must_be_drawn(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("duplicates photos -m model --sheet photos/a.png --overwrite", "was not drawn by dinokit"),
        ("select photos -m model -n 1 --sheet photos/a.png --overwrite", "was not drawn by dinokit"),
        ("pca photos -m model -o photos --overwrite", "is inside photos; choose another folder to draw into"),
        ("attention photos -m model -o photos --overwrite", "is inside photos"),
        ("pca other -m model -o photos --overwrite", "photos/a.png exists and was not drawn by dinokit"),
        ("pca stack/a.npy -m model -o stack --overwrite --format npy", "is inside stack"),
    ],
)
def test_photographs_stay(words: str, message: str) -> None:
    Path("other").mkdir()
    picture(40, 40, seed=2).save("other/a.png")
    Path("stack").mkdir()
    np.save("stack/a.npy", np.zeros((40, 40, 3), np.uint8))
    before = contents()
    done = CliRunner().invoke(cli, words.split(), prog_name="dinokit")
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert contents() == before
    assert np.load("stack/a.npy").shape == (40, 40, 3)


def test_drawings_are_replaced() -> None:
    for words in (
        "duplicates photos -m model --sheet s.png --overwrite --threshold 0.5",
        "pca photos -m model -o drawn --overwrite",
        "attention photos -m model -o maps --overwrite",
    ):
        for _ in range(2):
            done = CliRunner().invoke(cli, words.split(), prog_name="dinokit")
            assert done.exit_code == 0, done.output
    with Image.open("drawn/a.png") as drawn:
        assert drawn.getexif()[305] == "dinokit"
