"""T5 with images in its text: against sequences built by hand, transformers' loss, and loops."""

import pytest
import torch
import torch.nn.functional as F

from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.losses.language_model import IGNORED
from engine.models.decoders import t5
from engine.models.decoders.language_model import DecoderInput
from engine.models.decoders.prefix import side_by_side
from engine.models.decoders.t5 import IMAGE_ID, splice
from engine.registry import find
from tests.models.decoders.nll import nll

VOCABULARY, WIDTH, TOKENS = 40, 16, 3
SIZES = {
    "model_type": "t5", "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0,
}  # fmt: skip
ROWS = {  # by where the images are
    "start": [IMAGE_ID, 5, 6, 7, 1],
    "middle": [8, 9, IMAGE_ID, 10, 1],
    "end": [11, 12, IMAGE_ID],
    "several": [IMAGE_ID, IMAGE_ID, 13, IMAGE_ID, 14, 1],
    "none": [15, 16, 1],
    "reference": [1, IMAGE_ID, 1],  # an end token for the empty texts around an image
}


def make(kind: str = "t5", **more):
    torch.manual_seed(0)
    section = Section(name="t5", config={**SIZES, "model_type": kind, **more})
    decoder = find("models/decoders", "t5").build(
        section, vocab_size=VOCABULARY, pad_id=0, eos_id=1
    )
    with torch.no_grad():  # random weights of 0.02 hardly look at anything
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return decoder.double().eval()


def make_prompts(names=tuple(ROWS)):
    rows = [ROWS[name] for name in names]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    count = sum(tokens.count(IMAGE_ID) for tokens in rows)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return image.requires_grad_(), ids, mask


def by_hand(table, image, names):
    """Each row's embeddings, token by token."""
    waiting, rows = list(image), []
    for name in names:
        row = []
        for token in ROWS[name]:
            row += list(waiting.pop(0)) if token == IMAGE_ID else [table[token]]
        rows.append(torch.stack(row))
    return rows


def test_spliced_rows_equal_those_built_by_hand() -> None:
    table = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    image, ids, mask = make_prompts()
    words = ids.clamp_min(0)
    for stray in (3, IMAGE_ID):  # in padding neither a word nor a mark counts
        got, got_mask = splice(table[words], DecoderInput(image, ids.where(mask == 1, stray), mask))
        want = by_hand(table, image, list(ROWS))
        assert got.shape[1] == max(map(len, want))
        for row, tokens in enumerate(want):
            assert torch.equal(got[row, : len(tokens)], tokens)
            assert not got[row, len(tokens) :].any()
            assert got_mask[row].tolist() == [1] * len(tokens) + [0] * (got.shape[1] - len(tokens))
    got.sum().backward()
    assert torch.equal(image.grad, torch.ones_like(image))


def test_other_numbers_of_images_than_marks_are_refused() -> None:
    image, ids, mask = make_prompts()
    with pytest.raises(ValueError, match="marks of 7 images, but 6 came"):
        splice(torch.zeros(*ids.shape, WIDTH), DecoderInput(image[1:], ids, mask))
    with pytest.raises(ValueError, match="rows have 3 images, but 7 came"):
        side_by_side(image, torch.tensor([1, 2]))


ANSWERS = [[4, 5, 1], [1], [6, 7, 8, 9, 1], [10, 1], [11, 1], [12, 13, 1]]


def make_labels(answers=ANSWERS):
    labels = torch.full((len(answers), max(map(len, answers))), IGNORED)
    for row, answer in enumerate(answers):
        labels[row, : len(answer)] = torch.tensor(answer)
    return labels


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_loss_and_gradients_equal_transformers_own(kind: str) -> None:
    decoder = make(kind)
    image, ids, mask = make_prompts()
    labels = make_labels()
    mine = nll(decoder, image, ids, mask, labels).sum() / (labels != IGNORED).sum()
    (got,) = torch.autograd.grad(mine, image)

    table = decoder.model.get_input_embeddings().weight
    rows = by_hand(table, image, list(ROWS))
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    there = torch.arange(embeds.shape[1]) < torch.tensor([[len(row)] for row in rows])
    own = decoder.model(inputs_embeds=embeds, attention_mask=there.long(), labels=labels).loss
    (want,) = torch.autograd.grad(own, image)
    torch.testing.assert_close(mine, own, rtol=1e-11, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_padding_and_other_rows_change_nothing() -> None:
    decoder = make()
    image, ids, mask = make_prompts()
    labels = make_labels()
    together, first = nll(decoder, image, ids, mask, labels), 0
    for row, name in enumerate(ROWS):
        count = ROWS[name].count(IMAGE_ID)
        own, text = image[first : first + count], torch.tensor([ROWS[name]])
        first += count
        answer = torch.tensor([ANSWERS[row]])
        alone = nll(decoder, own, text, torch.ones_like(text), answer)
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("layers", [2, 3])  # of the decoder; the encoder has two
def test_greedy_with_a_cache_equals_full_recomputing(layers: int) -> None:
    decoder = make(num_decoder_layers=layers)
    image, ids, mask = make_prompts()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = decoder.generate(DecoderInput(image, ids, mask), **options)
    table = decoder.model.get_input_embeddings().weight
    different = set()
    for row, tokens in enumerate(by_hand(table, image, list(ROWS))):
        said = [decoder.start_id]
        for _ in range(5):
            logits = decoder.model(
                inputs_embeds=tokens[None], decoder_input_ids=torch.tensor([said])
            ).logits
            said.append(int(logits[0, -1].argmax()))
        assert got[row].tolist() == said[1:]
        different.add(tuple(said))
    assert len(different) > 2
    beams = decoder.generate(DecoderInput(image, ids, mask), **options | {"num_beams": 3})
    assert beams.shape == (len(ROWS), 5)


@pytest.mark.parametrize(
    ("kind", "answers", "projected"),
    [("t5", 6, []), ("t5", 60, [3, 3]), ("mt5", 60, [3, 3]), ("umt5", 6, [6, 6])],
)
def test_answers_weighed_after_one_encoding_equal_single_ones(kind, answers, projected) -> None:
    """And gradients; of few answers no keys are made, of many those of each prompt, not answer."""
    decoder = make(kind, feed_forward_proj="gated-gelu")
    image, ids, mask = make_prompts(["several", "none", "start"])
    known = decoder.prefill(DecoderInput(image, ids, mask))
    rows = torch.tensor([2, 0, 1, 0, 2, 2] * (answers // 6))
    labels = make_labels(ANSWERS * (answers // 6))
    made: list[int] = []
    for block in decoder.model.decoder.block:
        key = block.layer[1].EncDecAttention.k
        key.register_forward_hook(lambda module, given, out: made.append(len(given[0])))
    got = decoder.nll_after(known, rows, labels)
    assert made == projected
    owners = [image[:3], image[:0], image[3:]]
    want = []
    for i, row in enumerate(rows.tolist()):
        text = ids[row : row + 1, : int(mask[row].sum())]
        answer = torch.tensor([ANSWERS[i % 6]])
        want.append(nll(decoder, owners[row], text, torch.ones_like(text), answer))
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-12, atol=1e-12)
    asked = [image, *decoder.parameters()]
    grads = (torch.autograd.grad(x.sum(), asked) for x in (got, torch.cat(want)))
    for one, other in zip(*grads, strict=True):  # T5's norm is in fp32 whatever comes in
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_weights_that_lie_elsewhere_are_left_to_transformers() -> None:
    """Adapted ones are asked; those in parts on other ranks, and in training, go the plain way."""
    decoder = make()
    assert t5.shares_memory(decoder.model)
    assert not t5.shares_memory(decoder.train().model)
    decoder.eval().model.decoder.block[0].layer[1].EncDecAttention.v.weight.data = torch.empty(0)
    assert not t5.shares_memory(decoder.model)


def test_the_fused_activation_is_transformers_own() -> None:
    decoder = make(feed_forward_proj="gated-gelu")
    plain = type(decoder.model)(decoder.model.config).double().eval()
    plain.load_state_dict(decoder.model.state_dict())
    kinds = [
        {type(m.act) for m in model.modules() if hasattr(m, "act")}
        for model in (decoder.model, plain)
    ]
    assert kinds[0] == {torch.nn.GELU} and not kinds[0] & kinds[1]
    ids = torch.tensor([[5, 6, 7, 1]])
    got, want = (model(input_ids=ids, labels=ids).logits for model in (decoder.model, plain))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_answer_is_not_seen_by_the_question() -> None:
    """Each step's probabilities hang on what was said before it alone."""
    decoder = make()
    image, ids, mask = make_prompts(["start"])
    known = decoder.prefill(DecoderInput(image, ids, mask))
    labels = torch.tensor([[4, 5, 6, 1]])
    steps = [
        F.pad(labels[:, : n + 1], (0, 3 - n), value=IGNORED) for n in range(4)
    ]  # Σ up to token n
    sums = torch.cat([decoder.nll_after(known, torch.tensor([0]), step) for step in steps])
    other = labels.clone()
    other[0, 3] = 9
    again = decoder.nll_after(known, torch.tensor([0]), other)
    assert (sums.diff() > 0).all()
    assert (again - sums[3]).abs() > 1e-3
    cut = other.clone()
    cut[0, 3] = IGNORED
    torch.testing.assert_close(decoder.nll_after(known, torch.tensor([0]), cut), sums[2:3])


def test_other_families_are_named() -> None:
    with pytest.raises(UserError, match="t5 takes models of the families") as error:
        find("models/decoders", "t5").build(
            Section(name="t5", config={"model_type": "bart"}), vocab_size=40, pad_id=0, eos_id=1
        )
    assert error.value.key == "model.decoder.config.model_type"


def test_recomputing_activations_gives_the_same_gradients() -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        section = Section(name="t5", config=SIZES, gradient_checkpointing=again)
        decoder = find("models/decoders", "t5").build(
            section, vocab_size=VOCABULARY, pad_id=0, eos_id=1
        )
        image, ids, mask = make_prompts()
        nll(decoder.double().train(), image, ids, mask, make_labels()).sum().backward()
        found.append([image.grad, *(p.grad for p in decoder.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path) -> None:
    make().model.float().save_pretrained(tmp_path)
    section = Section(name="t5", tag=str(tmp_path), pretrained=True)
    build = find("models/decoders", "t5").build
    loaded = build(section, vocab_size=VOCABULARY, pad_id=0, eos_id=1)
    assert all(
        torch.equal(one, other)
        for one, other in zip(loaded.parameters(), make().float().parameters(), strict=True)
    )
    with pytest.raises(UserError, match=r"has 41 ids but decoder .* knows only 40") as error:
        build(section, vocab_size=VOCABULARY + 1, pad_id=0, eos_id=1)
    assert error.value.key == "model.decoder.tokenizer"
