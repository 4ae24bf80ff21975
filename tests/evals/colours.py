"""A task so simple that its right answers are known: images of one colour, captions naming it.

A caption is three numbers, ``"10 200 30"``, and its feature their direction; an image's feature is
the direction of its mean colour.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from engine.data.transforms.pipeline import to_tensor
from engine.evals.predict import Predictor
from engine.types import BadSample, Row, Source, Task


def png(colour, size=4):
    out = io.BytesIO()
    Image.new("RGB", (size, size), tuple(colour)).save(out, "PNG")
    return out.getvalue()


def colours(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3)).tolist()


class ColourSource(Source):
    """Rows of (image bytes or None, caption, image id, label)."""

    name, split = "colours", "valid"

    def __init__(self, rows, classes=None):
        self.rows = rows
        if classes is not None:
            self.classes = classes

    def captions(self):
        raise NotImplementedError

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        image, caption, image_id, label = self.rows[index]
        if not caption:
            raise BadSample("no caption", f"row {index}")
        images = () if image is None else (image,)
        return Row(f"file{index}.png", images, caption, str(image_id), str(index), label)

    def column(self, name):
        assert name == "image_id"
        return np.array([str(row[2]) for row in self.rows])


class ColourTask(Task):
    """Counts its batches, so that tests can see what was encoded."""

    modalities = ("image", "text")

    def __init__(self):
        self.seen = {"image": [], "text": []}

    def batch(self, samples):
        return {"image_BCHW": torch.stack([s.images[0] for s in samples]), "note": "not a tensor"}

    def tokenize(self, texts):
        words = [[int(word) for word in text.split()] for text in texts]
        longest = max(map(len, words))
        ids = torch.tensor([w + [0] * (longest - len(w)) for w in words])
        return {"input_ids_BT": ids, "attention_mask_BT": (ids >= 0).long()}

    def encode(self, model, batch, modality):
        if modality == "image":
            assert "input_ids_BT" not in batch
            inputs = batch["image_BCHW"].float().mean((2, 3))
        else:
            inputs = F.pad(batch["input_ids_BT"].float(), (0, 3))[:, :3]
        self.seen[modality].append(len(inputs))
        return F.normalize(model(inputs), dim=1)


class Passing(nn.Module):
    """Passes its input on; in train mode dropout would spoil it."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(3).eval()
        self.dropout = nn.Dropout(0.9)
        self.train()
        self.frozen.eval()

    def forward(self, x):
        return self.dropout(x + 1e-3)


def predictor(**changes):
    settings = {"batch_size": 4, "num_workers": 0, "device": torch.device("cpu")} | changes
    return Predictor(ColourTask(), settings.pop("model", Passing()), to_tensor, **settings)
