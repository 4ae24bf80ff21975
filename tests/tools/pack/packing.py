"""Small datasets to pack, and the packer run as a user runs it."""

import csv
import io
from contextlib import redirect_stderr, redirect_stdout

from PIL import Image

from engine.config.schema import Data
from engine.data.image_files import read_image
from engine.data.sources import open_source
from engine.errors import exit_code
from engine.tools.pack import __main__ as pack
from engine.types import BadSample
from tests.data.tar.tar_files import picture

HEADER = ("image", "image_id", "caption", "caption_id")


def csv_folder(root, number=7, captions=1, split="train"):
    """A CSV folder of JPEGs, a PNG among them, with so many captions each."""
    (root / split / "sub").mkdir(parents=True)
    rows = []
    for i in range(number):
        name = f"sub/{i}.png" if i == 2 else f"{i}.jpg"
        if i == 2:
            Image.new("RGB", (9, 5), "red").save(root / split / name)
        else:
            (root / split / name).write_bytes(picture(i))
        rows += [
            (name, f"id{i}", f'caption {c} of "{i}", said\nin two lines', 10 * i + c)
            for c in range(captions)
        ]
    write_rows(root / f"{split}_anno.csv", rows)
    return root


def write_rows(path, rows, header=HEADER):
    with path.open("w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([header, *rows])


def run(*argv, code=0):
    """What the packer prints, checked for its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        found = exit_code(lambda: pack.main([str(word) for word in argv] + ["--jobs=1"]))
    assert found == code, out.getvalue() + err.getvalue()
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return out.getvalue() + err.getvalue()


def digests(printed):
    """The digest of each split packed, as printed."""
    lines = printed.splitlines()
    read = [line.split()[4] for line in lines if line.startswith("digest as read back")]
    assert read == [line.split()[4] for line in lines if line.startswith("digest of the source")]
    return read


def records(root, form, split="train", **options):
    """All rows of a dataset without their keys, images as bytes; causes of bad ones."""
    data = Data(data_path=str(root.parent), datasets={"it": {"format": form, "root": root.name}})
    data.datasets["it"].update(options)
    source = open_source("it", split, data, key="test")
    found = []
    for row in range(len(source)):
        try:
            r = source[row]
        except BadSample as bad:
            found.append(bad.cause)
            continue
        found.append(
            (
                read_image(r.images[0]) if r.images else None,
                r.caption,
                r.image_id,
                r.caption_id,
                r.turns,
                r.answers,
                r.labels,
                r.question_type,
                r.answer_type,
            )
        )
    return found
