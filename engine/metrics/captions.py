"""Caption metrics: BLEU, METEOR, ROUGE-L, CIDEr, SPICE by pycocoevalcap, and diversity.

Captions are tokenized as pycocoevalcap does it, by Stanford's PTBTokenizer where Java is there and
else by ``engine.metrics.ptb``, which gives the same tokens. METEOR and SPICE are Java programs:
without Java they are left out, and named. All scores but those of diversity lie in 0 … 1 (CIDEr in
0 … 10), as pycocoevalcap gives them. ``python -m engine.metrics.captions FILE`` scores a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.errors import UserError, exit_code
from engine.metrics import captions_java as java
from engine.metrics import ptb
from engine.metrics.captions_files import read
from engine.metrics.clipscore import clip_score, clip_scores, cosines, ref_clip_score

__all__ = [
    "Scores", "caption_scores", "clip_score", "clip_scores", "cosines", "diversity", "main",
    "ref_clip_score",
]  # fmt: skip

Tokenizer = Literal["auto", "java", "python"]
_DISTINCT = (1, 2, 3, 4)
_BY_JAVA = {"METEOR": java.meteor, "SPICE": java.spice}


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures by pycocoevalcap's names; ids of items as they were given."""

    corpus: dict[str, float]
    per_item: dict[Any, dict[str, float]]
    tokenizer: str  # "java" or "python"
    left_out: dict[str, str] = field(default_factory=dict)  # metric → why it is not there


def caption_scores(
    candidates: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    *,
    tokenizer: Tokenizer = "auto",
    without: Collection[str] = (),
) -> Scores:
    """Score each candidate against the references of its id; a candidate may be empty.

    ``CIDEr`` is what COCO's server and pycocoevalcap call so, which is CIDEr-D (clipped counts, a
    Gaussian length penalty with σ = 6): it is given by both names. Its document frequencies are
    those of the references here. ``without`` keeps "METEOR" or "SPICE" from starting Java.
    Raises ValueError where ids differ or one has no reference, UserError where pycocoevalcap, or
    Java for ``tokenizer="java"``, is not there.
    """
    _check(candidates, references)
    if odd := set(without) - set(_BY_JAVA):
        raise ValueError(f"without names {', '.join(_BY_JAVA)}, not {', '.join(sorted(odd))}")
    need_pycocoevalcap()
    keys = [str(index) for index in range(len(candidates))]  # in the candidates' order
    flat = [text for key in candidates for text in references[key]]
    tokens, reference_tokens, used, notes = _tokenized(list(candidates.values()), flat, tokenizer)
    given = dict(zip(keys, ([text] for text in tokens), strict=True))
    wanted, start = {}, 0
    for key, texts in zip(keys, (references[key] for key in candidates), strict=True):
        wanted[key] = reference_tokens[start : start + len(texts)]
        start += len(texts)
    corpus, items = _in_python(wanted, given)
    left_out = dict(notes)
    for name, score in _BY_JAVA.items():
        try:
            if why := "not wanted" if name in without else java.missing_java():
                raise java.JavaError(why)
            corpus[name], items[name] = score(wanted, given)
        except java.JavaError as error:
            left_out[name] = str(error)
    per_item = {
        key: {name: float(each[row]) for name, each in items.items()}
        for row, key in enumerate(candidates)
    }
    corpus = {name: float(value) for name, value in corpus.items()} | diversity(tokens)
    return Scores(corpus, per_item, used, left_out)


def diversity(tokens: Sequence[str]) -> dict[str, float]:
    """How varied captions are, from their tokens joined by spaces.

    ``distinct_n`` is the share of n-grams that differ among all n-grams of the captions (Li et al.
    2016), 0 where there are none; ``vocabulary`` counts words that differ, ``mean_length`` is in
    tokens, both without punctuation.
    """
    words = [text.split() for text in tokens]
    values: dict[str, float] = {}
    for n in _DISTINCT:
        grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        values[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else 0.0
    values["vocabulary"] = float(len({word for w in words for word in w}))
    values["mean_length"] = sum(map(len, words)) / len(words) if words else 0.0
    return values


def _check(candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> None:
    if not candidates:
        raise ValueError("there are no captions to score")
    if set(candidates) != set(references):
        odd = next(iter(set(candidates) ^ set(references)))
        missing = "reference" if odd in candidates else "candidate"
        raise ValueError(f"{odd!r} has no {missing}")
    bare = next((key for key in candidates if not references[key]), None)
    if bare is not None:
        raise ValueError(f"{bare!r} has no reference")


def need_pycocoevalcap() -> None:
    """Raises UserError where the scorers are not installed."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError as error:
        raise UserError(
            "caption metrics need pycocoevalcap, which is not installed; "
            "`pip install pycocoevalcap` brings it (104 MB)"
        ) from error


def _tokenized(
    candidates: list[str], references: list[str], tokenizer: Tokenizer
) -> tuple[list[str], list[str], str, dict[str, str]]:
    """Tokens of both, which tokenizer made them, and why it was not Java's where that failed."""
    notes: dict[str, str] = {}
    if tokenizer != "python":
        why = java.missing_java()
        try:
            if not why:
                parts = [[ptb.one_line(c) for c in part] for part in (candidates, references)]
                return java.tokenize(parts[0]), java.tokenize(parts[1]), "java", notes
        except java.JavaError as error:
            why = notes["java tokenizer"] = str(error)
        if tokenizer == "java":
            raise UserError(f"the Java tokenizer cannot run: {why}; tokenizer=python needs no Java")
    return ptb.tokenize(candidates), ptb.tokenize(references), "python", notes


def _in_python(
    references: java.Tokens, candidates: java.Tokens
) -> tuple[dict[str, float], dict[str, Sequence[float]]]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    names = [f"Bleu_{n}" for n in (1, 2, 3, 4)]
    corpus, items = Bleu(4).compute_score(references, candidates, verbose=0)
    found = dict(zip(names, corpus, strict=True)), dict(zip(names, items, strict=True))
    found[0]["ROUGE_L"], found[1]["ROUGE_L"] = Rouge().compute_score(references, candidates)
    if any(text for texts in references.values() for text in texts):
        cider, each = Cider().compute_score(references, candidates)
    else:  # without a word in any reference the scorer fails
        cider, each = 0.0, [0.0] * len(candidates)
    for name in ("CIDEr", "CIDEr-D"):
        found[0][name], found[1][name] = cider, each
    return found


def main(argv: Sequence[str]) -> int:
    """Score a file and print JSON; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m engine.metrics.captions", description=__doc__)
    parser.add_argument("file", type=Path, help='[{"id", "references": [...], "candidate"}, ...]')
    parser.add_argument(
        "--references",
        type=Path,
        metavar="ANNOTATIONS",
        help='COCO captions, where FILE is COCO results: [{"image_id", "caption"}, ...]',
    )
    parser.add_argument("--tokenizer", choices=("auto", "java", "python"), default="auto")
    parser.add_argument("--without", action="append", choices=tuple(_BY_JAVA), default=[])
    arguments = parser.parse_args(argv)
    captions = read(arguments.file, arguments.references)
    scores = caption_scores(
        captions.candidates,
        captions.references,
        tokenizer=arguments.tokenizer,
        without=arguments.without,
    )
    told = {
        "per_item": scores.per_item,
        "items": len(captions.candidates),
        "references": sum(map(len, captions.references.values())),
        "images_without_candidate": captions.num_unscored,
        "tokenizer": scores.tokenizer,
        "left_out": scores.left_out,
        "overall": scores.corpus,
    }
    print(json.dumps(told, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
