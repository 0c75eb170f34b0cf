"""Draws text on pictures: file names in any script, cut to fit their place.

Pillow's own font, which is always available, has hardly more than ASCII. Other texts use the first font of this machine
that has all their letters; if none has, letters lose their accents, and those still unknown become ``?``.
"""

from __future__ import annotations

import bisect
import functools
import unicodedata
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import ImageDraw

__all__ = ["draw_text", "fitting", "font", "font_for", "wrapped"]

# Pillow finds them in the system's font folders: fonts of Linux, Windows and macOS, then those with Chinese, Japanese
# and Korean, which have other scripts as well.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "segoeui.ttf",
    "arial.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "YuGothM.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
)
# Letters that do not decompose into a base and an accent.
_BARE = {"ß": "ss", "ø": "o", "Ø": "O", "æ": "ae", "Æ": "AE", "–": "-", "—": "-", "×": "x"}
_NO_CHARACTER = "\uffff"  # every font draws it like a letter that it lacks


def draw_text(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: str,
    width: int,
    keep: Literal["start", "end"] = "start",
) -> None:
    """Draws one line, cut to fit.

    Args:
        draw: of the picture.
        at: the upper left corner, pixels.
        size: of the letters, pixels.
        width: the greatest width of the line, pixels.
        keep: the part of a long text to keep; of a path, the end is more informative.
    """
    line = _one_line(text)
    chosen = font_for(line, size)
    words = fitting(line, chosen, width, keep)
    if _is_small(chosen):
        draw.text(at, words, colour, chosen)
        return
    # All fonts share the baseline of Pillow's own, since their ascents differ.
    baseline = at[1] + font(size).getmetrics()[0]
    draw.text((at[0], baseline), words, colour, chosen, anchor="ls")


@functools.cache
def font(size: int) -> Any:
    """Pillow's own font; without FreeType, its one small font."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError):
        return ImageFont.load_default()


def font_for(text: str, size: int) -> Any:
    """The font that lacks the fewest letters of this text; the first of several."""
    own = font(size)
    lacking = _lacking(text, own)
    best = own
    if not lacking or _is_small(own):
        return own
    for name in _FONTS:
        other = _named(name, size)
        if other is not None and (lacks := _lacking(text, other)) < lacking:
            best, lacking = other, lacks
            if not lacks:
                break
    return best


def fitting(text: str, chosen: Any, width: int, keep: Literal["start", "end"] = "start") -> str:
    """The text on one line, cut at one end to at most ``width``."""
    text = _in_letters_of(_one_line(text), chosen)
    if chosen.getlength(text) <= width:
        return text
    mark = "..." if _is_small(chosen) or _lacking("…", chosen) else "…"

    def cut(kept: int) -> str:
        return text[:kept] + mark if keep == "start" else mark + text[len(text) - kept :]

    # By bisection: a text of a thousand letters is measured ten times, not a thousand times.
    too_many = bisect.bisect(range(len(text)), width, key=lambda kept: chosen.getlength(cut(kept)))
    return cut(max(0, too_many - 1))


def wrapped(text: str, chosen: Any, width: int, *, most: int) -> list[str]:
    """Breaks the text between words into at most ``most`` lines, each no wider than ``width``.

    The last line has the rest and may be wider, as may a line with a long word; :func:`draw_text` cuts them.
    """
    lines: list[str] = []
    for word in _one_line(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (len(lines) == most or chosen.getlength(_in_letters_of(longer, chosen)) <= width):
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _one_line(text: str) -> str:
    # macOS writes ö in file names as o and a combining mark, which fonts draw separately.
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _in_letters_of(text: str, chosen: Any) -> str:
    if text.isascii():
        return text
    return "".join(_letter(letter, chosen) for letter in text)


def _letter(letter: str, chosen: Any) -> str:
    if letter.isascii() or not _lacking(letter, chosen):
        return letter
    bare = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return bare or _BARE.get(letter, "?")


def _lacking(text: str, chosen: Any) -> int:
    """The number of letters in a text that the font lacks."""
    if _is_small(chosen):
        return sum(letter > "\xff" for letter in text)  # Latin-1
    return sum(not letter.isascii() and not _has(chosen, letter) for letter in text)


@functools.cache
def _named(name: str, size: int) -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.truetype(name, size)
    except (ImportError, OSError):
        return None


@functools.lru_cache(1 << 14)
def _has(chosen: Any, letter: str) -> bool:
    return _drawn(chosen, letter) != _drawn(chosen, _NO_CHARACTER)


def _drawn(chosen: Any, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = chosen.getmask(letter)
    return mask.size, bytes(mask)


def _is_small(chosen: Any) -> bool:
    from PIL.ImageFont import FreeTypeFont

    return not isinstance(chosen, FreeTypeFont)
