"""Fonts of the pictures: those that matplotlib and Pillow bring along have no Chinese characters.

Where a text has such characters, an installed font that has them is taken. Without one they are
drawn as empty squares.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

FIRST_CJK_CHARACTER = "\u2e80"  # Chinese, Japanese and Korean ones begin here
# How the files of fonts with these characters begin, in lower case, from the best on.
CJK_FONT_FILES = (
    "notosanscjk-regular",
    "notosanscjksc-regular",
    "notosanssc-regular",
    "sourcehansans",
    "msyh",
    "pingfang",
    "hiragino sans gb",
    "simhei",
    "simsun",
    "wqy-microhei",
    "wqy-zenhei",
    "droidsansfallback",
    "notoserifcjk-regular",
    "uming",
)
DEFAULT_FAMILY = "DejaVu Sans"  # matplotlib brings it along


@lru_cache
def text_font(size: float, text: str = "") -> ImageFont.FreeTypeFont:
    """Return the font of this size, in pixels, in which Pillow draws a text."""
    if has_cjk(text):
        path = cjk_font_file()
        if path is not None:
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def font_families(texts: Sequence[str]) -> list[str]:
    """Return the families of fonts in which matplotlib draws texts: each adds what others lack."""
    families = [DEFAULT_FAMILY]
    if any(has_cjk(text) for text in texts):
        path = cjk_font_file()
        if path is not None:
            families.append(_add_to_matplotlib(path))
    return families


def has_cjk(text: str) -> bool:
    """Return whether a text has Chinese, Japanese or Korean characters."""
    return any(character >= FIRST_CJK_CHARACTER for character in text)


@lru_cache
def cjk_font_file() -> str | None:
    """Return the file of an installed font with Chinese characters, None where there is none.

    matplotlib finds it; a program that only detects may not have it.
    """
    try:
        from matplotlib.font_manager import findSystemFonts
    except ImportError:
        return None
    files = sorted(findSystemFonts())
    for beginning in CJK_FONT_FILES:
        for file in files:
            if Path(file).name.lower().startswith(beginning):
                return file
    return None


@lru_cache
def _add_to_matplotlib(path: str) -> str:
    """Make a font known to matplotlib, whose list may be older than the font; return its family."""
    from matplotlib.font_manager import FontProperties, fontManager

    fontManager.addfont(path)
    return FontProperties(fname=path).get_name()
