"""The section of texts to be generated: how, from what, and who judges them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from engine.config.section import NonNegativeInt, Section


class Ranker(Section):
    """A contrastive model that scores how well a caption fits its image."""

    model: str | None = None  # a clip run of ours, or a hub id or folder of a CLIP


class Generate(Section):
    """How texts are generated, in evaluations and by --mode=generate."""

    method: Literal["greedy", "beam", "sample", "best_of_n", "one_shot"] = "greedy"
    num_beams: PositiveInt = 4
    top_k: NonNegativeInt = 0  # 0: all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    temperature: PositiveFloat = 1.0
    repetition_penalty: PositiveFloat = 1.0
    length_penalty: float = 1.0
    max_new_tokens: PositiveInt | None = None  # default: what model.decoder.max_length leaves
    min_new_tokens: NonNegativeInt = 0
    num_samples: PositiveInt = 10  # best_of_n
    seed: NonNegativeInt = 0
    ranker: Ranker = Ranker()  # chooses among the samples of best_of_n
    scorer: Ranker = Ranker()  # gives CLIPScore
    answers: list[str] | str | None = None  # of questions: the likeliest of these, or of a file's
    input: str | None = None  # --mode=generate: a folder of images, or a file of questions
    images: str | None = None  # the folder of the questions' images; default: that of their file
    output: str | None = None  # where the texts go; default: the run's folder
    batch_size: PositiveInt = 32
    # Of labels (--task=recognize):
    num_labels: PositiveInt = 10  # of an image
    first_tokens: PositiveInt | None = None  # one_shot: labels begun; default: num_labels
    label_rows: PositiveInt = 64  # labels of an image that are decoded at a time
    # By the product of a label's probabilities, its perplexity, the likeness of its tokens to the
    # image's in the decoder's space, the ranker's cosine, or as they were found
    rank: Literal["prob", "ppl", "sim", "clip", "none"] = "prob"
    attention: bool = False  # --mode=generate: pictures of what each label looked at
