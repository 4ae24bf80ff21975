"""An exported folder over images, one line of JSON each.

    python -m engine.export.run output/shapes/export/onnx a.jpg b.jpg --texts "a dog" "a cat"

Exit codes: 0 done, 1 an image could not be read (its line says why), 2 a user error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.errors import UserError, exit_code
from engine.export.onnx_runner import OnnxCaptioner, OnnxClip, open_folder
from engine.types import BadSample

_OF_TASK = {"texts": "clip", "prompt": "caption", "max_new_tokens": "caption",
            "top_k": "recognize"}  # fmt: skip

Answer = Callable[[np.ndarray], list[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, print a line an image; returns the exit code."""
    given = _parser().parse_args(argv)
    return exit_code(lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    model = open_folder(
        given.folder, threads=given.threads, batch_size=given.batch_size, verify=given.verify
    )
    _check(model, given)
    answer = _answer(model, given)
    bad = 0
    for start in range(0, len(given.images), given.batch_size):
        bad += _lines(model, answer, given.images[start : start + given.batch_size])
    return 1 if bad else 0


def _check(model: Any, given: argparse.Namespace) -> None:
    """Raises UserError for an option that has no effect with the folder's task."""
    for option, task in _OF_TASK.items():
        if getattr(given, option) is not None and model.task != task:
            raise UserError(
                f"--{option} is for {task}, and {given.folder} holds --task={model.task}; leave it "
                "out"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.export.run", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", help="written by --mode=export export.format=onnx")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--texts", nargs="+", metavar="TEXT", help="clip: what may be in an image")
    parser.add_argument("--prompt", help="caption: instead of the run's own")
    parser.add_argument("--max_new_tokens", type=_count, metavar="N", help="caption")
    parser.add_argument("--top_k", type=_count, metavar="K", help="recognize: labels of an image")
    parser.add_argument("--batch_size", type=_count, default=32, metavar="N", help="default 32")
    parser.add_argument("--threads", type=_count, metavar="N", help="default: one a core")
    parser.add_argument("--verify", action="store_true", help="check every file's SHA-256 first")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _answer(model: Any, given: argparse.Namespace) -> Answer:
    """What is printed of images, by the folder's task."""
    if isinstance(model, OnnxCaptioner):
        options = {"prompt": given.prompt, "max_new_tokens": given.max_new_tokens}
        return lambda batch: [{"caption": text} for text in model.captions(batch, **options)]
    if not isinstance(model, OnnxClip):
        return lambda batch: [
            {"labels": [{"label": label.text, "prob": label.prob} for label in labels]}
            for labels in model.labels(batch, given.top_k)
        ]
    if not given.texts:
        return lambda batch: [{"embedding": row.tolist()} for row in model.encode(batch).numpy()]
    text_MD = model.embed_texts(given.texts)

    def fitting(batch: np.ndarray) -> list[dict[str, Any]]:
        prob_NM = model.probabilities(model.encode(batch).numpy(), text_MD)
        return [{"probs": dict(zip(given.texts, row, strict=True))} for row in prob_NM.tolist()]

    return fitting


def _lines(model: Any, answer: Answer, images: Sequence[str]) -> int:
    """Print a batch's lines in order; returns how many images could not be read."""
    pixels: dict[int, np.ndarray] = {}
    faults: dict[int, str] = {}
    for place, image in enumerate(images):
        try:
            pixels[place] = model.preprocess.pixels(image)
        except BadSample as error:
            faults[place] = str(error)
    found = answer(model.preprocess.normalised(list(pixels.values()))) if pixels else []
    lines = dict(zip(pixels, found, strict=True)) | {p: {"error": f} for p, f in faults.items()}
    for place, image in enumerate(images):
        print(json.dumps({"image": image, **lines[place]}, ensure_ascii=False), flush=True)
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())
