import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from gen.errors import GenError
from gen.metrics.protocol import Protocol, Result
from gen.metrics.report import Report, mosaic

P = Protocol("digits", "c5" * 32, 1797, labels="balanced", reference="digits", split="train", seeds="0-1796")
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)


def _page():
    report = Report("A <b>title</b>", "Said in a sentence.")
    report.section("First", "One paragraph.\n\nAnother.").text("More.").figures({"seconds": 203.25, "NFE": 1})
    report.pictures({"data": PIXELS, "float": PIXELS / 127.5 - 1}, "Real digits.", columns=3)
    report.table(["stage", "seconds"], [["tokenizer", 61.23456], ["teacher", None]], "Time.")
    report.curves({"loss": ([0, 1, 2], [3.0, float("nan"), 1.0]), "other": ([0, 2], [1, 2])}, "Loss.", log=True)
    report.points({"one": (1.0, 2.0), "the other": (1.0, 2.1)}, "Places.", x="near", y="far")
    return report.curves({"distance": ([1, 5], [30.0, 2.0])}, y="distance")


def test_everything_is_on_the_page_and_nothing_is_fetched(tmp_path):
    _page().write(tmp_path / "page" / "report.html")
    html = (tmp_path / "page" / "report.html").read_text()
    for text in ("One paragraph.", "Real digits.", "61.23", "203.2", "Time.", "Loss.", "Places.", "the other"):
        assert text in html
    assert "A &lt;b&gt;title&lt;/b&gt;" in html
    assert "<b>title" not in html
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources
    assert all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert "@import" not in html
    assert "url(http" not in html
    assert html == _page().html()  # the same page every time


def test_a_wide_table_is_a_list_on_a_phone():
    """Every cell says its column there, for the head is gone; a narrow table stays one."""
    html = Report("x").table(["run", "FID", "IS", "recall"], [["a", 1.5, 2.0, 0.25]]).table(["a", "b"], [[1, 2]]).html()
    assert html.count('<table class="wide">') == 1
    assert [*re.findall('data-column="(.*?)"', html)] == ["run", "FID", "IS", "recall", "a", "b"]
    assert "table.wide td::before { content: attr(data-column)" in html


def test_drawings_take_the_page_s_colour_and_do_not_clash():
    html = _page().html()
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(drawings) == 3
    assert all("currentColor" in d and "#010203" not in d for d in drawings)
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', d)) for d in drawings]
    assert all(clips)
    assert len(set.union(*clips)) == sum(map(len, clips))


def test_mosaic():
    page = mosaic(PIXELS, columns=3, size=48, gap=2)
    assert page.size == (3 * 50 - 2, 2 * 50 - 2)
    tile = np.asarray(page.convert("L").crop((50, 0, 98, 48)).resize((8, 8), Image.Resampling.BOX), float)
    assert np.corrcoef(tile.ravel(), PIXELS[1].ravel())[0, 1] > 0.9
    assert page.getpixel((147, 97))[3] == 0  # the sixth place is empty
    large = mosaic(np.zeros((1, 64, 96, 3), np.uint8), columns=4)
    assert large.size == (96, 64)
    same = [np.asarray(mosaic(x, 3)) for x in (PIXELS, PIXELS / 127.5 - 1)]
    np.testing.assert_array_equal(*same)
    encoded = re.search(r"base64,([^\"]+)", Report("x").pictures({"a": PIXELS}).html())[1]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (5 * 50 - 2, 48)


def test_scores_stand_with_their_protocol():
    result = Result({"frechet_distance": 1.61234, "recall": 0.8}, P, spread={"frechet_distance": 0.0512})
    other = Result({"frechet_distance": 9.5}, dataclasses.replace(P, count=359, seeds=""))
    html = Report("x").results({"teacher": result, "held-out": other}, "Scores.").html()
    assert "1.61 ± 0.05" in html
    close = Result({"vendi": 1.02891}, P, within={"vendi": 0.0011})
    assert "1.029 ± 0.001" in Report("x").results({"x": close}).html()
    assert "<dt>extractor</dt><dd>digits</dd>" in html
    assert "<dt>seeds</dt><dd>0-1796</dd>" in html
    assert "c5" * 8 + "</dd>" in html
    # the field in which they differ is a column, not a shared line
    assert ">count</th>" in html
    assert "<dt>count</dt>" not in html
    assert ">359</td>" in html


def test_refuses():
    for call, message in (
        (lambda: Report("x").table(["a", "b"], [[1]]), "1 cells under 2 columns"),
        (lambda: Report("x").results({}), "at least one"),
        (lambda: mosaic(PIXELS[:0], 3), "N > 0"),
        (lambda: mosaic(PIXELS[..., 0], 3), "1 or 3"),
    ):
        with pytest.raises(GenError, match=message):
            call()
