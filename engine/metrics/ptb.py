"""Captions to tokens as pycocoevalcap does it, without Java.

pycocoevalcap gives captions, a line each, to Stanford's PTBTokenizer 3.4.1 with -preserveLines and
-lowerCase, and removes punctuation marks from what comes back. A caption's tokens can depend on the
line below it ("etc." at the end of one line), and on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from re import Match
from re import compile as pattern

from engine.metrics.ptb_rules import RULES
from engine.metrics.ptb_words import JOINED

# what pycocoevalcap removes; its brackets are in capitals, so never found among small letters
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_SPACES = pattern(r"[ \t][ \t\xa0\u2000-\u200a\u3000]*")
_PLAIN = pattern("[a-z]+(?=[ \n])")  # most words of most captions: no other rule can match longer
_SPLIT = frozenset(word.replace(".", "") for word in JOINED.split())
_WIDE = pattern("[\U00010000-\U0010ffff]")
_HALF = pattern("[\ud800-\udfff]")
_BREAKS = pattern("[\n\r\x0b\x0c\x85\u2028\u2029\ud800-\udfff]")


def one_line(caption: str) -> str:
    """The caption without what would break a file of captions: line breaks, halves of characters.

    pycocoevalcap takes out "\\n" alone, and the others push the captions below out of place.
    """
    return _BREAKS.sub(" ", caption)


def tokenize(captions: Iterable[str]) -> list[str]:
    """Each caption's tokens in small letters, joined by spaces, without punctuation marks.

    Captions come in the order in which they are scored. Brackets stay as -lrb- and -rrb-, as
    pycocoevalcap leaves them.
    """
    text = _WIDE.sub(_halves, "\n".join(map(one_line, captions)))
    lines: list[list[str]] = [[]]
    place = 0
    while place < len(text):
        if text[place] == "\n":
            lines.append([])
            place += 1
        elif space := _SPACES.match(text, place):
            place = space.end()
        elif (plain := _PLAIN.match(text, place)) and plain[0] not in _SPLIT:
            lines[-1].append(plain[0])
            place = plain.end()
        else:
            token, place = _next(text, place)
            if token and token not in PUNCTUATION:
                lines[-1].append(token)
    return [_whole(" ".join(line)) for line in lines]


def _halves(wide: Match[str]) -> str:
    """A character outside the basic plane as the two UTF-16 units that the lexer sees."""
    pair = wide[0].encode("utf-16-be")
    return chr(int.from_bytes(pair[:2])) + chr(int.from_bytes(pair[2:]))


def _whole(text: str) -> str:
    if not _HALF.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _next(text: str, place: int) -> tuple[str, int]:
    """The token at ``place``, "" for a character that is dropped, and where it ends."""
    best, chosen, end = None, None, place
    for rule, write in RULES:
        found = rule.match(text, place)
        if found and found.end() > end:
            best, chosen, end = found, write, found.end()
    if best is None or chosen is None:
        return "", place + 1
    group = best.lastgroup or 0
    return chosen(best[group]).lower(), best.end(group)
