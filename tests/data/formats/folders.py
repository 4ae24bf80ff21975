"""What the tests of formats share: a folder of images, a source of it, what becomes of its rows."""

import io
import json
from pathlib import Path

from PIL import Image

from engine import registry
from engine.data.image_files import read_image
from engine.types import BadSample, Row


def picture(number: int = 0) -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def folder(root: Path, *names: str) -> Path:
    """Images of these names below ``root``."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def put(path: Path, value) -> Path:
    """A JSON file; a list of lines where the name ends in ``.jsonl``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    text = "\n".join(map(json.dumps, value)) if lines else json.dumps(value)
    path.write_text(text, encoding="utf8")
    return path


def opened(form: str, root: Path, split: str = "train", **options):
    """A split of ``root`` in the format ``form``, its tables kept in ``root`` too."""
    module = registry.find("data/formats", form)
    config = module.Config(root=root, **options)
    return module.build(config, name="mine", split=split, cache_dir=root / "cache")


def rows(source) -> list[Row | str]:
    """Every row, or the cause why it cannot be used."""
    found: list[Row | str] = []
    for index in range(len(source)):
        try:
            row = source[index]
            for one in row.images:
                if not isinstance(one, Path):
                    read_image(one)
            found.append(row)
        except BadSample as bad:
            found.append(bad.cause)
    return found


def images(row: Row) -> list[Path | bytes]:
    """A row's images: the files that they are, or their bytes."""
    return [one if isinstance(one, Path) else read_image(one) for one in row.images]


def image(row: Row) -> Path | bytes | None:
    """A row's first image, as ``images``."""
    return next(iter(images(row)), None)
