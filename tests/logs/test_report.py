"""report.html: one file, no network, nothing of a caption is taken for HTML."""

import html.parser
import math
import re

import pytest
from PIL import Image

from engine.logs import charts, gallery, jsonl, report


def example(captions, found, name=""):
    return gallery.Example(Image.new("RGB", (224, 168), "teal"), captions, found, name)


@pytest.fixture
def run(tmp_path):
    log = jsonl.JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 501):
        log.row({"step": step, "epoch": step / 100, "loss": 5 / step if step != 3 else math.nan,
                 "lr": 1e-3, "samples_per_second": 100.0, "data_wait": 0.1, "batch_R@1": 3.0,
                 "samples_seen": step * 4, "grad_norm": 0.3, "seconds": step / 2})  # fmt: skip
        if step % 100 == 0:
            log.row({"step": step, "coco/RSUM": float(step), "coco/image_to_text_R@1": 12.345})
    log.row({"step": 500, "cifar/accuracy@1": 81.5, "cifar/tokenizer": "ours <i>"})
    log.close()
    (tmp_path / "config.yaml").write_text("runner:\n  name: plain # <b>\n")
    return tmp_path


class Tags(html.parser.HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = frozenset(("meta", "img"))

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(path):
    tags = Tags()
    tags.feed(path.read_text())
    assert tags.open == []
    return tags


def test_one_whole_file_without_network_or_script(run):
    shown = example(["a <script>alert(1)</script> cat"], [("A cat, a SCRIPT", 0.3)], '"><i>')
    path = report.write_report(run, name="<i>exp</i>", galleries={"<i>coco</i>": [shown]})
    assert path == run / "report.html"
    tags, text = parsed(path), path.read_text()
    assert not {"script", "link", "iframe", "i", "b"} & set(tags.seen) - {"b"}
    assert all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "&lt;script&gt;" in text and "<h2>Examples: &lt;i&gt;coco&lt;/i&gt;</h2>" in text
    assert "<td>ours &lt;i&gt;</td>" in text
    assert "name: plain # &lt;b&gt;" in text
    assert len(text) < 200_000


def test_what_it_shows(run):
    text = report.write_report(run).read_text()
    for title in ("Loss", "RSUM", "accuracy@1", "Learning rate", "grad_norm", "Samples a second"):
        assert f"<figcaption>{title}<" in text
    assert "<figcaption>samples_seen" not in text
    assert "<th>image_to_text_R@1</th><td>12.35</td><td>–</td>" in text
    for tile in ("500</b><span>steps", "4m 10s</b><span>time", "500.00</b><span>coco RSUM"):
        assert tile in text


def test_time_adds_up_over_starts():
    rows = [{"seconds": seconds} for seconds in (10.0, 20.0, 5.0, 8.0)]
    assert report._seconds(rows) == 28.0


def test_an_empty_run_still_gives_a_page(tmp_path):
    assert "<svg" not in report.write_report(tmp_path).read_text()
    parsed(tmp_path / "report.html")


def test_a_failed_write_leaves_the_old_report(run, monkeypatch):
    before = report.write_report(run).read_text()
    files = sorted(run.iterdir())
    monkeypatch.setattr(report, "page", lambda *_: 3)  # no text: the file is open by then
    with pytest.raises(TypeError):
        report.write_report(run)
    assert (run / "report.html").read_text() == before
    assert sorted(run.iterdir()) == files


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (1, 500, [0, 200, 400, 600]),
        (-3.0, 2.0, [-4.0, -2.0, 0.0, 2.0]),
        (5.0, 5.0, [2.0, 4.0, 6.0, 8.0]),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("low", [0.0, 1e-12, -7e9, 3.3])
def test_ticks_at_any_scale(low):
    for width in (0.0, 1e-6, 1.0, 1e12):
        found = charts.ticks(low, low + width)
        assert 2 <= len(found) <= 8
        assert found[0] <= low + 1e-9 * abs(low)
        assert found[-1] >= low + width - 1e-9 * abs(low + width) - 1e-9


def test_buckets_keep_every_point():
    points = [(float(i), float(i % 7)) for i in range(1001)]
    groups = charts.buckets(points, 100)
    assert len(groups) <= 100
    assert sum(len(ys) for _, ys in groups) == 1001
    assert charts.buckets(points[:3], 100) == [(0.0, [0.0]), (1.0, [1.0]), (2.0, [2.0])]


def test_a_chart_stays_in_its_frame():
    svg = charts.line_chart("t", {"a": [(1, 5.0), (2, -3.0)], "none": [], "b": [(1.5, 2.0)]})
    numbers = [tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+),(-?[\d.]+)", svg)]
    assert all(0 <= x <= 460 and 0 <= y <= 220 for x, y in numbers)
    assert "none" not in svg
    assert charts.line_chart("t", {"a": []}) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234567, "1.235M"), (25000, "25k"), (12.5, "12.5"),
                        (3e-5, "3.0e-5"), (-0.25, "-0.25")],
)  # fmt: skip
def test_labels_are_short(value, text):
    assert charts.label(value) == text
