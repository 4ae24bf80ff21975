"""The loss of transformers' own models of the same tensors, gradients included."""

import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithCrossAttentions

from engine.config.schema import Decoder, ImageEncoder
from engine.losses.language_model import IGNORED, row_losses
from engine.models.vision_language import VisionLanguage, build_connector
from engine.registry import find
from tests.models.decoders.nll import nll
from tests.models.decoders.test_decoders import FAMILIES, SIZES, VOCABULARY, WIDTH, make, make_texts

PIXELS, TOWER = 8, 12  # side of an image, width of its tower
VIT = {
    "model_type": "vit", "hidden_size": TOWER, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "patch_size": 4, "hidden_dropout_prob": 0.0,
}  # fmt: skip
EXACT = {"rtol": 1e-10, "atol": 1e-10}
UPCAST = {"rtol": 1e-6, "atol": 1e-6}  # what transformers takes to fp32


class CausalT5(transformers.PreTrainedModel):
    """T5 as the decoder that VisionEncoderDecoderModel wants; it has none of its own."""

    config_class = transformers.T5Config
    _supports_sdpa = True

    def __init__(self, t5) -> None:
        super().__init__(t5.config)
        self.t5 = t5

    def get_output_embeddings(self):
        return self.t5.lm_head

    def forward(self, input_ids, encoder_hidden_states, **unused):
        memory = BaseModelOutput(last_hidden_state=encoder_hidden_states)
        found = self.t5(encoder_outputs=memory, decoder_input_ids=input_ids)
        return CausalLMOutputWithCrossAttentions(logits=found.logits)


def captions():
    """Labels of unlike lengths, and the same behind the start token as a decoder reads them."""
    lengths, generator = (6, 3, 1), torch.Generator().manual_seed(3)
    labels = torch.full((3, 6), IGNORED)
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for row, length in enumerate(lengths):
        labels[row, :length] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        ids[row, 1:length], mask[row, :length] = labels[row, : length - 1], 1
    return ids, mask, labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_captioner_equals_vision_encoder_decoder() -> None:
    t5 = make("t5_cross")
    image = find("models/image", "huggingface").build(
        ImageEncoder(name="huggingface", param=VIT), image_size=PIXELS
    )
    mine = VisionLanguage(
        image, build_connector("linear", TOWER, WIDTH), t5, layer=-1, keep_prefix=True,
        label_smoothing=0.0, mean=[0.5] * 3, std=[0.5] * 3,
    ).double()  # fmt: skip
    peer = transformers.VisionEncoderDecoderModel(encoder=image.model, decoder=CausalT5(t5.model))
    peer.enc_to_dec_proj = mine.connector
    peer.config.pad_token_id, peer.config.decoder_start_token_id = 0, t5.start_id

    ids, mask, labels = captions()
    pixels = torch.randn(3, 3, PIXELS, PIXELS, dtype=torch.float64)
    batch = {
        "image_BCHW": pixels, "input_ids_BT": ids, "attention_mask_BT": mask, "labels_BT": labels,
    }  # fmt: skip
    outputs = mine(batch)
    loss = outputs["nll_B"].sum() / outputs["tokens_B"].sum()
    want = peer(pixel_values=pixels, labels=labels).loss
    torch.testing.assert_close(loss, want, **EXACT)
    got, expected = gradients(mine, loss), gradients(mine, want)
    assert got.keys() == expected.keys() and any("embeddings" in name for name in got)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], **EXACT)


def test_the_head_equals_that_of_gpt2_in_a_vision_encoder_decoder() -> None:
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES["gpt2"].items() if k != "model_type"}
    peer = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(transformers.ViTConfig(
            image_size=PIXELS, **{k: v for k, v in VIT.items() if k != "model_type"}
        )),
        decoder=transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY, is_decoder=True, add_cross_attention=True, **sizes
            )
        ),
    ).double()  # fmt: skip
    peer.config.pad_token_id = peer.config.decoder_start_token_id = 0
    _, _, labels = captions()
    pixels = torch.randn(3, 3, PIXELS, PIXELS, dtype=torch.float64)
    found = peer(pixel_values=pixels, labels=labels, output_hidden_states=True)
    nll_B = row_losses(found.decoder_hidden_states[-1], labels, peer.decoder.lm_head.weight)
    torch.testing.assert_close(nll_B.sum() / (labels != IGNORED).sum(), found.loss, **EXACT)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("t5", {}),
        ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
        ("mt5", {}),
        ("umt5", {}),
    ],
)
def test_t5_and_its_kin(kind: str, options: dict) -> None:
    torch.manual_seed(0)
    section = Decoder(name="t5_cross", config=SIZES["t5_cross"] | {"model_type": kind} | options)
    decoder = find("models/decoders", "t5_cross").build(
        section, vocab_size=VOCABULARY, pad_id=0, eos_id=1
    )
    decoder = decoder.double().eval()
    image, ids, mask, labels = make_texts()
    own = decoder.model(
        encoder_outputs=BaseModelOutput(last_hidden_state=image),
        decoder_input_ids=ids, decoder_attention_mask=mask, labels=labels,
    )  # fmt: skip
    loss = nll(decoder, image, ids, mask, labels).sum() / (labels != IGNORED).sum()
    torch.testing.assert_close(loss, own.loss, **EXACT)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5_cross"])
def test_a_causal_model_without_masks_of_ours(family: str, tokens: int) -> None:
    """GIT's mask of one image token is a causal one; of none, the model reads text as ever."""
    if tokens and family in ("gpt2", "opt"):
        pytest.skip("an image takes none of its learned positions")
    decoder = make(family)
    image, ids, mask, labels = make_texts()
    image = image[:, :tokens]
    embeds = torch.cat([image, decoder.model.get_input_embeddings()(ids)], dim=1)
    seen = torch.cat([mask.new_ones(3, tokens), mask], dim=1)
    # transformers takes the label of the position after
    shifted = torch.cat([labels.new_full((3, tokens + 1), IGNORED), labels], dim=1)[:, :-1]
    own = decoder.model(inputs_embeds=embeds, attention_mask=seen, labels=shifted)
    last = labels.clone()
    last[:, -1] = IGNORED  # which has no position after
    loss = nll(decoder, image, ids, mask, last).sum() / (last != IGNORED).sum()
    torch.testing.assert_close(loss.float(), own.loss.float(), **UPCAST)
