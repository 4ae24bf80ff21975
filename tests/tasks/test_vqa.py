"""The VQA task: batches by hand, what is skipped, and gradients against rows one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import schema
from engine.config.schema import Decoder
from engine.data.text import bytes as byte_tokenizer
from engine.dist import collectives
from engine.errors import UserError
from engine.losses.language_model import IGNORED
from engine.models.decoders.language_model import DecoderInput
from engine.models.decoders.t5 import IMAGE_ID
from engine.models.vision_language import VisionLanguage
from engine.registry import find
from engine.tasks.vqa import VqaTask
from engine.train import rng
from engine.train.steps import batches
from engine.types import BadSample, Batch, Row, Sample
from tests.distributed import run
from tests.tasks.test_caption import DECODERS as CAPTIONERS
from tests.tasks.test_caption import Image
from tests.train import tiny

DECODERS = {"causal": CAPTIONERS["causal"], "t5": CAPTIONERS["t5_cross"]}
TOKENS = 4  # of an image


def make_task(
    name: str = "t5", template: str = "{question}? ", max_length: int = 40, **prompt: str
) -> VqaTask:
    config = schema.Config(
        runner=schema.Runner(seed=tiny.SEED),
        data=schema.Data(prompt=schema.Prompt(template=template, **prompt)),
        model=schema.Model(
            decoder=Decoder(name=name, config=DECODERS[name], max_length=max_length)
        ),
        transforms={"train_transforms": ["resize"], "resize": {"size": [2, 2]}},
    )
    return VqaTask(config, byte_tokenizer.build(schema.Tokenizer(name="bytes")))


class WithNorm(Image):
    """The same behind a batch norm, of which a blank image must leave no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def tokens(self, image_BCHW: Tensor, layer: int) -> Tensor:
        return super().tokens(self.norm(image_BCHW), layer)


def make_model(task: VqaTask, image: type[Image] = Image) -> VisionLanguage:
    section, tokenizer = task.config.model.decoder, task.tokenizer
    with rng.isolated(0, tiny.CPU):
        decoder = find("models/decoders", section.name).build(
            section, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, eos_id=task.eos_id
        )
        task.start_id = decoder.start_id
        model = VisionLanguage(
            image(), nn.Linear(6, decoder.width), decoder, layer=-1, keep_prefix=True,
            label_smoothing=0.0, mean=[0.4] * 3, std=[0.3] * 3,
        )  # fmt: skip
    return model.double().train()


ASKED = [("why", "no"), ("what is it", "two cats"), ("x", "y"), ("how many", "3"), ("is it", "yes")]


def samples(counts: Sequence[int], first: int = 0) -> list[Sample]:
    """A sample for each number of images."""
    generator = torch.Generator().manual_seed(first)
    made = []
    for n, count in enumerate(counts, first):
        size = (max(1, count), 3, 2, 2)
        images = list(torch.randint(256, size, dtype=torch.uint8, generator=generator))[:count]
        question, answer = ASKED[n % len(ASKED)]
        turns = (("human", question), ("gpt", answer))
        made.append(Sample(Row(f"k{n}", (b"",) * count, turns=turns), tuple(images), 0, n))
    return made


# --- batches


def spelled(task: VqaTask, *parts: str | int) -> list[int]:
    return [i for p in parts for i in ([p] if isinstance(p, int) else task.tokenizer.raw(p))]


@pytest.mark.parametrize("tokenize", ["clean", "reference"])
def test_a_batch_of_encoded_questions_by_hand(tokenize: str) -> None:
    task = make_task(tokenize=tokenize)
    end = task.eos_id
    chunk = [end] if tokenize == "reference" else []
    batch = task.batch(samples([1, 0, 2]))
    want = [
        spelled(task, *chunk, IMAGE_ID, "\nwhy? ", end),
        spelled(task, "what is it? ", end),
        spelled(task, *chunk, IMAGE_ID, "\n", *chunk, IMAGE_ID, "\nx? ", end),
    ]
    for row, ids in enumerate(want):
        rest = batch["input_ids_BT"].shape[1] - len(ids)
        assert batch["input_ids_BT"][row].tolist() == ids + [task.tokenizer.pad_id] * rest
        assert batch["attention_mask_BT"][row].tolist() == [1] * len(ids) + [0] * rest
        answer = [*task.tokenizer.raw(ASKED[row][1]), end]
        labels = batch["labels_BL"][row].tolist()
        assert labels == answer + [IGNORED] * (len(labels) - len(answer))
    assert batch["image_BKCHW"].shape == (3, 2, 3, 2, 2)
    assert batch["image_BKCHW"].dtype == torch.uint8
    assert batch["num_images_B"].tolist() == [1, 0, 2]
    assert batch["index_B"].tolist() == [0, 1, 2]
    prompts = task.prompt_batch(samples([1, 0, 2]))
    same = ["input_ids_BT", "attention_mask_BT", "image_BKCHW", "num_images_B"]
    assert all(torch.equal(prompts[name], batch[name]) for name in same)
    ids, mask = task.prompts(["why", "what is it", "x"], [1, 0, 2])
    assert torch.equal(ids, batch["input_ids_BT"])
    assert torch.equal(mask, batch["attention_mask_BT"])


def test_a_batch_of_texts_to_go_on_with_by_hand() -> None:
    task = make_task("causal")
    batch = task.batch(samples([1, 0, 2]))
    for row, (question, answer) in enumerate(ASKED[:3]):
        before = [task.start_id, *task.tokenizer.raw(f"{question}? ")]
        after = [*task.tokenizer.raw(answer), task.eos_id]
        ids = batch["input_ids_BT"][row, batch["attention_mask_BT"][row].bool()].tolist()
        assert ids == [*before, *after[:-1]]
        labels = batch["labels_BT"][row].tolist()
        rest = len(labels) - len(ids)
        assert labels == [IGNORED] * (len(before) - 1) + after + [IGNORED] * rest
    prompts = task.prompt_batch(samples([1, 0, 2]))
    for row, (question, _) in enumerate(ASKED[:3]):
        mask = prompts["attention_mask_BT"][row]
        assert mask.diff().min() >= 0  # on the left
        want = [task.start_id, *task.tokenizer.raw(f"{question}? ")]
        assert prompts["input_ids_BT"][row, mask.bool()].tolist() == want


def test_images_go_as_they_do_for_captions_where_each_row_has_one() -> None:
    task = make_task()
    assert task.batch(samples([1, 1]))["image_BCHW"].shape == (2, 3, 2, 2)
    assert task.batch(samples([0, 0]))["image_BKCHW"].shape == (2, 0, 3, 2, 2)
    assert task.batch(samples([2, 2]))["num_images_B"].tolist() == [2, 2]


def test_earlier_turns_are_part_of_the_question() -> None:
    turns = (
        ("human", "<image> a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), ("human", "e"),
    )  # fmt: skip
    sample = samples([1])[0]
    sample = replace(sample, row=replace(sample.row, turns=turns[:4]))
    for name in DECODERS:
        task = make_task(name)
        prompt, learned = task.describe(sample)
        assert prompt.replace("<image>\n", "") == "a? b c? " and learned == "d"
        open_end = task.prompt_batch([replace(sample, row=replace(sample.row, turns=turns))])[
            "input_ids_BT"
        ][0].tolist()
        text = "a? b c? d e? "
        want = (
            [IMAGE_ID, *task.tokenizer.raw(f"\n{text}"), task.eos_id]
            if name == "t5"
            else [task.start_id, *task.tokenizer.raw(text)]
        )
        assert open_end == want


# --- what cannot be used


def record(question: str, answer: str | None = "yes", images: int = 1) -> Row:
    turns = (("human", question),) if answer is None else (("human", question), ("gpt", answer))
    return Row("k", (b"",) * images, "x", "i", "c", turns=turns)


BAD = [
    (record("<image><image>"), "image count: 2 <image> in the text, 1 given"),
    (record("q", None), "no answer: the conversation ends with a question"),
    (record("q", " "), "no answer: it has no tokens"),
    (replace(record("q"), turns=(("human", "a"), ("human", "b"))), "no answer: the conversation"),
    (
        replace(record("q"), turns=(("human", "a"), ("human", "b"), ("gpt", "c"))),
        "malformed: turn 2: human speaks after human",
    ),
]


@pytest.mark.parametrize("name", DECODERS)
def test_what_cannot_be_learned_from_is_a_bad_sample(name: str) -> None:
    task = make_task(name, max_length=10)
    task.usable(record("q"))
    task.usable(record("q", images=0))
    task.askable(record("q", None))
    for bad, told in BAD:
        with pytest.raises(BadSample) as caught:
            task.usable(bad)
        assert str(caught.value).startswith(told)
    with pytest.raises(BadSample, match="image count"):
        task.askable(BAD[0][0])


@pytest.mark.parametrize(
    ("name", "fits", "told"),
    [
        # answer and end; a mark, a line's end and "q? " stand in the prompt
        ("t5", 9, r"answer too long: 11 tokens, model.decoder.max_length 10"),
        # start and "q? " before the answer
        ("causal", 6, r"answer too long: 8 tokens after 4, model.decoder.max_length 10"),
    ],
)
def test_an_answer_is_never_cut(name: str, fits: int, told: str) -> None:
    task = make_task(name, max_length=10)
    task.usable(record("q", "a" * fits))
    assert task.room(task.prompts(["q"])[0]) == (10 if name == "t5" else 6)
    with pytest.raises(BadSample, match=told):
        task.usable(record("q", "a" * (fits + 1)))


@pytest.mark.parametrize(("name", "fits"), [("t5", 5), ("causal", 6)])
def test_a_prompt_that_is_too_long_is_told(name: str, fits: int) -> None:
    task = make_task(name, max_length=10)
    task.askable(record("q" * fits))
    with pytest.raises(BadSample, match=r"prompt too long: 1\d of model.decoder.max_length 10"):
        task.askable(record("q" * (fits + 1)))


@pytest.mark.parametrize(
    ("arguments", "key", "told"),
    [
        ({"name": "t5_cross"}, "model.decoder.name", "take causal or t5; t5_cross reads no"),
        ({"name": "t5_cros"}, "model.decoder.name", "did you mean 't5_cross'"),
        ({"template": "plain"}, "data.prompt.template", "asks no question; take vqa_plain"),
        ({"template": "{questoin}"}, "data.prompt.template", "has the field {questoin}"),
        (
            {"name": "causal", "tokenize": "reference"}, "data.prompt.tokenize",
            "decoder 'causal' has its images before the text",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments: dict[str, str], key: str, told: str, monkeypatch) -> None:
    for other in ("t5_cross", "t5_cros"):
        monkeypatch.setitem(DECODERS, other, DECODERS["t5"])
    with pytest.raises(UserError) as caught:
        make_task(**arguments)
    assert told in str(caught.value) and caught.value.key == key


def test_a_template_of_captions_makes_it_a_task_of_captions() -> None:
    assert make_task().modalities == ("image", "answer")
    task = make_task(template="t5_plain")
    assert task.modalities == ("image", "caption")
    sample = samples([1])[0]
    caption = replace(sample, row=replace(sample.row, turns=(), caption="a  cat"))
    batch = task.batch([caption])
    assert batch["input_ids_BT"].tolist() == [[IMAGE_ID, task.eos_id]]
    assert batch["labels_BL"].tolist() == [[*task.tokenizer.raw("a cat"), task.eos_id]]


# --- loss and gradients


def rows_one_by_one(task: VqaTask, model: VisionLanguage, chosen: list[Sample]) -> Tensor:
    """The mean −log p of all answers' tokens: transformers' model on embeddings put together."""
    losses, lm = [], model.decoder.model
    table = lm.get_input_embeddings()
    for sample in chosen:
        images = list(sample.images)
        (_, question), (_, answer) = sample.row.turns
        words = task.tokenizer.raw(f"{question}? ")
        said = torch.tensor([*task.tokenizer.raw(answer), task.eos_id])
        seen = [model.image_tokens(image[None])[0] for image in images]
        if task.encodes_prompt:
            line = table(torch.tensor(task.tokenizer.raw("\n")))
            parts = [part for tokens in seen for part in (tokens, line)]
            text = table(torch.tensor([*words, task.eos_id]))
            embeds = torch.cat([*parts, text])[None]
            logits = lm(inputs_embeds=embeds, labels=said[None]).logits[0]
        else:
            text = torch.tensor([task.start_id, *words, *said[:-1]])
            prefix = torch.cat([*seen, table(text)[:0]])[None]
            hidden = model.decoder.hidden(
                DecoderInput(prefix, text[None], torch.ones_like(text)[None])
            )
            logits = F.linear(hidden[0, len(words) :], model.decoder.head()[0])
        losses.append(F.cross_entropy(logits, said, reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 0, 1, 3, 0], [0, 0]])
@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_equals_rows_one_by_one(name: str, counts: list[int]) -> None:
    task = make_task(name)
    model = make_model(task).eval()
    loss = task.losses(task.features(model, task.batch(samples(counts))))["loss"]
    loss.backward()
    got = tiny.gradients(model)
    want = rows_one_by_one(task, model, samples(counts))
    want.backward()
    assert abs(loss.item() - want.item()) < 1e-11
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for parameter, gradient in got.items():
        wanted = expected.get(parameter)
        assert wanted is not None or not any(counts), parameter
        assert (gradient - (0 if wanted is None else wanted)).abs().max() < 1e-9, parameter


def test_a_blank_image_leaves_no_trace() -> None:
    task = make_task()
    model = make_model(task, WithNorm)
    before = [buffer.clone() for buffer in model.buffers()]
    model(task.batch(samples([0, 0])))["nll_B"].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(m.training for m in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert name.startswith("decoder.") or not parameter.grad.any(), name


WORLDS = {1: [[1, 0, 2, 1, 0, 0, 1]], 2: [[1, 2, 0, 1, 1], [0, 0, 0, 0]]}  # images of each row
ROWS = 2
KEEPS = (None, 0, 1, 99)  # None: the plain step


def make_batch(task: VqaTask, counts: list[list[int]], rank: int) -> Batch:
    return task.batch(samples(counts[rank], sum(map(len, counts[:rank]))))


def gradients_of_all(counts: list[list[int]]) -> list[tuple[float, dict[str, Tensor]]]:
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


def oracle(task: VqaTask, counts: list[list[int]], rows: int) -> tuple[float, dict[str, Tensor]]:
    """One process and one graph over all ranks' rows, with the draws of each sub-batch."""
    model, parts = make_model(task), -(-max(map(len, counts)) // rows)
    nll, tokens = [], 0
    for rank in range(len(counts)):
        batch = make_batch(task, counts, rank)
        for j, chosen in enumerate(tiny.row_sets(batch, parts, sort=parts > 1)):
            part = {name: v[chosen] for name, v in batch.items() if isinstance(v, Tensor)}
            longest = int(part["attention_mask_BT"].sum(1).max())
            part |= {name: v[:, :longest] for name, v in part.items() if name.endswith("_BT")}
            with rng.isolated(rng.derive(tiny.SEED, tiny.STEP, rank, j), tiny.CPU):
                nll.append(model(part)["nll_B"].sum())
            labels = part["labels_BL" if task.encodes_prompt else "labels_BT"]
            tokens += int((labels != IGNORED).sum())
    loss = torch.stack(nll).sum() / tokens
    loss.backward()
    return float(loss.detach()), tiny.gradients(model)


@pytest.mark.parametrize("world", [1, 2])
def test_every_step_gives_the_gradients_of_all_ranks_tokens(world: int) -> None:
    """On two ranks the second one has no image at all, nor has any of its sub-batches."""
    counts = WORLDS[world]
    by_rank = run(gradients_of_all, world, counts) if world > 1 else [gradients_of_all(counts)]
    results = zip(*by_rank, strict=True)
    for name, keep in itertools.product(DECODERS, KEEPS):
        task = make_task(name)
        value, want = oracle(task, counts, max(map(len, counts)) if keep is None else ROWS)
        assert any(want[key].any() for key in want if key.startswith("image_encoder."))
        ranks = next(results)
        told = f"{name} keep {keep}"
        assert abs(sum(rank[0] for rank in ranks) / world - value) < 1e-11, told
        for _, got in ranks:
            assert tiny.largest_error(got, want) < 1e-10, told
