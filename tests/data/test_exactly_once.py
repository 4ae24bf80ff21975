"""Every sample once an epoch, in the same batches: whatever the form of the data, the sampler, the
number of workers and of processes, and wherever a run stopped and on how many it went on."""

import hashlib
import io
import random
import tarfile
from collections import Counter
from functools import cache, partial
from itertools import product

import numpy as np
import pytest
from PIL import Image

from engine import registry
from engine.config import schema
from engine.data.loader import train_batches
from engine.data.samplers.pool import SamplerInputs, TextLengths
from engine.data.sources import open_source
from tests.data.drawn_source import collate, noisy

SIZES = {"one": 13, "two": 9}
BATCH_SIZE = 6
EPOCHS = 3
FORMS = ("csv", "webdataset")
SAMPLERS = ("shuffle", "sequential", "debias", "modality_grouped")
WORLDS = (1, 2, 3)

# On a machine of fewer cores than workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def png(number):
    image = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image, "PNG")
    return image.getvalue()


def write_csv(root, pairs):
    (root / "train").mkdir(parents=True)
    for name, image, _ in pairs:
        (root / "train" / f"{name}.png").write_bytes(image)
    lines = [f"{name}.png,{text}" for name, _, text in pairs]
    (root / "train_anno.csv").write_text("\n".join(["image,caption", *lines]) + "\n")


def write_shards(root, pairs):
    """Shards of five samples."""
    root.mkdir(parents=True)
    for start in range(0, len(pairs), 5):
        with tarfile.open(root / f"{start // 5:05}.tar", "w") as shard:
            for name, image, text in pairs[start : start + 5]:
                for member, content in ((f"{name}.png", image), (f"{name}.txt", text.encode())):
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same two datasets in each form."""
    root = tmp_path_factory.mktemp("data")
    for number, (name, size) in enumerate(SIZES.items()):
        pairs = [(f"{n:03}", png(100 * number + n), f"{name} {n}") for n in range(size)]
        write_csv(root / "csv" / name, pairs)
        write_shards(root / "webdataset" / name, pairs)
    return root


@pytest.fixture(scope="module")
def load(folder):
    """The batches of steps ``first`` to ``end``, of all processes one after another."""

    @cache
    def sources(forms):
        data = schema.Data(
            datasets={
                name: {"format": form, "root": str(folder / form / name)}
                for name, form in zip(SIZES, forms, strict=True)
            }
        )
        return [open_source(name, "train", data, key="data.train_name") for name in SIZES]

    def sampler(kind):
        """A new one each time, as a process that begins has."""
        build = registry.find("data/samplers", kind).build

        def texts():
            return TextLengths([s.column("length") for s in sources((FORMS[0], FORMS[1]))])

        return build(
            SamplerInputs(list(SIZES.values()), BATCH_SIZE, 7, names=list(SIZES), texts=texts)
        )

    def loaded(forms, kind, *, workers, world, first=0, end=None):
        steps = sampler(kind).steps
        end = EPOCHS * steps if end is None else end
        ranks = [
            train_batches(
                sources(forms), sampler(kind), noisy, collate, first_step=first, total_steps=end,
                steps_per_epoch=steps, rank=rank, world=world, seed=7, num_workers=workers,
            )
            for rank in range(world)
        ]  # fmt: skip
        found = [list(rank) for rank in ranks]
        assert all([step for step, _, _ in rank] == list(range(first, end)) for rank in found)
        assert all(not bad for rank in found for _, _, bad in rank)
        # A step's global batch: what each process got, in their order.
        return [[batch for _, batch, _ in ranks] for ranks in zip(*found, strict=True)]

    loaded.steps = lambda kind: sampler(kind).steps
    return loaded


@pytest.fixture(scope="module")
def whole(load):
    """A run from its first step to its last, without worker processes."""
    return cache(partial(load, workers=0))


def digest(batches):
    """All bits of a step's batches."""
    bits = hashlib.blake2b()
    for batch in batches:
        for name, value in sorted(batch.items()):
            content = repr(value).encode() if isinstance(value, list) else value.numpy().tobytes()
            bits.update(name.encode() + content)
    return bits.hexdigest()


def rows(batches):
    return [tuple(row) for batch in batches for row in batch["row_B2"].tolist()]


def assert_exactly_once(kind, steps, steps_per_epoch):
    """Each sample once an epoch; of debias once a pass through its dataset."""
    every = [(dataset, row) for dataset, size in enumerate(SIZES.values()) for row in range(size)]
    if kind != "debias":
        for start in range(0, len(steps), steps_per_epoch):
            epoch = [
                row for batches in steps[start : start + steps_per_epoch] for row in rows(batches)
            ]
            assert sorted(epoch) == every
        return
    shown = [row for batches in steps for row in rows(batches)]
    for dataset, size in enumerate(SIZES.values()):
        own = [row for of, row in shown if of == dataset]
        assert len(own) > 2 * size
        for start in range(0, len(own), size):
            one_pass = own[start : start + size]
            expected = range(size) if len(one_pass) == size else set(one_pass)
            assert sorted(one_pass) == sorted(expected)


def matrix():
    """All combinations; those of many worker processes over shards, which are slow, marked so."""
    for form, kind, workers, world in product(FORMS, SAMPLERS, (0, 1, 4), WORLDS):
        slow = form == "webdataset" and workers * world > 4
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(form, kind, workers, world, marks=marks)


@pytest.mark.parametrize(("form", "kind", "workers", "world"), matrix())
def test_exactly_once(load, whole, form, kind, workers, world):
    """A run stops at a random step and goes on at another world size."""
    forms, steps = (form, form), load.steps(kind)
    chance = random.Random(f"{form} {kind} {workers} {world}")
    stop = chance.randrange(4, EPOCHS * steps - 3)  # with a step for each worker on both sides
    other = WORLDS[world % 3]
    before = load(forms, kind, workers=workers, world=world, end=stop)
    after = load(forms, kind, workers=workers, world=other, first=stop)
    expected = whole(forms, kind, world=world)[:stop] + whole(forms, kind, world=other)[stop:]
    assert list(map(digest, before + after)) == list(map(digest, expected))
    assert_exactly_once(kind, before + after, steps)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_form_changes_no_bit(whole, kind):
    """Nor do datasets of different forms in one run."""
    expected = list(map(digest, whole(("csv", "csv"), kind, world=2)))
    assert len(set(expected)) == len(expected)
    for forms in (("webdataset", "webdataset"), ("csv", "webdataset")):
        assert list(map(digest, whole(forms, kind, world=2))) == expected


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_order_is_that_of_any_number_of_processes(whole, kind):
    orders = [[rows(step) for step in whole(("csv", "csv"), kind, world=world)] for world in WORLDS]
    assert orders[0] == orders[1] == orders[2]
    epochs = len(orders[0]) // EPOCHS
    assert orders[0][:epochs] != orders[0][epochs : 2 * epochs]


def test_pixels_and_texts_are_those_of_the_row(whole):
    """Rows alone could be right over the wrong content."""
    texts = Counter()
    for step in whole(("csv", "csv"), "shuffle", world=1):
        for batch in step:
            for (dataset, row), text in zip(batch["row_B2"].tolist(), batch["text_B"], strict=True):
                assert text == f"{list(SIZES)[dataset]} {row}"
                texts[text] += 1
    assert set(texts.values()) == {EPOCHS}
