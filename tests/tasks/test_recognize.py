"""The recognition task: what is learned of a sample, and gradients against labels one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import schema
from engine.data.text import bytes as byte_tokenizer
from engine.data.text.labels import lay_out, stack
from engine.dist import collectives
from engine.errors import UserError
from engine.models.vision_language import Recognizer
from engine.registry import find
from engine.tasks.recognize import RecognizeTask
from engine.train import rng
from engine.train.steps import batches
from engine.types import BadSample, Batch, Row, Sample
from tests.distributed import run
from tests.tasks.test_caption import Image
from tests.train import tiny

LABELS = [("dog", "red cat"), ("car",), ("a", "tree", "bird"), ("snow", "sky"), ("x", "yy")]
SIZES = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 90,
    "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2,
}  # fmt: skip


def make_task(labels: dict[str, Any] | None = None, **decoder: Any) -> RecognizeTask:
    section = {"prompt": "It has", "train_prompts": ["It has", "There are", "I see the"]}
    options = {"name": "truncated", "config": SIZES, "max_length": 40} | decoder
    config = schema.Config(
        runner=schema.Runner(seed=tiny.SEED),
        data=schema.Data(labels=schema.Labels(**section | (labels or {}))),
        model=schema.Model(decoder=schema.Decoder(**options)),
    )
    return RecognizeTask(config, byte_tokenizer.build(schema.Tokenizer()))


def make_model(task: RecognizeTask) -> Recognizer:
    with rng.isolated(0, tiny.CPU):
        decoder = find("models/decoders", "truncated").build(
            task.config.model.decoder, vocab_size=task.tokenizer.vocab_size,
            pad_id=task.tokenizer.pad_id, eos_id=task.eos_id,
        )  # fmt: skip
        task.start_id = decoder.start_id
        model = Recognizer(
            Image(), nn.Linear(6, decoder.width), decoder, layer=-1, keep_prefix=True,
            label_smoothing=0.0, mean=[0.4] * 3, std=[0.3] * 3,
        )  # fmt: skip
    return model.double().train()


def samples(labels: Sequence[Sequence[str]] = LABELS, first: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(first)
    return [
        Sample(
            Row(f"k{n}", (), "", f"i{n}", f"c{n}", labels=tuple(given)),
            (torch.randint(256, (3, 2, 2), dtype=torch.uint8, generator=generator),),
            0, n, seed=1000 + n,
        )
        for n, given in enumerate(labels, first)
    ]  # fmt: skip


# --- batches


def test_a_row_is_the_drawn_prompt_and_the_shuffled_labels() -> None:
    task = make_task()
    batch = task.batch(samples())
    for row, (sample, given) in enumerate(zip(samples(), LABELS, strict=True)):
        prompt = task.text.train_prompt(sample.seed)
        order = task.text.order(given, sample.seed)
        assert sorted(order) == sorted(given)
        ids = [task.start_id, *task.tokenizer.raw(prompt)]
        for label in order:
            ids += task.tokenizer.raw(f" {label},")
        length = len(ids)
        assert batch["input_ids_BT"][row, :length].tolist() == ids
        assert batch["attention_mask_BT"][row].sum() == length
    prompts = {task.text.train_prompt(sample.seed) for sample in samples()}
    assert len(prompts) > 1
    assert task.describe(samples()[0])[1].endswith(",")
    plain = task.batch([replace(sample, seed=None) for sample in samples()])
    head = [task.start_id, *task.tokenizer.raw("It has")]
    assert (plain["input_ids_BT"][:, : len(head)] == torch.tensor(head)).all()
    assert set(task.pictures(samples())) == {"image_BCHW", "dataset_B", "index_B"}


def test_labels_that_do_not_fit_wait_for_another_epoch() -> None:
    task = make_task(max_length=22)
    (sample,) = samples([("one", "two", "three", "four", "five")])
    learned = set()
    for seed in range(40):
        row = task.row(replace(sample, seed=seed))
        assert len(row.ids) <= 22
        text = task.tokenizer.decode(row.ids[row.segment.index(1) :])
        learned |= {label.strip() for label in text.split(",") if label.strip()}
    assert learned == set(sample.row.labels)


def test_a_mark_of_the_image_stands_before_the_text() -> None:
    task = make_task(image_token="<|image|>")
    mark = task.tokenizer.token_id("<|image|>")
    assert mark == task.tokenizer.vocab_size - 1 and mark in task.tokenizer.special_ids
    assert task.batch(samples())["input_ids_BT"][:, 0].tolist() == [mark] * len(LABELS)
    assert task.prompt_ids()[:2].tolist() == [mark, task.start_id]
    assert task.room() == 40 - len(task.prompt_ids())
    model = make_model(task)
    assert model.decoder.model.get_input_embeddings().num_embeddings == mark + 1


def test_records_without_a_label_to_learn_are_named() -> None:
    task = make_task(max_length=16)

    def record(*labels: str, caption: str = "x") -> Row:
        return Row("k", (), caption, "i", "c", labels=labels)

    task.usable(record("dog"))
    with pytest.raises(BadSample, match=r"^no label: it has none"):
        task.usable(record())
    with pytest.raises(BadSample, match=r"^separator in label: 'a, b'"):
        task.usable(record("dog", "a, b"))
    with pytest.raises(BadSample, match=r"^label too long: the shortest takes 10 tokens"):
        task.usable(record("elephant"))
    pytest.importorskip("HanTa", reason="nouns need HanTa")
    nouns = make_task({"source": "nouns"})
    nouns.usable(record(caption="a dog runs"))
    with pytest.raises(BadSample, match=r"^no label: no noun in its caption"):
        nouns.usable(record("dog", caption="it runs quickly"))


def test_prompts_that_leave_no_room_are_refused() -> None:
    make_task(max_length=12)
    with pytest.raises(UserError, match=r"a prompt takes 10 tokens .* within 11") as caught:
        make_task(max_length=11)
    assert caught.value.key == "model.decoder.max_length"


def test_a_decoder_of_texts_is_refused() -> None:
    with pytest.raises(UserError, match="'causal' is not for this task; take truncated"):
        make_task(name="causal")


# --- gradients

COUNTS = {1: [5], 2: [7, 4]}
ROWS = 3
KEEPS = (None, 0, 99)  # None: the plain step
MASKS = ("independent", "nxtp")


def make_batch(task: RecognizeTask, counts: Sequence[int], rank: int) -> Batch:
    """The rows of a rank; ranks have labels of unlike numbers and lengths."""
    first = sum(counts[:rank])
    given = [LABELS[n % 5] * (1 + rank) for n in range(first, first + counts[rank])]
    return task.batch(samples([[f"{a}{i}" for i, a in enumerate(g)] for g in given], first))


def gradients_of_all(counts: Sequence[int]) -> list[tuple[float, dict[str, Tensor]]]:
    """(loss, gradients) on this rank by each mask and step."""
    found = []
    for mask in MASKS:
        task = make_task(mask=mask)
        model = tiny.replicas(make_model(task))
        for keep in KEEPS:
            batch = make_batch(task, counts, collectives.rank()) | {"step": tiny.STEP}
            step = tiny.make_step(task, model, None if keep is None else ROWS, keep or 0)
            losses = step(batches.take(batch, slice(None)), tiny.STEP)
            found.append((float(losses["loss"]), tiny.gradients(model)))
    return found


def oracle(
    task: RecognizeTask, counts: Sequence[int], rows: int
) -> tuple[float, dict[str, Tensor]]:
    """One process and one graph over all ranks' rows, with the draws of each sub-batch."""
    model, parts = make_model(task), -(-max(counts) // rows)
    nll, tokens = [], 0
    for rank in range(len(counts)):
        batch = make_batch(task, counts, rank)
        for j, chosen in enumerate(tiny.row_sets(batch, parts, sort=parts > 1)):
            longest = int(batch["attention_mask_BT"][chosen].sum(1).max())
            part = {name: v[chosen] for name, v in batch.items() if isinstance(v, Tensor)}
            part |= {name: v[:, :longest] for name, v in part.items() if name.endswith("_BT")}
            with rng.isolated(rng.derive(tiny.SEED, tiny.STEP, rank, j), tiny.CPU):
                nll.append(model(part)["nll_B"].sum())
            tokens += int((part["source_BT"] >= 0).sum())
    loss = torch.stack(nll).sum() / tokens
    loss.backward()
    return float(loss.detach()), tiny.gradients(model)


@pytest.mark.parametrize("world", [1, 2])
def test_every_step_gives_the_gradients_of_all_ranks_labels(world: int) -> None:
    """Two ranks whose rows differ learn what one rank does of all rows."""
    counts = COUNTS[world]
    by_rank = run(gradients_of_all, world, counts) if world > 1 else [gradients_of_all(counts)]
    results = zip(*by_rank, strict=True)
    for mask in MASKS:
        for keep in KEEPS:
            task = make_task(mask=mask)
            value, want = oracle(task, counts, max(counts) if keep is None else ROWS)
            ranks = next(results)
            told = f"{mask} keep {keep}"
            assert abs(sum(rank[0] for rank in ranks) / world - value) < 1e-11, told
            for _, got in ranks:
                assert tiny.largest_error(got, want) < 1e-10, told


def test_the_loss_is_the_mean_over_labels_tokens_one_by_one() -> None:
    task = make_task()
    model = make_model(task).eval()
    loss = task.losses(task.features(model, task.batch(samples())))["loss"]
    loss.backward()
    got = tiny.gradients(model)
    losses = []
    for sample in samples():
        head = [task.start_id, *task.tokenizer.raw(task.text.train_prompt(sample.seed))]
        image_BND = model.image_tokens(sample.images[0][None])
        for label in sample.row.labels:
            ids = task.tokenizer.raw(f" {label},")
            alone = stack([lay_out(head, [ids], nxtp=False, per_label=False)], 0)
            log_p = model.decoder.log_probs(model.decoder.label_hidden(image_BND, alone)[0])
            losses += [-log_p[len(head) - 1 + place, token] for place, token in enumerate(ids)]
    want = torch.stack(losses).mean()
    want.backward()
    assert abs(loss.item() - want.item()) < 1e-11
    assert tiny.largest_error(got, tiny.gradients(model)) < 1e-9
