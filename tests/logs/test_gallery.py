"""Examples as HTML, as a sheet of pictures and as a table."""

import html.parser
import re

import numpy as np
import pytest
from PIL import Image

from engine.logs import gallery
from engine.logs.gallery import SIDE, Example, markdown, sheet
from engine.logs.report import render


def example(captions=(), found=(("said", None),), name="id", size=(224, 168), colour="teal"):
    return Example(Image.new("RGB", size, colour), list(captions), list(found), name)


def article(shown):
    """An example's HTML."""
    text = render("report.html", title="", galleries=[("", [gallery.article(shown)])])
    return text[text.index("<article>") : text.index("</article>") + len("</article>")]


def test_right_captions_are_marked_whatever_their_writing():
    text = article(example(["A dog runs ."], [("a dog runs", 0.4), ("a cat", 0.2)]))
    small = article(example([], [("a", 0.00086), ("b", -0.003), ("c", 0.0), ("d", 12.09)]))
    assert re.findall("<small>(.*?)</small>", small)[:4] == ["0.0009", "-0.003", "0.00", "12.09"]
    assert re.search(r'<li[^>]* class="right">a dog runs <small>0\.40</small>', text)
    assert re.search(r'<li[^>]* class="wrong">a cat', text)
    assert 'class="right"' not in article(example([], [("a dog", None)]))


def test_what_was_said_is_text_and_no_more():
    said = "</li><script>x</script> & 'שלום' \"日本\""
    parser, told, tags = html.parser.HTMLParser(), [], set()
    parser.handle_data = told.append
    parser.handle_starttag = lambda tag, _: tags.add(tag)
    parser.feed(article(example([said], [(said, None), ("", None)], name=said)))
    assert told.count(said) == 3 and "nothing" in told
    assert tags == {"article", "img", "ol", "li", "p", "small"}


def test_the_sheet_has_every_picture_at_its_number():
    colours = ["red", "lime", "blue", "yellow", "magenta"]
    shapes = [(SIDE, 60), (60, SIDE), (SIDE, SIDE), (9, 5), (SIDE, SIDE)]
    drawn = sheet([example(size=s, colour=c) for s, c in zip(shapes, colours, strict=True)])
    pixels = np.asarray(drawn)
    cell = SIDE + 6
    assert pixels.shape == (2 * cell + 6, 4 * cell + 6, 3)
    for number, colour in enumerate(colours):
        middle = [6 + cell * place + SIDE // 2 for place in (number // 4, number % 4)]
        assert tuple(pixels[*middle]) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        corner = [6 + cell * place for place in (number // 4, number % 4)]
        assert tuple(pixels[*corner]) == (0, 0, 0)
    assert sheet([example()]).size == (cell + 6, cell + 6)


def test_the_table_says_what_was_said():
    safe = pytest.importorskip("tensorboard.plugin_util").markdown_to_safe_html
    said = "1. a | b *c* _d_ `e` <b>f</b> [g](h) \\ # i\n## j ~k~ &amp; 日本"
    table = safe(markdown([example([said, "own"], [(said, 0.5)], name="a/b_c.jpg")]))
    plain = " ".join(said.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    cells = re.findall(r"<td>(.*?)</td>", table)
    assert cells == ["1", f"{plain} (0.50)", f"{plain}<br>own", "a/b_c.jpg"]
