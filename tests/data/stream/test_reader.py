"""Passes that every shard is in once, and readers that continue anywhere."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.stream.reader import Cursor, Order, ShardReader
from engine.data.stream.source import Item
from engine.errors import FaultError


def sized(sizes):
    """Shards of so many items each, made up."""

    def read(shard):
        for number in range(sizes[shard]):
            yield Item(number, f"{shard}-{number}", None)

    return read


def reader_of(order, reader, sizes, window):
    return ShardReader(order, reader, window, sized(sizes))


def taken(samples, count):
    return [(t.at.number, t.shard, t.item.number) for t in itertools.islice(samples, count)]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    readers=st.integers(1, 3),
    window=st.integers(1, 12),
    stop=st.integers(0, 60),
    seed=st.integers(0, 9),
)
def test_a_reader_continues_from_its_state(sizes, readers, window, stop, seed):
    order = Order(len(sizes), min(readers, len(sizes)), seed)
    whole = taken(reader_of(order, 0, sizes, window), stop + 30)
    first = reader_of(order, 0, sizes, window)
    assert taken(first, stop) == whole[:stop]
    again = reader_of(order, 0, sizes, window)
    again.restore(first.state())
    assert taken(again, 30) == whole[stop:]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=9),
    readers=st.integers(1, 3),
    window=st.integers(1, 12),
)
def test_a_pass_holds_every_sample_once(sizes, readers, window):
    order = Order(len(sizes), readers, 4)
    seen = []
    for reader in range(readers):
        mine = sum(sizes[shard] for shard in order.shards(0, reader))
        found = taken(reader_of(order, reader, sizes, window), mine)
        assert {number for number, _, _ in found} == {0}
        seen += [pair for _, *pair in found]
    assert sorted(seen) == [[s, n] for s, size in enumerate(sizes) for n in range(size)]


def test_passes_and_seeds_have_orders_of_their_own():
    orders = [Order(50, 1, seed).shards(number, 0) for seed in (0, 1) for number in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    found = taken(reader_of(Order(1, 1, 0), 0, [100], 20), 100)
    assert found != sorted(found)
    blocks = [sorted(n for *_, n in found[i : i + 20]) for i in range(0, 100, 20)]
    assert blocks == [list(range(i, i + 20)) for i in range(0, 100, 20)]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=4, max_size=12),
    window=st.integers(1, 6),
    data=st.data(),
)
def test_other_readers_lose_nothing(sizes, window, data):
    """However many readers follow one another, each pass is whole when the last is through it."""
    left, counted, total = {}, Counter(), sum(sizes)
    for _ in range(3):
        readers = data.draw(st.integers(1, 4))
        order = Order(len(sizes), readers, 7, left)
        places = []
        for reader in range(readers):
            running = reader_of(order, reader, sizes, window)
            counted.update(taken(running, data.draw(st.integers(0, total // readers))))
            places.append(Cursor(*running.state()["begin"]))
        left = order.remaining(places)
    order = Order(len(sizes), 1, 7, left)
    last = reader_of(order, 0, sizes, window)
    for number in (0, 1, 2):
        rest = sum(sizes[shard] for shard in order.shards(number, 0))
        counted.update(taken(last, rest))
    everything = {(n, s, i) for n in (0, 1, 2) for s, size in enumerate(sizes) for i in range(size)}
    assert everything <= set(counted)


def test_readers_that_were_as_far_leave_little():
    order = Order(8, 2, 0)
    left = order.remaining([Cursor(0, 2, 5), Cursor(0, 2, 0)])
    assert sorted(left["0"]) == sorted(order.shards(0, 0)[2:] + order.shards(0, 1)[2:])


def test_shards_that_hold_nothing_end_the_run():
    with pytest.raises(FaultError, match="none of a reader's 2 shards has a sample"):
        next(iter(reader_of(Order(2, 1, 0), 0, [0, 0], 4)))
