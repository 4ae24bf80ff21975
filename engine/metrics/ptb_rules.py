"""The rules of the PTB lexer: patterns, of which the longest match is taken, and what is written.

A pattern's group ``t``, where it has one, is the token, and the rest of the match is context: it
counts in the length and is read again. Of equal lengths the first rule wins. The rules are those of
Stanford's PTBTokenizer 3.4.1 as its manual tells them and as it behaves.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from engine.metrics import ptb_words as words
from engine.metrics.ptb_chars import DIGITS, LETTERS, MARKS, SIGNS

Write = Callable[[str], str]
Rule = tuple[re.Pattern[str], Write]

_SPACE = r"[ \t\xa0\u2000-\u200a\u3000]"
_ANY_SPACE = r"[ \t\xa0\u2000-\u200a\u3000\r\n]"
_TYPESET = r"(?:['\u2019\x92]|&(?i:apos);)"
_ANY_APOSTROPHE = r"(?:['\u2019\x92`\u2018\x91\u201b]|&(?i:apos);)"
_ENTITY = "&(?i:[aeiou](?:acute|grave|uml));"
_LETTER = f"(?:[{LETTERS}{MARKS}\xad]|{_ENTITY})"
_LETTER_OR_DIGIT = f"(?:[{LETTERS}{MARKS}{DIGITS}\xad]|{_ENTITY})"
_ALNUM = f"[{LETTERS}{DIGITS}]"
_WORD = f"{_LETTER}{_LETTER_OR_DIGIT}*(?:[.!?]{_LETTER}{_LETTER_OR_DIGIT}*)*"
_PART = f"(?:[dDoOlL]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+"  # O'Brien, also inside hyphens
_THING = f"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
_HYPHENATED = r"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\xad]+))+"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
_TAG = (
    r"<(?:[!?][A-Za-z-][^>\r\n]*|/[A-Za-z][A-Za-z0-9_:.-]*[ \xa0]*"
    r"|[A-Za-z][A-Za-z0-9_:.-]*(?:[ \xa0]+[A-Za-z][A-Za-z0-9_:.-]*"
    r"(?:[ \xa0]*=[ \xa0]*(?:\"[^\"\r\n]*\"|'[^'\r\n]*'))?)*[ \xa0]*(?:/[ \xa0]*)?)>"
)
_COMPANY = "[A-Z]+(?:(?:&(?i:amp);|[+&])[A-Z]+)+"
_CLITIC = f"{_TYPESET}(?i:[msd]|re|ve|ll)"
_NOT = f"[nN]{_ANY_APOSTROPHE}[tT]"
_LEFT = "`\u2018\u201b\u2039\x91"
_RIGHT = "\u2019\u203a\x92"
_DOUBLE = "\u201c\u201d\xab\xbb\x93\x94"
_QUOTES = {
    "`": f"[{_LEFT}]",
    "'": f"[{_RIGHT}]|&apos;",
    "``": "[\u201c\xab\x93]",
    "''": '[\u201d\xbb\x94"]|&quot;',
}
_NOT_IN_URL = r" \t\n\f\r\"<>|(){}"


def _any_of(listed: str) -> str:
    """One pattern for a list of words, in any case where they are written without capitals."""
    return "|".join(
        f"(?i:{word})" if word.islower() else f"{word[0]}(?i:{word[1:]})"
        for word in sorted(listed.split(), key=len, reverse=True)
    )


def _rules(write: Write, *patterns: str) -> list[Rule]:
    return [(re.compile(pattern), write) for pattern in patterns]


def _as_is(token: str) -> str:
    return token


def _plain(token: str) -> str:
    """Without soft hyphens."""
    return re.sub("&(?i:amp);", "&", token.replace("\xad", "")) or "-"


def _spaced(token: str) -> str:
    """Spaces inside of a token do not part it."""
    return token.replace(" ", "\xa0")


def _bracketed(token: str) -> str:
    return _spaced(token).replace("(", "-LRB-").replace(")", "-RRB-")


def _ascii_quotes(token: str) -> str:
    for written, signs in _QUOTES.items():
        token = re.sub(signs, written, token)
    return token


def _constant(pattern: str, token: str) -> Rule:
    return re.compile(pattern), lambda _: token


_STARTER = _any_of(words.SENTENCE_STARTERS)
_ABBREVIATION = f"(?:{_any_of(words.ABBREVIATIONS)}|[Pp]?[Pp]t[ye]s?)"

_WORDS = [
    *_rules(
        _ascii_quotes,
        *(f"(?P<t>(?i:{word[:3]}))(?i:{word[4:]})" for word in words.JOINED.split()),
        "(?P<t>'[tT])(?i:is|was)",
        _NOT,
        rf"(?P<t>{_CLITIC})[^A-Za-z]",
    ),
    *_rules(
        _plain,
        f"(?P<t>[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*){_NOT}",
        f"(?P<t>{_WORD}){_CLITIC}",
        f"{_TYPESET}(?i:n{_TYPESET}?|em|till?|cause)",
        f"[A-HJ-XZn]{_ANY_APOSTROPHE}[{LETTERS}][{LETTERS}]+",
        _any_of(words.WITH_APOSTROPHE),
        _any_of(words.WITH_TYPESET_APOSTROPHE).replace("'", _TYPESET),
        _any_of(words.WITH_ANY_APOSTROPHE).replace("'", _ANY_APOSTROPHE),
        f"[{LETTERS}]+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z][{LETTERS}]*",
        f"(?i:ol|[djl]|dunkin|somethin){_TYPESET}",
        f"(?P<t>[yY]{_TYPESET})[{LETTERS}]",
        _WORD,
    ),
]

_ABBREVIATED = _rules(
    _plain,
    rf"(?P<t>{_ABBREVIATION}\.)[\s\S][\s\S]",
    rf"{_ABBREVIATION}\.",
    rf"(?:{_any_of(words.TITLES)}|[mM](?:fg|tg))\.",
    rf"(?P<t>(?:{_any_of(words.BEFORE_NUMBERS)})\.){_ANY_SPACE}?\d",
    rf"(?P<t>[A-Za-z])\.{_ANY_SPACE}+(?:{_STARTER}|{_TAG}){_ANY_SPACE}",
    r"[A-Za-z](?:\.[A-Za-z])*\.",
    rf"(?P<t>(?:{_THING}|{_WORD}|{_HYPHENATED}|{_COMPANY})\.)[,;:\u3001]",
    _THING,
    _HYPHENATED,
    _SLASHED,
    _COMPANY,
    r"[cC]\+\+|[cCfF]#",
)

_FILES = _rules(
    _as_is,
    rf"(?P<t>{_LETTER_OR_DIGIT}+(?:\.{_LETTER_OR_DIGIT}+)*\.(?:{_any_of(words.FILE_ENDINGS)}))"
    rf"(?:{_ANY_SPACE}|[.,!?])",
)

_NUMBERS = [
    *_rules(
        _plain,
        rf"(?P<t>['\u2019\x92]\d\d){_ANY_SPACE}|['\u2019\x92][2-9]0[sS]",
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"[-+]?(?:\d*(?:[.:,\xad\u066b\u066c]\d+)+|\d+)",
        r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
        r"[A-Z]*\$",
    ),
    *_rules(
        _bracketed,
        r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}",
        # telephone numbers, and whatever looks like them
        r"(?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])"
        r"\d{3,4}[- \xa0]?\d{3,5}",
    ),
]

_ADDRESSES = _rules(
    _as_is,
    rf"(?i:https?)://[^{_NOT_IN_URL}]+[^{_NOT_IN_URL}.!?,-]",
    rf"(?:(?i:www)\.(?:[^{_NOT_IN_URL}.!?,]+\.)+[a-zA-Z]{{2,4}}"
    rf"|(?:[^{_NOT_IN_URL}`'.!?,-_$]+\.)+(?i:com|net|org|edu))"
    rf"(?:/[^ \t\n\f\r\"<>|()]+[^{_NOT_IN_URL}.!?,-])?",
    rf"(?:<|&lt;)?[a-zA-Z0-9][^{_NOT_IN_URL}\xa0]*"
    rf"@(?:[^{_NOT_IN_URL}.\xa0]+\.)*[^{_NOT_IN_URL}.\xa0]+>?",
    "@[A-Za-z_][A-Za-z0-9_]*",
    f"#{_LETTER}+",
)

_MARKUP = _rules(_spaced, _TAG) + _rules(_as_is, r"&#\d+;|&(?i:ht|tl|ur|lr|qc|ql|qr|odq|cdq);")

_FACES = _rules(
    _bracketed,
    r"(?P<t>[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]",
    r"[x^~<>='-]_[x^~<>='-]",
    r"\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
)

_PUNCTUATION = [
    *_rules(
        _ascii_quotes,
        r"(?P<t>')[A-Za-z][^ \t\n\r\xa0]",
        f"''|[{_LEFT}{_RIGHT}{_DOUBLE}]{{1,2}}|['\"]|&(?i:apos|quot);",
        _CLITIC,
    ),
    *_rules(
        _as_is,
        r"-(?i:[lr][rcs]b)-|-{5,}|[-/.,:;]|[!?]+|\*+|(?:\\\*)+|#+|@+|_+|<<|>>",
        "[\u207a\u207b\u208a\u208b]?(?:[\xb2\xb3\xb9\u2070\u2074-\u2079]+|[\u2080-\u2089]+)",
        f"[{SIGNS}]",
    ),
]

_WRITTEN = [
    _constant("&(?i:nbsp);", ""),
    _constant(r"\.{3,5}|\.(?:[ \xa0]\.){2,4}|\u2026", "..."),
    _constant(r"-{2,4}|[\x96\x97\u2013-\u2015]|&(?i:md|mdash|ndash);", "--"),
    _constant(r"\(", "-LRB-"),
    _constant(r"\)", "-RRB-"),
    _constant(r"\[", "-LSB-"),
    _constant(r"\]", "-RSB-"),
    _constant(r"\{", "-LCB-"),
    _constant(r"\}", "-RCB-"),
    _constant("[\x80\xa4\u20a0\u20ac]", "$"),  # the euro
    _constant("\xa3", "#"),  # the pound
    _constant("\xa2", "cents"),
    _constant("&(?i:amp);", "&"),
    _constant("&(?i:lt);", "<"),
    _constant("&(?i:gt);", ">"),
    *(
        _constant(sign, written)
        for sign, written in zip("½¼¾⅓⅔", ("1/2", "1/4", "3/4", "1/3", "2/3"), strict=True)
    ),
]

RULES: list[Rule] = [
    *_MARKUP, *_WORDS, *_ADDRESSES, *_ABBREVIATED, *_FILES, *_NUMBERS, *_FACES, *_PUNCTUATION,
    *_WRITTEN,
]  # fmt: skip
