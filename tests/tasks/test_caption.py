"""The caption task: what is learned of a sample, and gradients against rows one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import schema
from engine.data.text import bytes as byte_tokenizer
from engine.dist import collectives
from engine.errors import UserError
from engine.losses.language_model import IGNORED
from engine.models.decoders.language_model import DecoderInput
from engine.models.vision_language import VisionLanguage
from engine.registry import find
from engine.tasks.caption import CaptionTask
from engine.train import rng
from engine.train.steps import batches
from engine.types import BadSample, Batch, Features, Row, Sample
from tests.distributed import run
from tests.train import tiny

TEXTS = ["a dog", "two cats on a red mat", "rain", "x", "many birds", "no", "snow falls"]
DECODERS = {
    "causal": {
        "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40,
        "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2,
    },
    "t5_cross": {
        "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
        "dropout_rate": 0.2,
    },
}  # fmt: skip


class Image(nn.Module):
    """Four tokens of an image of 2 × 2 pixels, with dropout."""

    token_width, num_prefix_tokens = 6, 0

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(3, 6), nn.Dropout(0.2)

    def tokens(self, image_BCHW: Tensor, layer: int) -> Tensor:
        return self.dropout(self.layer(image_BCHW.flatten(2).transpose(1, 2)))


def make_task(
    name: str = "causal", max_length: int = 30, prompt: dict[str, str] | None = None,
    smoothing: float = 0.0,
) -> CaptionTask:  # fmt: skip
    config = schema.Config(
        runner=schema.Runner(seed=tiny.SEED),
        data=schema.Data(prompt=schema.Prompt(**(prompt or {}))),
        loss=schema.Loss(language_model=schema.LanguageModelLoss(label_smoothing=smoothing)),
        model=schema.Model(
            decoder=schema.Decoder(name=name, config=DECODERS[name], max_length=max_length)
        ),
    )
    return CaptionTask(config, byte_tokenizer.build(schema.Tokenizer(name="bytes")))


def make_model(task: CaptionTask) -> VisionLanguage:
    section, tokenizer = task.config.model.decoder, task.tokenizer
    with rng.isolated(0, tiny.CPU):
        decoder = find("models/decoders", section.name).build(
            section, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, eos_id=task.eos_id
        )
        task.start_id = decoder.start_id
        model = VisionLanguage(
            Image(), nn.Linear(6, decoder.width), decoder, layer=-1, keep_prefix=True,
            label_smoothing=task.config.loss.language_model.label_smoothing,
            mean=[0.4] * 3, std=[0.3] * 3,
        )  # fmt: skip
    return model.double().train()


def samples(texts: Sequence[str] = TEXTS, first: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(first)
    return [
        Sample(
            Row(f"k{n}", (), text, f"i{n}", f"c{n}"),
            (torch.randint(256, (3, 2, 2), dtype=torch.uint8, generator=generator),), 0, n,
        )
        for n, text in enumerate(texts, first)
    ]  # fmt: skip


# --- batches


def test_the_caption_and_its_end_are_learned_the_prompt_and_padding_are_not() -> None:
    task = make_task(prompt={"template": "instruction_answer", "instruction": "hi"}, max_length=60)
    batch = task.batch(samples())
    prompt = [task.start_id, *task.tokenizer.raw("##Instruction: hi ##Answer: ")]
    for row, text in enumerate(TEXTS):
        caption = task.tokenizer.raw(text)
        ids = batch["input_ids_BT"][row]
        length = len(prompt) + len(caption)
        assert ids[:length].tolist() == [*prompt, *caption]
        assert set(ids[length:].tolist()) <= {task.tokenizer.pad_id}
        assert batch["attention_mask_BT"][row].tolist() == [1] * length + [0] * (len(ids) - length)
        labels = batch["labels_BT"][row].tolist()
        assert labels[: len(prompt) - 1] == [IGNORED] * (len(prompt) - 1)
        assert labels[len(prompt) - 1 : length] == [*caption, task.eos_id]
        assert set(labels[length:]) <= {IGNORED}
    assert batch["input_ids_BT"].shape == batch["labels_BT"].shape
    assert batch["image_BCHW"].dtype == torch.uint8
    assert batch["index_B"].tolist() == list(range(len(TEXTS)))


def test_a_long_caption_is_cut_and_keeps_its_end() -> None:
    task = make_task(max_length=10)
    batch = task.batch(samples(["abcdefghijklmnopqrstuvwxyz"]))
    assert batch["input_ids_BT"].shape == (1, 10)
    assert batch["input_ids_BT"][0].tolist() == [task.start_id, *task.tokenizer.raw("abcdefghi")]
    assert batch["labels_BT"][0].tolist() == [*task.tokenizer.raw("abcdefghi"), task.eos_id]


def test_a_conversation_is_learned_from_its_first_question_and_answer() -> None:
    task = make_task(prompt={"template": "human_gpt", "instruction": "unused"})
    turns = (("human", "<image>\nWhat is it?"), ("gpt", "A dog."), ("human", "Sure?"))
    row = record("other", turns)
    assert task.pair(row) == ("What is it?", "A dog.")
    assert task.pair(record("other")) == ("unused", "other")
    assert task.pair(record("other", turns[1:])) == ("unused", "other")


def test_prompts_are_padded_on_the_left_and_equal_trainings() -> None:
    task = make_task(prompt={"template": "[{instruction}: ]"})
    ids, mask = task.prompts(["describe", "", "hm"])
    rows = ["describe: ", "", "hm: "]
    for row, text in enumerate(rows):
        want = [task.start_id, *task.tokenizer.raw(text)]
        assert ids[row, mask[row].bool()].tolist() == want
        assert mask[row].diff().min() >= 0  # zeros, then ones
        assert mask[row, -1] == 1


# --- what cannot be learned from


def record(caption: str, turns: tuple[tuple[str, str], ...] = ()) -> Row:
    return Row("k", (Path("x.jpg"),), caption, "i", "c", turns=turns)


def test_texts_that_leave_nothing_to_learn_are_bad_samples() -> None:
    task = make_task(max_length=12)
    task.usable(record("fine"))
    for empty in (record(""), record(" \n"), record("x", (("human", "hm"), ("gpt", " ")))):
        with pytest.raises(BadSample, match="no caption: it has no tokens"):
            task.usable(empty)
    talk = record("x", (("human", "q" * 11), ("gpt", "yes")))
    with pytest.raises(BadSample, match=r"prompt too long: 12 of model\.decoder\.max_length 12"):
        task.usable(talk)
    task.usable(record("x", (("human", "q" * 10), ("gpt", "yes"))))


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    make_task(prompt={"instruction": "x" * 28}, max_length=30)
    with pytest.raises(UserError, match=r"the prompt takes 29 tokens.*within 30") as caught:
        make_task(prompt={"instruction": "x" * 29}, max_length=30)
    assert caught.value.key == "model.decoder.max_length"


@pytest.mark.parametrize(
    ("prompt", "key", "told"),
    [
        ({"template": "{instruktion}: "}, "template", "has the field {instruktion}"),
        ({"template": "t5_plain_split_text"}, "template", "cuts captions ({head})"),
        ({"tokenize": "reference"}, "tokenize", "images in their midst"),
    ],
)
def test_prompts_that_are_none_for_captions_are_refused(
    prompt: dict[str, str], key: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_task(prompt=prompt)
    assert told in str(caught.value) and caught.value.key == f"data.prompt.{key}"


def test_a_decoder_that_reads_questions_is_refused() -> None:
    DECODERS["t5"] = DECODERS["t5_cross"]
    try:
        with pytest.raises(UserError, match="take causal or t5_cross; t5 reads questions") as error:
            make_task("t5")
    finally:
        del DECODERS["t5"]
    assert error.value.key == "model.decoder.name"


def test_a_sample_is_described_as_it_is_learned() -> None:
    task = make_task(prompt={"template": "[{instruction}: ]", "instruction": "say"})
    sample = samples(["a  dog"])[0]
    assert task.describe(sample) == ("say: ", "a dog")
    asked = record("a", (("human", "hm"), ("gpt", "x")))
    assert task.describe(replace(sample, row=asked)) == ("hm: ", "x")


# --- loss and gradients


def rows_one_by_one(task: CaptionTask, model: VisionLanguage, chosen: list[Sample]) -> Tensor:
    """The mean −log p of all captions' tokens, from whole logits of one row without padding."""
    losses = []
    for sample in chosen:
        ids = [task.start_id, *task.tokenizer.raw(sample.row.caption), task.eos_id]
        batch = task.batch([sample])
        image_BND = model.image_tokens(batch["image_BCHW"])
        text_BT = torch.tensor([ids[:-1]])
        hidden = model.decoder.hidden(DecoderInput(image_BND, text_BT, torch.ones_like(text_BT)))[0]
        weight, bias = model.decoder.head()
        logits = F.linear(hidden, weight, bias)
        smoothing = task.config.loss.language_model.label_smoothing
        for place, token in enumerate(ids[1:]):
            log_p = logits[place].log_softmax(0)
            losses.append(-(1 - smoothing) * log_p[token] - smoothing * log_p.mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_equals_rows_one_by_one_without_padding(name: str, smoothing: float) -> None:
    task = make_task(name, smoothing=smoothing)
    model = make_model(task).eval()
    loss = task.losses(task.features(model, task.batch(samples())))["loss"]
    loss.backward()
    got = tiny.gradients(model)
    want = rows_one_by_one(task, model, samples())
    want.backward()
    assert abs(loss.item() - want.item()) < 1e-11
    assert tiny.largest_error(got, tiny.gradients(model)) < 1e-9


def test_a_rank_without_supervised_tokens_gives_no_gradient_but_a_graph() -> None:
    task = make_task()
    model = make_model(task)
    batch = task.batch(samples())
    batch["labels_BT"] = torch.full_like(batch["labels_BT"], IGNORED)
    loss = task.losses(task.features(model, batch))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in tiny.gradients(model).values())


COUNTS = {1: [7], 2: [9, 5]}
ROWS = 3
KEEPS = (None, 0, 1, 99)  # None: the plain step


def make_batch(task: CaptionTask, counts: Sequence[int], rank: int) -> Batch:
    """The rows of a rank; ranks have texts of unlike lengths."""
    first = sum(counts[:rank])
    texts = [(TEXTS[n % 7] * (1 + rank))[:25] for n in range(first, first + counts[rank])]
    return task.batch(samples(texts, first))


def gradients_of_all(counts: Sequence[int]) -> list[tuple[float, dict[str, Tensor]]]:
    """(loss, gradients) on this rank of each decoder and step."""
    found = []
    for name in DECODERS:
        task = make_task(name)
        model = tiny.replicas(make_model(task))
        for keep in KEEPS:
            batch = make_batch(task, counts, collectives.rank()) | {"step": tiny.STEP}
            step = tiny.make_step(task, model, None if keep is None else ROWS, keep or 0)
            losses = step(batches.take(batch, slice(None)), tiny.STEP)
            found.append((float(losses["loss"]), tiny.gradients(model)))
    return found


def oracle(task: CaptionTask, counts: Sequence[int], rows: int) -> tuple[float, dict[str, Tensor]]:
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
            tokens += int((part["labels_BT"] != IGNORED).sum())
    loss = torch.stack(nll).sum() / tokens
    loss.backward()
    return float(loss.detach()), tiny.gradients(model)


@pytest.mark.parametrize("world", [1, 2])
def test_every_step_gives_the_gradients_of_all_ranks_tokens(world: int) -> None:
    counts = COUNTS[world]
    by_rank = run(gradients_of_all, world, counts) if world > 1 else [gradients_of_all(counts)]
    results = zip(*by_rank, strict=True)
    for name, keep in itertools.product(DECODERS, KEEPS):
        task = make_task(name)
        value, want = oracle(task, counts, max(counts) if keep is None else ROWS)
        ranks = next(results)
        told = f"{name} keep {keep}"
        assert abs(sum(rank[0] for rank in ranks) / world - value) < 1e-11, told
        for _, got in ranks:
            assert tiny.largest_error(got, want) < 1e-10, told


def test_no_step_holds_logits() -> None:
    task = make_task()
    features: Features = task.features(make_model(task), task.batch(samples()))
    shapes: dict[str, Any] = {name: tuple(v.shape) for name, v in features.per_sample.items()}
    assert shapes == {"nll_B": (7,), "tokens_B": (7,)}
