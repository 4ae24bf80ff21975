"""Answers in the form that the VQA evaluation compares them in.

The rules are those of the official VQA v2 evaluation (GT-Vision-Lab/VQA, ``vqaEval.py``), with its
quirks, because published figures hang on them: a comma between digits takes all punctuation out of
the answer without a space in its place, a full stop goes unless a digit follows it, at most 32 of
them go, a word is a contraction only as it is spelled here, and none is zero.
"""

from __future__ import annotations

import functools
import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip

# A word that lacks one of the apostrophes gets it back. Words like she'd, we'll and let's are not
# here: shed, well and lets are words of their own.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_SPELLED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the other way round, as the official table has it


def one_line(answer: str) -> str:
    """The answer with line ends and tabs as spaces, and none around it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=1 << 16)  # most answers are given thousands of times
def normalise(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers as digits, contractions spelled."""
    words = [_NUMBERS.get(word, word) for word in _punctuated(answer).lower().split()]
    return " ".join(_SPELLED.get(word, word) for word in words if word not in _ARTICLES)


def _punctuated(answer: str) -> str:
    """Without punctuation: in its place nothing beside a space, a space within a word."""
    text, in_number = answer, _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if in_number or beside_space else " ")
    return _FULL_STOP.sub("", text, count=_MAX_FULL_STOPS)
