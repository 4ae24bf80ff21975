"""Which characters the PTB lexer takes for letters, for signs and for nothing, as regex classes.

The lexer reads UTF-16 units by tables of Unicode 6, so that a character outside the basic plane
(an emoji, say) is never part of a token. Letters and digits follow Unicode's categories; the two
sets below do not, and were found by giving the reference tokenizer each character alone and
between letters and digits.
"""

import re
import unicodedata

_PLANE = 0x10000

# combining and modifier signs that join a word as letters do, but never after a digit
_MARKS = """
    02c2-02c5 02d2-02df 02e5-02eb 02ed 02ef-036f 0375 0378-0379 0384-0385 03f6 0483-0487 055a-055f
    0591-05bd 05bf 05c1-05c2 05c4-05c5 05c7 0615-061a 064b-065e 0670 06d6-06e4 06e7-06ed 06fd-06fe
    070f 0711 0730-074c 07a6-07b0 07eb-07f3 0900-0903 093c 093e-094e 0951-0955 0962-0963 0981-0983
    09bc 09be-09c4 09c7-09c8 09cb-09cd 09d7 09e2-09e3 0a01-0a03 0a3c 0a3e-0a4f 0a81-0a83 0abc
    0abe-0acf 0b82 0bbe-0bc2 0bc6-0bc8 0bca-0bcd 0c01-0c03 0c3e-0c56 0d3e-0d44 0d46-0d48 0e31
    0e34-0e3a 0e47-0e4e 0eb1 0eb4-0ebc 0ec8-0ecd"""

# signs that are a token each; what is in no set at all is dropped, and ends a token
_SIGNS = """
    0024-0027 002a 002b 003b-003e 005c 005e 0060 007c 007e 00a1 00a5-00a9 00ac 00ae-00b4 00b6-00b9
    00bf 00d7 00f7 037e 0387 0589 05be 05c0 05c3 05c6 05f3-05f4 0600-0603 0606-060c 0614 061b
    061e-061f 066a 066d 06d4 0700-070d 07f6-07f8 0964-0965 0e3f 0e4f 1fbd 2016-2017 201a 201e-2023
    2030-2038 203b 203e-2042 2044 2070 2074-207e 2080-208e 20a4 2100-2101 2103-2106 2108-2109 2114
    2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 214a-214d 214f 2155-215e 2190-2bff
    3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 ffe5-ffe6"""


def _listed(ranges: str) -> set[int]:
    found: set[int] = set()
    for part in ranges.split():
        first, _, last = part.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return found


def _of_category(*categories: str) -> set[int]:
    return {
        code for code in range(_PLANE) if unicodedata.category(chr(code)).startswith(categories)
    }


def _inside_brackets(codes: set[int]) -> str:
    """The codes as the inside of a regex class, in ranges."""
    parts, ordered = [], sorted(codes)
    start = 0
    for index, code in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != code + 1:
            parts.append(f"{re.escape(chr(ordered[start]))}-{re.escape(chr(code))}")
            start = index + 1
    return "".join(parts)


LETTERS = _inside_brackets(_of_category("L"))
DIGITS = _inside_brackets(_of_category("Nd"))
MARKS = _inside_brackets(_listed(_MARKS))
SIGNS = _inside_brackets(_listed(_SIGNS))
