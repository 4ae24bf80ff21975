"""What a run will read: mixtures of datasets, and what their order depends on."""

import numpy as np
import pytest

from engine.config.schema import Config
from engine.data.views import origin
from engine.train.plan import make_plan, order_key

SIZES = {"one": 30, "two": 18, "three": 12}


@pytest.fixture
def plan_of(tmp_path):
    """A plan over CSV datasets, all of whose images have three captions."""
    for name, size in SIZES.items():
        (tmp_path / name / "train").mkdir(parents=True)
        rows = [f"{row // 3}.jpg,{row // 3},{name} {row}" for row in range(size)]
        text = "\n".join(["image,image_id,caption", *rows]) + "\n"
        (tmp_path / name / "train_anno.csv").write_text(text)

    def made(train_name=("one", "two"), **data):
        settings = {"data_path": str(tmp_path), "train_name": list(train_name), "batch_size": 6}
        config = Config.model_validate({"data": {**settings, **data}})
        return config, make_plan(config, 1)

    return made


def batches(plan, epoch=0):
    """Where each row of an epoch's batches comes from: (dataset, row)."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [
        [(origin(plan.sources[d], row)[0].name, row) for d, row in plan.rows(step).tolist()]
        for step in steps
    ]


def test_debias_takes_a_batch_from_all_parts_of_a_concatenation(plan_of):
    _, plan = plan_of(
        ("both", "three"),
        train_type="debias",
        datasets={"both": {"format": "concat", "parts": ["one", "two"]}},
    )
    assert plan.steps_per_epoch == 10
    kinds = [{name for name, _ in batch} for batch in batches(plan)]
    assert kinds.count({"three"}) == 2
    assert all(kind <= {"one", "two"} for kind in kinds if kind != {"three"})
    assert {"one", "two"} in kinds


def test_debias_draws_datasets_by_the_rows_that_an_epoch_takes_of_them(plan_of):
    _, plan = plan_of(
        ("one", "three"),
        train_type="debias",
        datasets={"one": {"format": "csv", "cap": 12}, "three": {"format": "csv", "repeat": 3}},
    )
    names = [batch[0][0] for batch in batches(plan)]
    assert (names.count("one"), names.count("three")) == (2, 6)


def test_an_epoch_shows_what_the_options_say(plan_of):
    _, plan = plan_of(
        datasets={
            "one": {"format": "csv", "captions": "random"},
            "two": {"format": "csv", "captions": "joined", "repeat": 2, "cap": 5},
        },
    )
    assert plan.steps_per_epoch == 4  # 10 + 5 × 2 rows
    shown = [row for batch in batches(plan) for row in batch]
    assert len(shown) == len(set(shown)) == 20
    assert [name for name, _ in shown].count("one") == 10


def test_the_order_hangs_on_the_options_of_the_rows(plan_of):
    def key(**options):
        config, plan = plan_of(datasets={"one": {"format": "csv", **options}})
        return order_key(config, plan)

    assert key() == key(captions="all", length=30)
    assert key()["rows chosen of data.datasets"] is None
    assert key(cap=10) != key(cap=10, cap_seed=1)  # as many rows, but others
    assert key(cap=10, captions="all") == key(cap=10)
    assert key(cap=10) != key(captions="random") != key(captions="joined")


def test_no_sampler_stores_what_it_shows(plan_of):
    _, plan = plan_of(train_type="sequential", datasets={"one": {"format": "csv", "cap": 20}})
    kept = [value for value in vars(plan.sources[0]).values() if isinstance(value, np.ndarray)]
    assert kept == []


@pytest.mark.parametrize("name", ["length_grouped", "modality_grouped"])
def test_grouped_batches_are_of_similar_length_over_all_datasets(plan_of, name):
    config, plan = plan_of(train_name=("one", "two", "three"), train_type=name)
    rows = [place for batch in batches(plan) for place in batch]
    assert sorted(rows) == sorted((of, row) for of, size in SIZES.items() for row in range(size))
    captions = {of: [plan.sources[d][r].caption for r in range(size)]
                for d, (of, size) in enumerate(SIZES.items())}  # fmt: skip
    lengths = [[len(captions[of][row]) for of, row in batch] for batch in batches(plan)]
    spread = np.mean([max(each) - min(each) for each in lengths])
    assert spread < 1.5  # "one 7" … "three 11"; of random batches about 3
    other = plan_of(train_name=("one", "two"), train_type=name)
    assert (
        order_key(*other)["lengths of the texts"] != order_key(config, plan)["lengths of the texts"]
    )
    assert order_key(*plan_of())["lengths of the texts"] is None


def test_the_order_hangs_on_how_conversations_are_read(plan_of):
    assert order_key(*plan_of())["data.conversations"] is None  # as of runs before there was one
    assert order_key(*plan_of(conversations="flatten"))["data.conversations"] == "flatten"
