"""report.html: one file, no network, nothing of a caption is taken for HTML."""

import html.parser
import math
import re

import pytest
from PIL import Image

from engine.logs import gallery, jsonl, report


def example(captions, found, name=""):
    return gallery.Example(Image.new("RGB", (224, 168), "teal"), captions, found, name)


def write(folder, galleries=None, curves=(), headlines=()):
    return report.write_report(
        folder, galleries=galleries or {}, curves=curves, headlines=headlines
    )


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "<i>exp<b>"
    log = jsonl.JsonLines(folder / "metrics.jsonl")
    for step in range(1, 501):
        log.row({"step": step, "epoch": step / 100, "loss": 5 / step if step != 3 else math.nan,
                 "lr": 1e-3, "samples_per_second": 100.0, "data_wait": 0.1, "batch_R@1": 3.0,
                 "samples_seen": step * 4, "grad_norm": 0.3, "seconds": step / 2})  # fmt: skip
        if step % 100 == 0:
            log.row({"step": step, "coco/RSUM": float(step), "coco/image_to_text_R@1": 12.345})
    log.row({"step": 500, "cifar/accuracy@1": 81.5, "cifar/tokenizer": "ours <i>"})
    log.close()
    (folder / "config.yaml").write_text("runner:\n  name: plain # <b>\n")
    return folder


class Tags(html.parser.HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = frozenset(("meta", "img"))
    NAMESPACE = re.compile(r' xmlns(:xlink)?="http://www.w3.org/[^"]*"')

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
    galleries, curves = {"<i>coco</i>": [shown]}, ["RSUM", "accuracy@1"]
    path = write(run, galleries, curves)
    assert path == run / "report.html"
    tags, text = parsed(path), path.read_text()
    assert not {"script", "link", "iframe", "i", "b"} & set(tags.seen) - {"b"}
    assert all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert not re.search(r"https?://|url\(|@import", tags.NAMESPACE.sub("", text))
    assert tags.seen.count("title") == 1 + 5  # of the page, and of each evaluation's dot
    assert '<span class="c0">cifar <b>81.5</b></span>' in text, "a single value is no curve"
    assert "<h1>&lt;i&gt;exp&lt;b&gt;</h1>" in text
    assert "&lt;script&gt;" in text and "<h2>Examples: &lt;i&gt;coco&lt;/i&gt;</h2>" in text
    assert "<td>ours &lt;i&gt;</td>" in text
    assert "name: plain # &lt;b&gt;" in text
    assert len(text) < 200_000


def test_what_it_shows(run):
    figures = ["RSUM", "accuracy@1"]
    text = write(run, curves=figures, headlines=figures[:1]).read_text()
    assert "coco RSUM" in text and "accuracy@1</span>" not in text
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
    assert "<svg" not in write(tmp_path).read_text()
    parsed(tmp_path / "report.html")


def test_a_failed_write_leaves_the_old_report(run, monkeypatch):
    before = write(run).read_text()
    files = sorted(run.iterdir())
    monkeypatch.setattr(report, "render", lambda *_, **__: 3)  # no text: the file is open by then
    with pytest.raises(TypeError):
        write(run)
    assert (run / "report.html").read_text() == before
    assert sorted(run.iterdir()) == files
