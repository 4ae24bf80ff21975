"""The check sum of a sequence of samples."""

from dataclasses import replace
from functools import reduce
from operator import add

from engine.tools.pack.shards import Digest, image_digest, sample_digest
from engine.types import Row

RECORD = Row("a.jpg", (), "words", "1", "2", None, (("human", "?"),), ("yes",), ("cat",))


def _digests(number):
    return [sample_digest(replace(RECORD, caption=str(i)), b"") for i in range(number)]


def test_parts_put_together_are_the_whole():
    digests = _digests(20)
    whole = reduce(add, digests, Digest())
    for cut in (0, 1, 7, 20):
        parts = reduce(add, digests[:cut], Digest()) + reduce(add, digests[cut:], Digest())
        assert parts == whole
    assert whole.length == 20 and len(str(whole)) == 32


def test_order_and_number_count():
    one, two, three = _digests(3)
    assert one + two + three != one + three + two
    assert one + one != one
    assert Digest() + one == one + Digest() == one


def test_all_that_a_run_reads_counts():
    first = sample_digest(RECORD, image_digest(b"pixels"))
    assert first == sample_digest(RECORD, image_digest(b"pixels"))
    others = [
        sample_digest(RECORD, image_digest(b"pixelz")),
        sample_digest(replace(RECORD, caption="word s"), image_digest(b"pixels")),
        sample_digest(replace(RECORD, image_id="2", caption_id="1"), image_digest(b"pixels")),
        sample_digest(replace(RECORD, turns=()), image_digest(b"pixels")),
        sample_digest(replace(RECORD, question_type="what"), image_digest(b"pixels")),
        sample_digest(replace(RECORD, answer_type="what"), image_digest(b"pixels")),
        sample_digest(replace(RECORD, answers=(), labels=("yes", "cat")), image_digest(b"pixels")),
    ]
    assert len({first, *others}) == 8


def test_names_and_spaces_around_a_caption_do_not():
    assert sample_digest(RECORD, b"") == sample_digest(
        replace(RECORD, key="b.jpg", caption=" words\n"), b""
    )
