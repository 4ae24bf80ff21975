"""A task and a model of a few thousand random weights, in fp64, that says something of an image."""

import torch
from torch import nn

from engine.config.schema import Decoder as Section
from engine.data.text import bytes as byte_tokenizer
from engine.models.vision_language import VisionLanguage
from engine.registry import find
from engine.types import Task

NAMES = ("causal", "t5_cross")
_SIZES = {
    "causal": {
        "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "t5_cross": {
        "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "dropout_rate": 0.0,
    },
}  # fmt: skip


class Pixels(nn.Module):
    """A token a pixel."""

    num_prefix_tokens = 0

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 16), []

    def tokens(self, image_BCHW, layer):
        self.seen.append(len(image_BCHW))
        return self.layer(image_BCHW.flatten(2).transpose(1, 2))


class Speaker(Task):
    """What generation asks of a task."""

    modalities = ("image", "caption")
    max_length = 11

    def __init__(self, start_id):
        self.tokenizer = byte_tokenizer.build(None)
        self.eos_id, self.start_id = self.tokenizer.end_id, start_id

    def batch(self, samples):
        return {
            "image_BCHW": torch.stack([sample.images[0] for sample in samples]),
            "index_B": torch.tensor([sample.index for sample in samples]),
        }

    def prompts(self, instructions):
        rows = [[self.start_id, *self.tokenizer.raw(text)] for text in instructions]
        assert len({len(row) for row in rows}) == 1
        return torch.tensor(rows), torch.ones(len(rows), len(rows[0]), dtype=torch.int64)

    def room(self, ids_BP):
        return self.max_length - ids_BP.shape[1]


def speaker(name, scale=8.0):
    """(task, model); weights times ``scale``, so that the model looks at what it is given."""
    tokenizer = byte_tokenizer.build(None)
    torch.manual_seed(5)
    decoder = find("models/decoders", name).build(
        Section(name=name, config=_SIZES[name], max_length=Speaker.max_length),
        vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, eos_id=tokenizer.end_id,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    model = VisionLanguage(
        Pixels(), nn.Identity(), decoder, layer=-1, keep_prefix=True, label_smoothing=0.0,
        mean=[0.5] * 3, std=[0.2] * 3,
    )  # fmt: skip
    return Speaker(decoder.start_id), model.double().eval()
