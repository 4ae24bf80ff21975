"""The Java-free PTB tokenizer: what the reference wrote for hand-made lines, and random ones."""

import json
import random
import time

import pytest

from engine.metrics import captions_java as java
from engine.metrics import ptb

# the right column is what Stanford's PTBTokenizer 3.4.1 made, less the punctuation marks that
# pycocoevalcap removes
LINES = [
    (
        "A man, in a red t-shirt, isn't riding his friend's bike!",
        "a man in a red t-shirt is n't riding his friend 's bike",
    ),
    (
        "The dogs' owner can't, won't and shouldn't've gone.",
        "the dogs owner ca n't wo n't and should n't 've gone",
    ),
    (
        "They're here; I'm not, he'd say we'll see you've won.",
        "they 're here i 'm not he 'd say we 'll see you 've won",
    ),
    (
        "You cannot, I'm gonna wanna, gotta, lemme, gimme",
        "you can not i 'm gon na wan na got ta lem me gim me",
    ),
    (
        "'Tis the season; 'twas o'clock for y'all, ma'am",
        "'t is the season 't was o'clock for y' all ma'am",
    ),
    (
        "Rock'n'roll, rock 'n' roll and fish'n'chips",
        "rock 'n' roll rock 'n' roll and fish 'n' chips",
    ),
    (
        "O'Brien and d'Artagnan in Hawai'i's '90s, the '88 games",
        "o'brien and d'artagnan in hawai'i 's '90s the '88 games",
    ),
    (
        "Mr. Smith and Dr. Who met in the U.S. at 5 p.m. on Jan. 3rd.",
        "mr. smith and dr. who met in the u.s. at 5 p.m. on jan. 3rd",
    ),
    ("No. 5 is here, No. it is not, etc.", "no. 5 is here no it is not etc."),
    (
        "Words like e.g., i.e., vs. and Ph.D. stay whole.",
        "words like e.g. i.e. vs. and ph.d. stay whole",
    ),
    (
        "In vitamin C. The end, in vitamin C. but no end",
        "in vitamin c the end in vitamin c. but no end",
    ),
    ("A colour, a centre, a grey theatre", "a colour a centre a grey theatre"),
    (
        "$5.00, £5, €5, 5¢, US$3 and 50% of 1,000,000.5",
        "$ 5.00 # 5 $ 5 5 cents us$ 3 and 50 % of 1,000,000.5",
    ),
    (
        "1/2 cup, 2 1/2 cups, 2½ cups, 1⁄2 and 3/4-inch",
        "1/2 cup 2\xa01/2 cups 2 1/2 cups 1⁄2 and 3/4-inch",
    ),
    ("5:30pm, 10-20, 10/20/2010, 24/7, +5, -3.2", "5:30 pm 10-20 10/20/2010 24/7 +5 -3.2"),
    ("Call (650) 723-0293 or 650-723-0293", "call -lrb-650-rrb-\xa0723-0293 or 650-723-0293"),
    ("and/or w/o w/ he/she a-b/c", "and/or w/o w / he/she a-b/c"),
    (
        "See http://www.foo.com/bar?x=1, www.example.com or foo@bar.com",
        "see http://www.foo.com/bar?x=1 www.example.com or foo@bar.com",
    ),
    ("@user says #hashtag #1", "@user says #hashtag # 1"),
    (":) :-( ;-) :D ^_^ <3 :'(", ":-rrb- :--lrb- ;--rrb- :d ^_^ < 3 :'-lrb-"),
    ("AT&T, R&D, a&b, A &amp; B, &lt;b&gt;", "at&t r&d a & b a & b < b >"),
    (
        "\"quoted\" 'single' ``both'' “curly” ‘curly’ «angle»",
        "quoted single both curly curly angle",
    ),
    ("Wait... what?! no!! a…b . . . end", "wait what ?! no !! a b end"),
    ("long—dash -- dash – en---three ----- five", "long dash dash en three ----- five"),
    (
        "(round) [square] {curly} <b>tag</b>",
        "-lrb- round -rrb- -lsb- square -rsb- -lcb- curly -rcb- <b> tag </b>",
    ),
    ("a*b ** c++ C# x+y 5+5 #2", "a * b ** c++ c# x + y 5 +5 # 2"),
    ("snow\xadman café naïve 日本語 Ñandú", "snowman café naïve 日本語 ñandú"),
    ("emoji 😀 gone, ★ kept, ™ kept, x² kept", "emoji gone ★ kept ™ kept x ² kept"),
    ("hello.World end.The file.txt 001.jpg ", "hello.world end.the file.txt 001.jpg"),
    ("it’s don’t dogs’ ’tis ‘em", "it 's do n't dogs tis em"),
    ("“‘nested’” quotes", "``` nested ''' quotes"),
    ("a_b snake_case __init__ -_-", "a_b snake_case __ init __ -_-"),
    ("   spaces\tand\u3000others   ", "spaces and others"),
    ("", ""),
]
# pieces that the rules tell apart, from which random lines are made
PIECES = r"""
    a B1 dog The U.S. Mr. Inc. etc. no. 5 1,000 1/2 5:30 3.5 '90s '88 o'clock O'Neil can't I'm
    's y'all gonna 'tis x-ray and/or a_b AT&T C++ :) ^_^ <b> http://a.bc/d a.com x@y.z #tag
    @me “x” ‘y’ don’t é ½ £ $ % & * -- ... ( ) [ ] ! ? , . ; : - ' " ` / \ + = ~ | < > … — ° ²
    日 😀 &amp; &quot; 001.jpg (650) 723-0293 A. Ph.D. -LRB-"""


def test_each_rule():
    assert ptb.tokenize(text for text, _ in LINES) == [tokens for _, tokens in LINES]


@pytest.mark.parametrize(
    ("captions", "tokens"),
    [
        (["vitamin A.", "The end"], ["vitamin a", "the end"]),
        (["vitamin A.", "An end"], ["vitamin a", "an end"]),
        (["vitamin A.", "Trees"], ["vitamin a.", "trees"]),
        (["room no.", "5"], ["room no.", "5"]),
        (["room no."], ["room no"]),
        (["in the year '88"], ["in the year 88"]),
        (["in the year '88", ""], ["in the year '88", ""]),
    ],
)
def test_only_the_line_below_counts(captions, tokens):
    assert ptb.tokenize(captions) == tokens


def test_nothing_pushes_lines_out_of_place():
    broken = ["one\ntwo", "three\r\nfour\x0bfive\u2028six", "", "\ud83d lone", "seven"]
    assert ptb.tokenize(broken) == ["one two", "three four five six", "", "lone", "seven"]
    assert ptb.tokenize([]) == [""]
    assert ptb.tokenize(["", ""]) == ["", ""]


def test_long_lines_without_spaces_take_no_time():
    start = time.process_time()
    for piece in ("a&", "<a ", "a-", "'", "don'", "1,", "a@", "A. ", "a.", "inc.", "\xad"):
        ptb.tokenize([piece * 1000])
    assert time.process_time() - start < 5


def random_lines(count: int) -> list[str]:
    draw = random.Random(0)
    pieces = [*PIECES.split(), "\xad", "\u0301"]
    return [
        "".join(
            draw.choice(pieces) + draw.choice(("", " ", " ")) for _ in range(draw.randint(1, 12))
        )
        for _ in range(count)
    ]


@pytest.mark.skipif(bool(java.missing_java()), reason="the reference tokenizer needs Java")
def test_equals_the_reference_on_random_lines():
    pytest.importorskip("pycocoevalcap")
    lines = [text for text, _ in LINES] + random_lines(5000)
    for line, ours, theirs in zip(lines, ptb.tokenize(lines), java.tokenize(lines), strict=True):
        assert ours == theirs, line


@pytest.mark.parametrize(
    "name", ["magic_flickr30k_magic", "clipscore_good", "clipscore_bad", "nlg_eval_example"]
)
def test_known_tokens(shared_data, name):
    given = json.loads((shared_data / "metrics" / f"{name}.json").read_text(encoding="utf8"))
    wanted = json.loads((shared_data / "metrics" / f"{name}.ptb.json").read_text(encoding="utf8"))
    assert ptb.tokenize(item["candidate"] for item in given) == [w["candidate"] for w in wanted]
    flat = ptb.tokenize(text for item in given for text in item["references"])
    assert flat == [text for item in wanted for text in item["references"]]
