"""An exported folder over images, one line of JSON each.

    python -m engine.export.run output/shapes/export/onnx a.jpg b.jpg --texts "a dog" "a cat"

Exit codes: 0 done, 1 an image could not be read (its line says why), 2 a user error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.errors import UserError, exit_code
from engine.export.onnx_runner import (
    OnnxCaptioner,
    OnnxClip,
    OnnxFolder,
    OnnxRecognizer,
    open_folder,
)
from engine.flags import count
from engine.types import BadSample

_OF_TASK = {
    "texts": "clip", "prompt": "caption", "max_new_tokens": "caption", "top_k": "recognize",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, print a line an image; returns the exit code."""
    given = _parser().parse_args(argv)
    return exit_code(lambda: _run(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.export.run", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", help="written by --mode=export export.format=onnx")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--texts", nargs="+", metavar="TEXT", help="clip: what may be in an image")
    parser.add_argument("--prompt", help="caption: instead of the run's own")
    parser.add_argument("--max_new_tokens", type=count, metavar="N", help="caption")
    parser.add_argument("--top_k", type=count, metavar="K", help="recognize: labels of an image")
    parser.add_argument("--batch_size", type=count, default=32, metavar="N", help="default 32")
    parser.add_argument("--threads", type=count, metavar="N", help="default: one a core")
    parser.add_argument("--verify", action="store_true", help="check every file's SHA-256 first")
    return parser


def _run(given: argparse.Namespace) -> int:
    model = open_folder(
        given.folder, threads=given.threads, batch_size=given.batch_size, verify=given.verify
    )
    for option, task in _OF_TASK.items():
        if getattr(given, option) is not None and model.task != task:
            raise UserError(
                f"--{option} is for {task}, and {given.folder} holds --task={model.task}; leave it "
                "out"
            )
    text_MD = (
        model.embed_texts(given.texts) if isinstance(model, OnnxClip) and given.texts else None
    )
    bad = 0
    for images in model.batches(given.images):
        pixels: dict[int, np.ndarray] = {}
        lines: dict[int, dict[str, Any]] = {}
        for place, image in enumerate(images):
            try:
                pixels[place] = model.preprocess.pixels(image)
            except BadSample as error:
                lines[place] = {"error": str(error)}
        bad += len(lines)
        if pixels:
            batch = model.preprocess.normalised(list(pixels.values()))
            lines |= zip(pixels, _answers(model, batch, given, text_MD), strict=True)
        for place, image in enumerate(images):
            print(json.dumps({"image": image, **lines[place]}, ensure_ascii=False), flush=True)
    return 1 if bad else 0


def _answers(
    model: OnnxFolder, image_BCHW: np.ndarray, given: argparse.Namespace, text_MD: np.ndarray | None
) -> list[dict[str, Any]]:
    """What is printed of images, by the folder's task."""
    if isinstance(model, OnnxCaptioner):
        options = {"prompt": given.prompt, "max_new_tokens": given.max_new_tokens}
        return [{"caption": text} for text in model.captions(image_BCHW, **options)]
    if isinstance(model, OnnxRecognizer):
        return [
            {"labels": [{"label": label.text, "prob": label.prob} for label in labels]}
            for labels in model.labels(image_BCHW, given.top_k)
        ]
    assert isinstance(model, OnnxClip)
    image_BD = model.encode(image_BCHW).numpy()
    if text_MD is None:
        return [{"embedding": row.tolist()} for row in image_BD]
    prob_BM = model.probabilities(image_BD, text_MD).tolist()
    return [{"probs": dict(zip(given.texts, row, strict=True))} for row in prob_BM]


if __name__ == "__main__":
    sys.exit(main())
