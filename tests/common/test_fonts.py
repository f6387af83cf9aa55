"""Names with Chinese characters are drawn in a font that has them, where one is installed."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common.coco.fonts import cjk_font_file, font_families, text_font

NEEDS_FONT = pytest.mark.skipif(cjk_font_file() is None, reason="no font with Chinese characters")


def drawn(character, font):
    picture = Image.new("L", (40, 40))
    ImageDraw.Draw(picture).text((5, 5), character, fill=255, font=font)
    return np.asarray(picture)


@NEEDS_FONT
def test_chinese_characters_are_no_empty_squares():
    red = drawn("红", text_font(20, "红绿灯"))
    green = drawn("绿", text_font(20, "红绿灯"))
    assert (red != green).any()


def test_latin_names_keep_their_font():
    assert text_font(20, "traffic light").getname() == text_font(20).getname()
    assert font_families(["traffic light", "$x$", "café"]) == ["DejaVu Sans"]


def test_pictures_need_no_matplotlib(monkeypatch):
    for function in (text_font, cjk_font_file):
        function.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib.font_manager", None)
    assert text_font(20, "红绿灯").getname() == text_font(20).getname()
    monkeypatch.undo()
    for function in (text_font, cjk_font_file):
        function.cache_clear()


@NEEDS_FONT
def test_matplotlib_draws_chinese_characters_without_a_warning(recwarn, tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    families = font_families(["disc", "红绿灯"])
    figure.text(0.5, 0.5, "disc 红绿灯", fontfamily=families)
    figure.savefig(tmp_path / "text.png")
    assert families[0] == "DejaVu Sans"
    assert not recwarn.list
