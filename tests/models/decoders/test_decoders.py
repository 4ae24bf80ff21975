"""Decoders: what they see, what they lose, what they say — against loops and full recomputing."""

import pytest
import torch
import torch.nn.functional as F

from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.losses.language_model import IGNORED
from engine.models.decoders.language_model import DecoderInput
from engine.registry import find
from tests.models.decoders.nll import nll

VOCABULARY, WIDTH, IMAGE = 40, 16, 5
SIZES = {
    "t5_cross": {
        "model_type": "t5", "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 3,
        "num_decoder_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 24,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "opt": {
        "model_type": "opt", "hidden_size": WIDTH, "num_hidden_layers": 2, "ffn_dim": 32,
        "num_attention_heads": 2, "max_position_embeddings": 24, "word_embed_proj_dim": WIDTH,
        "dropout": 0.0,
    },
    "llama": {
        "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
    },
    "mpt": {
        "model_type": "mpt", "d_model": WIDTH, "n_layers": 2, "n_heads": 2, "max_seq_len": 64,
    },
}  # fmt: skip
FAMILIES = list(SIZES)


def make(family: str, seed: int = 0):
    torch.manual_seed(seed)
    name = "t5_cross" if family == "t5_cross" else "causal"
    section = Section(name=name, config=SIZES[family], max_length=24)
    decoder = find("models/decoders", name).build(
        section, vocab_size=VOCABULARY, pad_id=0, eos_id=1
    )
    with torch.no_grad():  # random weights of 0.02 hardly look at anything
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return decoder.double().eval()


def make_texts(rows: int = 3):
    generator = torch.Generator().manual_seed(1)
    lengths = [6, 4, 5][:rows]
    ids = torch.zeros(rows, max(lengths), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
        labels[row, 1:length] = torch.randint(3, VOCABULARY, (length - 1,), generator=generator)
    image = torch.randn(rows, IMAGE, WIDTH, generator=generator, dtype=torch.float64)
    return image, ids, mask, labels


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_other_rows_change_nothing(family: str) -> None:
    decoder = make(family)
    image, ids, mask, labels = make_texts()
    got = nll(decoder, image, ids, mask, labels)
    for row in range(3):
        length = int(mask[row].sum())
        alone = nll(
            decoder, image[row : row + 1], ids[row : row + 1, :length],
            mask[row : row + 1, :length], labels[row : row + 1, :length],
        )  # fmt: skip
        torch.testing.assert_close(got[row : row + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_sees_the_image_and_what_precedes_it(family: str) -> None:
    decoder = make(family)
    image, ids, mask, _ = make_texts()
    base = decoder.hidden(DecoderInput(image, ids, mask))
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 7) % VOCABULARY
    later = decoder.hidden(DecoderInput(image, other, mask))
    assert torch.allclose(base[:, :3], later[:, :3])
    assert (base[:, 3] - later[:, 3]).abs().max() > 1e-3
    for place in (0, IMAGE - 1):  # every image token matters to the text's first token
        changed = image.clone()
        changed[:, place] += torch.randn(WIDTH, dtype=torch.float64)
        assert (
            decoder.hidden(DecoderInput(changed, ids, mask))[:, 0] - base[:, 0]
        ).abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_with_a_cache_equals_full_recomputing(family: str, padded: bool) -> None:
    decoder = make(family)
    image, ids, _, _ = make_texts(2)
    prompt, mask = ids[:, :3].clone(), torch.ones(2, 3, dtype=torch.long)
    prompt[:, 0] = decoder.start_id
    if padded:
        prompt[1, :2] = torch.tensor([0, decoder.start_id])
        mask[1, 0] = 0  # on the left
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = decoder.generate(DecoderInput(image, prompt, mask), **options)

    weight, bias = decoder.head()
    for row in range(2):
        text = prompt[row : row + 1, mask[row].bool()]
        said = []
        for _ in range(5):
            ones = torch.ones_like(text)
            last = decoder.hidden(DecoderInput(image[row : row + 1], text, ones))[:, -1]
            token = F.linear(last, weight, bias).argmax(-1)
            said.append(int(token))
            text = torch.cat([text, token[None]], dim=1)
        assert got[row].tolist() == said, family


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_samples_run_over_the_cache(family: str) -> None:
    decoder = make(family)
    image, _, _, _ = make_texts(2)
    prompt, mask = torch.full((2, 1), decoder.start_id), torch.ones(2, 1, dtype=torch.long)
    shared = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": 1}
    beams = decoder.generate(
        DecoderInput(image, prompt, mask), num_beams=3, do_sample=False, **shared
    )
    assert beams.shape[0] == 2 and beams.shape[1] <= 4
    alone = decoder.generate(
        DecoderInput(image[1:], prompt[1:], mask[1:]), num_beams=3, do_sample=False, **shared
    )
    assert beams[1, : alone.shape[1]].tolist() == alone[0].tolist()
    torch.manual_seed(0)
    many = decoder.generate(
        DecoderInput(image, prompt, mask), do_sample=True, num_return_sequences=3, **shared
    )
    assert many.shape[0] == 6


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_an_image_takes_no_learned_positions(family: str) -> None:
    """As long a text as the table has positions, behind an image; and text alone as before."""
    decoder = make(family)
    image, _, _, _ = make_texts(1)
    ids = torch.randint(3, VOCABULARY, (1, 24))
    assert decoder.hidden(DecoderInput(image, ids, torch.ones_like(ids))).shape == (1, 24, WIDTH)
    plain = decoder.model(ids).logits
    assert plain.shape == (1, 24, VOCABULARY)


def test_t5_loss_equals_transformers_own() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    decoder = make("t5_cross")
    image, ids, mask, labels = make_texts()
    own = decoder.model(
        encoder_outputs=BaseModelOutput(last_hidden_state=image),
        decoder_input_ids=ids, decoder_attention_mask=mask, labels=labels,
    )  # fmt: skip
    mine = nll(decoder, image, ids, mask, labels).sum() / (labels != IGNORED).sum()
    torch.testing.assert_close(mine, own.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_loss_hangs_on_trains_and_nothing_else_does(family: str) -> None:
    decoder = make(family)
    trains = {name for name, p in decoder.named_parameters() if p.requires_grad}
    decoder.requires_grad_(True)
    nll(decoder, *make_texts()).sum().backward()
    reached = {
        name for name, p in decoder.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert trains - reached == set()
    assert reached - trains == set()


def test_t5_has_no_encoder_to_speak_of() -> None:
    names = [name for name, p in make("t5_cross").named_parameters() if ".encoder." in name]
    assert names == ["model.encoder.final_layer_norm.weight"]


def test_a_saved_t5_loads_without_its_encoder(tmp_path) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES["t5_cross"].items() if k != "model_type"}
    config = transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    whole = transformers.T5ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    section = Section(name="t5_cross", tag=str(tmp_path), pretrained=True)
    decoder = find("models/decoders", "t5_cross").build(
        section, vocab_size=VOCABULARY, pad_id=0, eos_id=1
    )
    want = dict(whole.named_parameters())
    for name, parameter in decoder.model.named_parameters():
        assert torch.equal(parameter, want[name]), name
    assert not any("encoder.block" in name for name, _ in decoder.model.named_parameters())


@pytest.mark.parametrize(
    ("name", "section", "key", "words"),
    [
        ("causal", {"config": {"model_type": "t5"}}, "config.model_type", "t5_cross"),
        ("t5_cross", {"config": {"model_type": "gpt2"}}, "config.model_type", "causal"),
        ("causal", {"config": {"model_type": "gpt3"}}, "config.model_type", "did you mean"),
        ("causal", {"config": {"model_type": "gpt2", "n_layers": 2}}, "config.n_layers", "n_layer"),
        ("causal", {"config": {"model_type": "gemma2"}}, "config.model_type", "softcapping: 30"),
        ("causal", {}, "config.model_type", "needs a tag"),
        ("causal", {"tag": "/nowhere", "pretrained": True}, "tag", "cannot get"),
    ],
)
def test_mistakes_are_named(name: str, section: dict, key: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        find("models/decoders", name).build(
            Section(name=name, **section), vocab_size=VOCABULARY, pad_id=0, eos_id=1
        )
    assert error.value.key == f"model.decoder.{key}"


def test_a_folder_without_weights_is_named(tmp_path) -> None:
    import transformers

    sizes = {k: v for k, v in SIZES["gpt2"].items() if k != "model_type"}
    transformers.GPT2Config(vocab_size=VOCABULARY, **sizes).save_pretrained(tmp_path)
    section = Section(name="causal", tag=str(tmp_path), pretrained=True)
    with pytest.raises(UserError, match="cannot get decoder"):
        find("models/decoders", "causal").build(section, vocab_size=VOCABULARY, pad_id=0, eos_id=1)


def test_damaged_weights_are_named(tmp_path) -> None:
    import transformers

    sizes = {k: v for k, v in SIZES["gpt2"].items() if k != "model_type"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **sizes))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    section = Section(name="causal", tag=str(tmp_path), pretrained=True)
    with pytest.raises(UserError, match=r"weights of .* are damaged") as told:
        find("models/decoders", "causal").build(section, vocab_size=VOCABULARY, pad_id=0, eos_id=1)
    assert told.value.key == "model.decoder.tag"
