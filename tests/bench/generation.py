"""Generation: ours beside transformers' ``generate`` called bare, open_clip's CoCa, and one sample.

    python -m tests.bench generate [--threads N]

Random weights in the sizes of tests/bench/caption.yaml; every text gets as many tokens as there is
room for. Bare is ``generate`` on the same weights, image tokens, prompts and options, and the
tokenizer. The CoCa has as many parameters, and no cache of keys and values. Best of ten and one
sample run as ``--mode=generate`` does it, reading images and, for the ten, ranking included.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import engine.torchvision_ops  # noqa: F401  before transformers and open_clip

from open_clip import coca_model  # isort: skip
from transformers.modeling_outputs import BaseModelOutput  # isort: skip

from engine.config.schema import Config, Decoder, Generate
from engine.data.sources import open_source
from engine.evals.captions import CaptionEvaluation
from engine.evals.predict import Predictor
from engine.evals.scorers import ClipScorer
from engine.generate import texts
from engine.run import Run
from tests.bench.caption import CONFIG
from tests.bench.runs import CONFIG as CLIP_CONFIG
from tests.bench.runs import configuration, make_run, settings
from tests.bench.table import Line, Options
from tests.bench.timing import in_turns, ratio

Work = Callable[[], Any]


def configured(options: Options, folder: Path, path: Path = CONFIG) -> Config:
    """Of drawn images, whatever data there are."""
    _, values = settings(Options(threads=options.threads), folder)
    shapes = {"format": "shapes", "image_size": 64, "num_train": 6400, "num_valid": 32}
    if options.quick:
        shapes |= {"num_train": 64, "num_valid": 4}
    return configuration(path, values | {"data.datasets": {"drawn": shapes}, "data.num_workers": 0})


def with_decoder(config: Config, /, **changed: Any) -> Config:
    """``config`` with another decoder."""
    section = Decoder(**(config.model.decoder.model_dump() | changed))
    model = config.model.model_copy(update={"decoder": section})
    return config.model_copy(update={"model": model})


class Speaker:
    """A task and its model from random weights, and images to speak about."""

    def __init__(self, config: Config, rows: int) -> None:
        self.run = make_run(config, "caption")
        self.task: Any = self.run.task
        self.model: Any = self.run.build_model().eval()
        size = config.transforms.resize.size
        generator = torch.Generator().manual_seed(0)
        shape = (rows, 3, *size) if isinstance(size, tuple | list) else (rows, 3, size, size)
        self.image_BCHW = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.instructions = [""] * rows
        self.room = self.task.max_length - 1

    def section(self, **options: Any) -> Generate:
        """Every text as long as may be: random weights end nowhere in particular."""
        return Generate(min_new_tokens=self.room, **options)

    def ours(self, section: Generate) -> Callable[[], list[list[str]]]:
        return lambda: texts.generate_texts(
            self.task, self.model, self.image_BCHW, self.instructions, section
        )

    def bare(self, section: Generate) -> Callable[[], list[list[str]]]:
        """transformers' own call; behind a prefix of images for a causal model."""
        tokenizer, decoder = self.task.tokenizer, self.model.decoder
        options: dict[str, Any] = {
            "max_new_tokens": self.room,
            "min_new_tokens": self.room,
            "eos_token_id": self.task.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "num_beams": section.num_beams if section.method == "beam" else 1,
            "do_sample": section.method == "sample",
        }
        options |= {"top_k": 0} if section.method == "sample" else {}

        @torch.no_grad()
        def work() -> list[list[str]]:
            ids_BP, mask_BP = self.task.prompts(self.instructions)
            image_BND = self.model.image_tokens(self.image_BCHW)
            if decoder.model.config.is_encoder_decoder:
                memory = BaseModelOutput(last_hidden_state=image_BND)
                found = decoder.model.generate(
                    encoder_outputs=memory, decoder_input_ids=ids_BP,
                    decoder_attention_mask=mask_BP, **options,
                )[:, ids_BP.shape[1] :]  # fmt: skip
            else:
                text_BPD = decoder.model.get_input_embeddings()(ids_BP)
                embeds_BSD = torch.cat([image_BND, text_BPD], dim=1)
                seen_BS = torch.cat([mask_BP.new_ones(image_BND.shape[:2]), mask_BP], dim=1)
                found = decoder.model.generate(
                    inputs_embeds=embeds_BSD, attention_mask=seen_BS, **options
                )
            assert found.shape[1] == self.room
            return [[tokenizer.decode(ids)] for ids in found.tolist()]

        return work


def make_coca(config: Config, vocabulary: int, image_size: int) -> Any:
    """open_clip's CoCa: of its text layers a third are below the image, two thirds attend to it.

    A layer that attends has two blocks: three of them and two below are as large as six of T5's.
    """
    coca_model._has_transformers = True  # which lacks nothing but the beam search's scorer
    warpers = ("TopPLogitsWarper", "top_p"), ("TopKLogitsWarper", "top_k")
    coca_model.GENERATION_TYPES |= {kind: getattr(coca_model, name) for name, kind in warpers}
    tower, t5 = config.model.image_encoder.param, config.model.decoder.config
    width, heads = t5["d_model"], t5["num_heads"]
    layers = t5["num_decoder_layers"]
    length = config.model.decoder.max_length
    torch.manual_seed(0)
    model = coca_model.CoCa(
        width,
        {"layers": layers // 2, "width": width, "heads": heads, "context_length": length},
        {
            "layers": layers // 3, "width": width, "heads": heads, "context_length": length,
            "vocab_size": vocabulary, "embed_cls": True, "output_tokens": True,
        },
        {
            "layers": tower["num_hidden_layers"], "width": tower["hidden_size"],
            "head_width": tower["hidden_size"] // tower["num_attention_heads"],
            "patch_size": tower["patch_size"], "image_size": image_size,
            "attentional_pool": True, "attn_pooler_heads": heads, "output_tokens": True,
            "attn_pooler_queries": (image_size // tower["patch_size"]) ** 2,
        },
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().max() < 100:  # memory that open_clip leaves as it found it
                parameter.normal_(std=0.02)
    return model


def coca(speaker: Speaker, config: Config) -> Work:
    """Its greedy search, text of equal length."""
    size = speaker.image_BCHW.shape[-1]
    model = make_coca(config, speaker.task.tokenizer.vocab_size, size)
    counts = [sum(p.numel() for p in m.parameters()) for m in (speaker.model, model)]
    assert 0.92 < counts[0] / counts[1] < 1.08, counts
    mean_C11, std_C11 = speaker.model.mean_C11, speaker.model.std_C11

    def work() -> Tensor:
        found = model.generate(
            (speaker.image_BCHW - mean_C11) / std_C11, generation_type="top_k", top_k=1,
            seq_len=speaker.room + 1, min_seq_len=speaker.room,
            sot_token_id=speaker.task.start_id, eos_token_id=speaker.task.eos_id,
            pad_token_id=speaker.task.eos_id,  # ours is the start token as well
            max_seq_len=speaker.room + 1,
        )  # fmt: skip
        assert found.shape == (len(speaker.image_BCHW), speaker.room + 1)
        return found

    return work


def best_of_ten(
    speaker: Speaker, config: Config, options: Options, folder: Path, images: int | None
) -> dict[str, Work]:
    """Ten ranked samples of each image, and one, from images on."""
    predictor = Predictor.of_run(speaker.run, speaker.model)
    source = open_source("drawn", "valid", config.data, key="data.valid_name")
    judging = make_run(configured(options, folder, CLIP_CONFIG))
    ranker = ClipScorer("clip", Predictor.of_run(judging, judging.build_model()))
    rows = np.arange(len(source))[:images]

    def run(section: Generate, judge: ClipScorer | None) -> Work:
        own = config.model_copy(update={"generate": section})
        evaluation = CaptionEvaluation(Run("caption", own, speaker.run.device))
        vars(evaluation.scorers)["ranker"] = judge
        return lambda: evaluation.predict(predictor, source, rows)

    return {
        "ten": run(speaker.section(method="best_of_n", num_samples=10), ranker),
        "one": run(speaker.section(method="sample"), None),
    }


def line(what: str, seconds: dict[str, list[float]], mark: str, peer: str = "peer") -> Line:
    """Peer's time ÷ ours."""
    ms = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
    return Line(what, ms["ours"], ms[peer], mark=mark, unit="ms",
                **ratio(seconds[peer], seconds["ours"]))  # fmt: skip


def rows(options: Options) -> Iterator[Line]:
    """Each pair of candidates in turn."""
    repeats, count = (1, 2) if options.quick else (options.repeats, 32)
    with tempfile.TemporaryDirectory() as name:
        config = configured(options, Path(name))
        if options.quick:
            config = with_decoder(config, max_length=8)
        t5 = Speaker(config, count)
        gpt2 = {"model_type": "gpt2", "n_embd": 192, "n_layer": 3, "n_head": 4, "n_positions": 64}
        causal = Speaker(with_decoder(config, name="causal", config=gpt2), count)
        for speaker, family in ((t5, "t5_cross"), (causal, "causal")):
            for method, mark in (("greedy", "≥ 1.0"), ("beam", "≥ 1.0"), ("sample", "")):
                section = speaker.section(method=method, num_beams=4)
                work: dict[str, Work] = {
                    "ours": speaker.ours(section), "peer": speaker.bare(section)
                }  # fmt: skip
                if family == "t5_cross" and method != "sample":
                    assert work["ours"]() == work["peer"](), method
                yield line(f"{family}, {method}, bare ÷ ours", in_turns(work, repeats), mark)

        larger = config.model.decoder.config | {"num_decoder_layers": 6}
        larger = with_decoder(config, config=larger)
        speaker = Speaker(larger, count)
        greedy = {"ours": speaker.ours(speaker.section()), "peer": coca(speaker, larger)}
        yield line("greedy, CoCa ÷ ours", in_turns(greedy, repeats), "≥ 4")

        for speaker, family in ((t5, "t5_cross"), (causal, "causal")):
            for images, of in ((1, "of one image"), (None, f"of {count} images at once")):
                ten = best_of_ten(speaker, speaker.run.config, options, Path(name), images)
                seconds = in_turns(ten, repeats)
                ms = [1e3 * statistics.median(seconds[which]) for which in ("ten", "one")]
                yield Line(f"{family}, best of ten ÷ one sample, {of}", *ms, mark="≤ 3", unit="ms",
                           **ratio(seconds["ten"], seconds["one"]))  # fmt: skip
