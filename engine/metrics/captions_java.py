"""The caption metrics' Java programs, all from pycocoevalcap's package: tokenizer, METEOR, SPICE.

Nothing here needs Java to be there: ``missing_java`` tells, and what fails raises ``JavaError``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Tokens = Mapping[str, list[str]]  # id → its token strings

_STANFORD = "stanford-corenlp-3.4.1.jar"
_SPICE_NEEDS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_TIMEOUT_SECONDS = 1800
_ENVIRONMENT = {"LC_ALL": "C.UTF-8"}  # decimal points, and UTF-8 in and out


class JavaError(Exception):
    """A Java program is not there or failed; the message says which and why."""


def missing_java() -> str:
    """Why Java programs cannot run, "" where they can."""
    return "" if shutil.which("java") else "Java is not on the PATH"


def tokenize(captions: Sequence[str]) -> list[str]:
    """The reference tokenizer's lines, one a caption. Captions hold no line breaks."""
    import pycocoevalcap.tokenizer.ptbtokenizer as reference

    jar = Path(reference.__file__).with_name(_STANFORD)
    program = "edu.stanford.nlp.process.PTBTokenizer"
    text = _run(
        ["-cp", str(jar), program, "-preserveLines", "-lowerCase"], "\n".join(captions), jar.parent
    )
    lines = text.split("\n")
    lines += [""] * (len(captions) - len(lines))  # empty lines at the end are not written
    if any(lines[len(captions) :]):
        raise JavaError(f"PTBTokenizer gave {len(lines)} lines for {len(captions)} captions")
    removed = set(reference.PUNCTUATIONS)
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in removed)
        for line in lines[: len(captions)]
    ]


def meteor(references: Tokens, candidates: Tokens) -> tuple[float, list[float]]:
    """METEOR 1.5 of the corpus and of each item."""
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        scorer = Meteor()
    except OSError as error:
        raise JavaError(f"METEOR did not start: {error}") from error
    try:
        corpus, items = scorer.compute_score(references, candidates)
    except (OSError, ValueError) as error:
        raise JavaError(f"METEOR failed: {error}") from error
    finally:
        scorer.meteor_p.kill()
        for pipe in (scorer.meteor_p.stdin, scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            with suppress(OSError):  # what was left unread goes with it
                pipe.close()
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
    with tempfile.TemporaryDirectory(prefix="spice-") as scratch:
        given, found = Path(scratch, "given.json"), Path(scratch, "found.json")
        given.write_text(json.dumps(items), encoding="utf8")
        program = ["-Xmx8G", "-jar", str(folder / reference.SPICE_JAR), str(given)]
        _run([*program, "-cache", scratch, "-out", str(found), "-subset", "-silent"], "", folder)
        told = _loaded(found)
    scores = {entry["image_id"]: _number(entry["scores"]["All"]["f"]) for entry in told}
    if set(scores) != set(range(len(items))):
        raise JavaError(f"SPICE scored {len(scores)} of {len(items)} items")
    ordered = [scores[index] for index in range(len(items))]
    return sum(ordered) / len(ordered), ordered


def _run(arguments: list[str], given: str, folder: Path) -> str:
    try:
        done = subprocess.run(
            ["java", "-Dfile.encoding=UTF-8", *arguments],
            input=given.encode(),
            capture_output=True,
            cwd=folder,
            env=os.environ | _ENVIRONMENT,
            timeout=_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JavaError(f"java did not run: {error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise JavaError(f"java ended with code {done.returncode}: {said[0] if said else 'no word'}")
    return done.stdout.decode(errors="replace")


def _loaded(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise JavaError(f"SPICE wrote no result: {error}") from error


def _number(value: Any) -> float:
    """The score; 0 where there is nothing that could match (NaN, or none)."""
    number = float(value) if value is not None else 0.0
    return number if number == number else 0.0
