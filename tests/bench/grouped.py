"""Training on batches of like length and modality beside shuffled ones, on a mix as LLaVA's.

    python -m tests.bench grouped [--data FOLDER] [--threads N]

The model is configs/vqa/llava_1k.yaml's, from random weights; the mix, in LLaVA's form: its
captions, all questions about an image of COCO as one conversation, COCO's captions of an image as
one description, and 6 % conversations of text alone, as llava_v1_5_mix665k has them (VQA's
questions, one to eight of them). Without ``--data`` all that is of drawn scenes. Each side takes
an epoch of its own batches, which the engine's loader drew, through the engine's loop; processor
time, in turns.
"""

from __future__ import annotations

import csv
import json
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config.load import load
from engine.losses.language_model import IGNORED
from engine.metrics.files import load as load_json
from engine.models.decoders.t5 import IMAGE_ID
from engine.tools.shapes import folder as shapes
from engine.train.loop import Training
from engine.types import Batch
from tests.bench.caption import Work, replay
from tests.bench.runs import ROOT, as_overrides, make_run, make_training
from tests.bench.table import Line, Options
from tests.bench.timing import ratio, turns

CONFIG = ROOT / "configs" / "vqa" / "llava_1k.yaml"
SIDES = ("shuffle", "length_grouped", "modality_grouped")
TEXT_ALONE = 0.06  # of the rows
MOST_PAIRS = 8  # of a conversation of text alone
Pair = tuple[str, str]
Entry = dict[str, Any]


def talk(pairs: Sequence[Pair], image: str | None = None) -> Entry:
    """A conversation in LLaVA's form, the image marked at its beginning."""
    turns = []
    for number, (asked, said) in enumerate(pairs):
        mark = "<image>\n" if image and not number else ""
        turns += [{"from": "human", "value": mark + asked}, {"from": "gpt", "value": said}]
    return {"conversations": turns} | ({"image": image} if image else {})


def mixed(talks: list[Entry], alone: list[Pair]) -> list[Entry]:
    """The conversations, and of ``alone`` as many as are to be text alone; in a random order."""
    rng = np.random.default_rng(0)
    pairs = iter(rng.permutation(len(alone)).tolist())
    found = list(talks)
    for _ in range(round(len(talks) * TEXT_ALONE / (1 - TEXT_ALONE))):
        some = [alone[next(pairs)] for _ in range(int(rng.integers(1, MOST_PAIRS + 1)))]
        found.append(talk(some))
    return [{"id": str(i), **found[i]} for i in rng.permutation(len(found)).tolist()]


def real(data: Path) -> tuple[list[Entry], list[Entry]]:
    """Of a folder of datasets: the mix, and LLaVA's captions by themselves."""
    llava = load_json(data / "llava_1k" / "train_conversations.json")
    captions = [row | {"image": f"llava_1k/train/{row['image']}"} for row in llava]
    asked, told = defaultdict(list), defaultdict(list)
    for row in _rows(data / "coco" / "vqa.csv"):
        said = Counter(row["answers"].split("|")).most_common(1)[0][0]
        asked[row["image"]].append((row["question"], said))
    for split in ("train", "valid"):
        for row in _rows(data / "coco" / f"captions_{split}.csv"):
            told[row["image"]].append(row["caption"])
    coco = [talk(pairs, f"coco/{image}") for image, pairs in asked.items()]
    coco += [
        talk([("Describe the image in detail.", " ".join(said))], f"coco/{image}")
        for image, said in told.items()
    ]
    text = data / "vqa_text"
    questions = load_json(text / "vqa_questions_valid.json.gz")["questions"]
    words = {one["question_id"]: one["question"] for one in questions}
    annotations = load_json(text / "vqa_annotations_valid.json.gz")["annotations"]
    alone = [(words[one["question_id"]], one["multiple_choice_answer"]) for one in annotations]
    return mixed(captions + coco, alone), captions


def drawn(folder: Path, count: int) -> tuple[list[Entry], list[Entry]]:
    """The same of drawn scenes."""
    scenes = folder / "scenes"
    scenes.mkdir()
    shapes.write(scenes, shapes.Options(num_train=count, num_valid=4, questions=True))
    told = [row["caption"] for row in _rows(scenes / "train_anno.csv")]
    names = [f"scenes/train/{row['image']}" for row in _rows(scenes / "train_anno.csv")]
    captions = [
        talk([("What is this?", said)], name)
        for said, name in zip(told[::2], names[::2], strict=True)
    ]
    asked = load_json(scenes / "train_conversations.json")[1::4]
    talks = [row | {"image": f"scenes/train/{row['image']}"} for row in asked]
    talks += [
        talk([("Describe the images.", " ".join(told[i : i + 4]))], names[i])
        for i in range(3, count, 4)
    ]
    rows = _rows(scenes / "train_questions.csv")
    alone = [(row["question"], row["answers"].partition("|")[0]) for row in rows]
    return mixed(captions + talks, alone), captions


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


class Side:
    """Batches of an epoch, and runs of the engine's loop over them."""

    def __init__(self, folder: Path, data: str, kind: str, values: dict[str, Any]) -> None:
        form = {"format": "llava", "train_anno": f"{data}.json", "train_images": "images"}
        own = {
            "epoch": 1, "ckpt.dir": str(folder / "output"), "data.data_path": str(folder),
            "data.datasets": {data: {"root": ".", **form}}, "data.train_name": [data],
            "data.valid_name": [], "data.train_type": kind, "data.num_workers": 0,
            "model.image_encoder.init": None, "model.decoder.max_length": 512,
        }  # fmt: skip
        self.folder = folder / f"{data}.{kind}"
        self.run = make_run(load(CONFIG, as_overrides(own | values)), "vqa")
        drawing = make_training(Training, self.run, self.folder / "draw")
        with drawing.log:
            self.batches = [batch for _, batch, _ in drawing._batches()]
        self.samples = sum(len(batch["index_B"]) for batch in self.batches)

    def work(self) -> Work:
        """A training, ready to begin: processor seconds of all its steps."""
        return replay(self.run, self.batches, self.folder / "run")

    def padding(self, image_tokens: int) -> tuple[float, float]:
        """Shares of what the encoder and the decoder take that are padding."""
        sizes = [_sizes(batch, image_tokens) for batch in self.batches]
        shares = []
        for rows in zip(*sizes, strict=True):
            taken = sum(len(row) * int(row.max()) for row in rows)
            shares.append(1 - sum(int(row.sum()) for row in rows) / taken)
        return shares[0], shares[1]


def _sizes(batch: Batch, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row's question with its images, and of its answer."""
    asked = batch["attention_mask_BT"].sum(1)
    asked = asked + (batch["input_ids_BT"] == IMAGE_ID).sum(1) * (image_tokens - 1)
    return asked.numpy(), (batch["labels_BL"] != IGNORED).sum(1).numpy()


def compare(
    folder: Path, data: str, values: dict[str, Any], repeats: int
) -> tuple[dict[str, Side], dict[str, list[float]]]:
    """The sides, and processor seconds of their runs, in turns A B B A after one to warm up."""
    sides = {kind: Side(folder, data, kind, values) for kind in SIDES}
    assert len({side.samples for side in sides.values()}) == 1  # each row once on every side
    found: dict[str, list[float]] = {kind: [] for kind in SIDES}
    for number, kind in turns(SIDES, repeats):
        seconds = sides[kind].work()()
        if number >= 0:
            found[kind].append(seconds)
    return sides, found


def rows(options: Options) -> Iterator[Line]:
    """Samples a second of grouped batches ÷ shuffled ones; shares of padding."""
    small = {
        "data.batch_size": 8, "data.train_steps": 3, "model.decoder.config.num_layers": 1,
        "model.decoder.config.num_decoder_layers": 1,
        "model.decoder.tokenizer.vocab_size": 300,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.data is None:
            both = drawn(folder, 64 if options.quick else 1200)
        else:
            both = real(options.data)
        (folder / "images").symlink_to(options.data or folder, target_is_directory=True)
        for data, entries in zip(("mix", "captions"), both, strict=True):
            (folder / f"{data}.json").write_text(json.dumps(entries), encoding="utf8")
        cases = [
            ("mix", "flatten", "≥ 1.25"),
            ("mix", "turns", "≥ 1.25"),
            ("captions", "turns", ""),
        ]
        for data, conversations, mark in cases:
            values = {"data.conversations": conversations} | (small if options.quick else {})
            sides, found = compare(folder, data, values, 1 if options.quick else options.repeats)
            yield from lines(f"{data}, {conversations}", mark, sides, found)


def lines(
    what: str, mark: str, sides: dict[str, Side], found: dict[str, list[float]]
) -> Iterator[Line]:
    """Speed and padding of a comparison."""
    run = sides["shuffle"].run
    blank = torch.zeros(1, 3, *run.task.image_size)
    image_tokens = run.build_model().image_tokens(blank).shape[1]
    before = sides["shuffle"].padding(image_tokens)
    for kind in SIDES[1:]:
        own, peer = (
            sides[side].samples / max(statistics.median(found[side]), 1e-9)
            for side in (kind, "shuffle")
        )
        yield Line(f"{what}: {kind}, samples/s ÷ shuffle", own, peer, mark=mark, unit="/s",
                   **ratio(found["shuffle"], found[kind]))  # fmt: skip
        for part, share, other in zip(
            ("question", "answer"), sides[kind].padding(image_tokens), before, strict=True
        ):
            yield Line(f"{what}: {kind}, padding of {part}s", share, other)
