"""Labels as texts: equal ones put together, ranked, the same whatever shares their batch."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine.config.schema import Generate
from engine.errors import UserError
from engine.generate import labels as search
from engine.generate.label_search import Found, label_log_probs
from engine.generate.labels import (
    Label,
    attention_maps,
    check,
    encode_prompt,
    grid,
    ranked,
    recognise,
)
from engine.logs.gallery import weight_map
from tests.generate.labeller import labeller

IMAGES = torch.randint(
    256, (3, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
)
ONE_SHOT = {"method": "one_shot", "num_labels": 40}


def by(section: dict, images=IMAGES, rows=None):
    task, model = labeller()
    encoded = encode_prompt(task, model, images)
    return recognise(task, model, encoded, Generate(**section), rows=rows)


def test_probabilities_of_labels_are_those_of_the_same_labels_given() -> None:
    task, model = labeller()
    encoded = encode_prompt(task, model, IMAGES)
    told = 0
    for row, labels in enumerate(recognise(task, model, encoded, Generate(**ONE_SHOT))):
        probs = [label.prob for label in labels]
        assert probs == sorted(probs, reverse=True)
        for label in labels:
            if " " + label.text == task.tokenizer.decode(list(label.ids)) or not label.text:
                continue
            given = (*label.ids, task.separator_id)
            own = label_log_probs(model.decoder, encoded.state, [given], rows=1)
            assert label.prob >= exp(float(own[row, 0])) - 1e-12  # of several spellings the sum
            told += 1
    assert told > 5
    some = ["dog", "red cat", "a"]
    log_p_BK = label_log_probs(model.decoder, encoded.state, list(map(task.text.ids, some)), rows=2)
    for row in range(3):
        for column, label in enumerate(some):  # token by token, each image alone, nothing cached
            ids = [*task.prompt_ids().tolist(), *task.tokenizer.raw(f" {label},")]
            batch = {
                "input_ids_BT": torch.tensor([ids]),
                "attention_mask_BT": torch.ones(1, len(ids), dtype=torch.int64),
                "segment_BT": torch.zeros(1, len(ids), dtype=torch.int64),
                "position_BT": torch.arange(len(ids))[None],
            }
            image_1ND = model.image_tokens(IMAGES[row : row + 1])
            hidden = model.decoder.label_hidden(image_1ND, batch)[0]
            log_p = model.decoder.log_probs(hidden)
            places = range(len(task.prompt_ids()), len(ids))
            want = sum(float(log_p[place - 1, ids[place]]) for place in places)
            assert float(log_p_BK[row, column]) == pytest.approx(want, abs=1e-9)


FOUND = [Found((104, 105), -1.0), Found((36, 104, 105), -0.5), Found((70,), -0.7), Found((2,), 0.0)]


WORDS = {(104, 105): "hi", (36, 104, 105): "hi", (70,): "no", (2,): ""}


class Spelling:
    """Token 36 is a space, so that two of the labels are spelled alike; 2 is a special one."""

    class tokenizer:  # noqa: N801  as the task has it
        @staticmethod
        def decode(ids):
            return WORDS[tuple(ids)]


def put_together(rank: str) -> list[Label]:
    table = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    image = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    return ranked(search._labels(Spelling, FOUND, rank, image, table), rank)


def test_equal_labels_are_one_with_the_sum_of_their_probabilities() -> None:
    both, other = exp(-1.0) + exp(-0.5), exp(-0.7)
    (first, second) = put_together("prob")
    assert (first.text, first.prob, first.score) == ("hi", pytest.approx(both), first.prob)
    assert first.ids == (36, 104, 105)  # the likelier spelling
    assert (second.text, second.prob) == ("no", pytest.approx(other))


def test_perplexity_ranks_the_lowest_first() -> None:
    (first, second) = put_together("ppl")
    # −log p over the label's tokens and the separator; of two spellings the lower one
    assert first.score == pytest.approx(exp(0.5 / 4)) and first.text == "hi"
    assert second.score == pytest.approx(exp(0.7 / 2))


def test_similarity_is_by_the_mean_distance_of_unit_vectors() -> None:
    table = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    image = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    want = {}
    for ids in ((104, 105), (36, 104, 105), (70,)):
        distances = [
            (F.normalize(a, dim=0) - F.normalize(table[i], dim=0)).norm() / 2
            for a in image
            for i in ids
        ]
        score = float(1 - torch.stack(distances).mean())
        text = WORDS[ids]
        want[text] = max(want.get(text, -1.0), score)
    found = put_together("sim")
    assert {label.text: label.score for label in found} == pytest.approx(want, abs=1e-6)
    assert [label.text for label in found] == sorted(want, key=want.__getitem__, reverse=True)


def test_none_leaves_labels_as_they_were_found() -> None:
    assert [label.text for label in put_together("none")] == ["hi", "no"]
    assert put_together("none")[0].ids == (104, 105)


@pytest.mark.parametrize(
    "section",
    [ONE_SHOT, {"method": "one_shot", "num_labels": 9, "first_tokens": 40, "label_rows": 7},
     {"method": "greedy", "num_labels": 9}, {"method": "beam", "num_beams": 12, "num_labels": 9},
     {"method": "sample", "num_samples": 30, "top_p": 0.9, "seed": 4}],
)  # fmt: skip
def test_labels_do_not_hang_on_what_shares_their_batch(section: dict) -> None:
    together = by(section, rows=[7, 3, 5])
    assert sum(map(len, together)) > 6
    for place, row in enumerate([7, 3, 5]):
        (alone,) = by(section, IMAGES[place : place + 1], rows=[row])
        assert [label.text for label in alone] == [label.text for label in together[place]]
        probs = [label.prob for label in together[place]]
        assert [label.prob for label in alone] == pytest.approx(probs, abs=1e-12)


def test_greedy_and_one_shot_find_the_same_independent_labels() -> None:
    one_by_one = by({"method": "greedy", "num_labels": 12})
    at_once = by({"method": "one_shot", "num_labels": 12})
    for some, others in zip(one_by_one, at_once, strict=True):
        assert [label.text for label in some] == [label.text for label in others]
        probs = [label.prob for label in others]
        assert [label.prob for label in some] == pytest.approx(probs, abs=1e-12)


def test_a_label_is_as_long_as_the_run_allows_at_most() -> None:
    task, _ = labeller()
    assert task.room() == 12 - len(task.prompt_ids())
    assert search.label_room(task, Generate()) == task.room()
    assert search.label_room(task, Generate(max_new_tokens=2)) == 2
    assert search.label_room(task, Generate(max_new_tokens=99)) == task.room()
    for labels in by(ONE_SHOT | {"max_new_tokens": 2}):
        assert all(len(label.ids) == 1 for label in labels)


@pytest.mark.parametrize(
    ("section", "key", "told"),
    [
        ({"method": "beam", "num_beams": 40}, "num_beams", "40 is more than the 39 tokens"),
        ({"method": "greedy", "num_labels": 40}, "num_labels", "40 is more than the 39 tokens"),
        ({"method": "one_shot", "first_tokens": 9}, "first_tokens", "9 begin fewer .*labels 10"),
        ({"method": "sample", "num_samples": 9}, "num_samples", "9 draw fewer .*labels 10"),
        ({"method": "one_shot", "max_new_tokens": 1}, "max_new_tokens", "separator alone"),
    ],
)
def test_what_can_find_no_labels_or_too_few_is_refused(section, key: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        check(Generate(**section), 40)
    assert caught.value.key == f"generate.{key}"
    check(Generate(**section | {key: 10}), 40)


def test_autocast_leaves_the_head_and_likeness_in_full_precision() -> None:
    task, model = labeller()
    model.float()
    encoded = encode_prompt(task, model, IMAGES)
    table = model.decoder.head()[0]
    want = (encoded.state.last_BD @ table.T).log_softmax(-1)
    labels = [(104, 105), (70,), (36, 99, 7)]
    near = search.similarities(encoded.image_BND[0], labels, table)
    given = [(*ids, task.separator_id) for ids in labels]
    log_p = label_log_probs(model.decoder, encoded.state, given, rows=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.decoder.log_probs(encoded.state.last_BD) - want).abs().max() < 1e-4
        assert torch.equal(search.similarities(encoded.image_BND[0], labels, table), near)
        cast = label_log_probs(model.decoder, encoded.state, given, rows=2)
    assert cast.dtype == torch.float32 and 0 < (cast - log_p).abs().max() < 0.5  # of the blocks


def test_a_model_in_bf16_has_log_probs_by_logits_in_fp32() -> None:
    task, model = labeller()
    decoder = model.bfloat16().decoder
    state = encode_prompt(task, model, IMAGES).state
    ids_BK = torch.tensor([[104, 105]]).expand(3, -1)
    place_BK = state.num_text + torch.tensor([[0, 1]]).expand(3, -1)
    hidden_BKD = decoder.extend(state.fork(), ids_BK, torch.ones_like(ids_BK), place_BK)
    states = torch.cat([state.last_BD[:, None], hidden_BKD], dim=1)
    want = (states.double() @ decoder.head()[0].double().T).log_softmax(-1)
    got = decoder.log_probs(states)
    assert states.dtype == torch.bfloat16 and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    label = (104, 105, task.separator_id)
    log_p_B1 = label_log_probs(decoder, state, [label], rows=1)
    sums = sum(want[:, place, token] for place, token in enumerate(label))
    torch.testing.assert_close(log_p_B1[:, 0].double(), sums, rtol=1e-5, atol=1e-5)


# --- where labels looked: the weights that transformers' own attention gives, averaged

WIDE_IMAGE = torch.randint(
    256, (1, 3, 2, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
)


def test_maps_are_the_mean_weights_of_each_labels_tokens() -> None:
    task, model = labeller()
    labels = [(104, 105, 110), (70,), (99, 33)]
    maps = attention_maps(task, model, WIDE_IMAGE, labels)
    assert maps.shape == (3, 2, 4)
    base = model.decoder.base[0]
    assert base.config._attn_implementation == "sdpa"
    image_BND = model.image_tokens(WIDE_IMAGE)
    head = task.prompt_ids()
    model.decoder.model.set_attn_implementation("eager")
    for label, found in zip(labels, maps, strict=True):
        ids = torch.tensor([[*head.tolist(), *label]])
        embeds = torch.cat([image_BND, model.decoder.model.get_input_embeddings()(ids)], dim=1)
        length = embeds.shape[1]
        sees = torch.ones(length, length).tril().bool()
        sees[:8, :8] = True
        mask = torch.zeros(length, length).double().masked_fill(~sees, -1e30)[None, None]
        out = base(inputs_embeds=embeds, attention_mask=mask, output_attentions=True)
        weights = torch.stack(out.attentions)[:, 0]  # blocks, heads, queries, keys
        want = weights[:, :, -len(label) :, :8].mean((0, 1, 2)).view(2, 4)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-7)
    assert 0 < float(maps.sum(dim=(1, 2)).max()) <= 1
    assert attention_maps(task, model, WIDE_IMAGE, []).shape[0] == 0


@pytest.mark.parametrize(
    ("tokens", "ratio", "want"),
    [(16, 1.0, (4, 4)), (256, 1.0, (16, 16)), (32, 0.5, (4, 8)), (32, 2.0, (8, 4)),
     (7, 0.5, (1, 7))],
)  # fmt: skip
def test_a_grid_has_the_images_form(tokens: int, ratio: float, want: tuple[int, int]) -> None:
    assert grid(tokens, ratio) == want


def test_a_picture_glows_where_the_weight_is() -> None:
    weight = np.zeros((4, 4), dtype=np.float32)
    weight[0, 3] = 0.4
    picture = weight_map(Image.new("RGB", (64, 32), "grey"), weight, "a label  0.123")
    assert picture.size == (448, 224 + 34)
    pixels = np.asarray(picture).astype(int)
    changed = np.abs(pixels[:224] - 128).sum(-1)
    assert changed[:50, 360:].min() > 60 and changed[120:, :200].max() < 12
    flat = weight_map(Image.new("RGB", (64, 32), "grey"), np.ones((4, 4)), "x" * 500)
    assert (np.asarray(flat)[:224] == 128).all()
