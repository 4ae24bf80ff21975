"""An exported run at work, by transformers, safetensors and Pillow alone.

    from exported_model import load

    model = load(".")                # the folder that this file is in
    model.image_features(["a.jpg"])  # clip, as text_features(["a dog"]) and logits(images, texts)
    model.answer("a.jpg")            # caption; of a vqa run with the question: answer("a.jpg", "…")
    model.labels("a.jpg")            # recognize: labels with their probabilities

Images are paths or Pillow images. Everything runs on the CPU, without gradients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

Picture = str | Path | Image.Image


def load(folder: str | Path = ".") -> Any:
    """A ``DualEncoder``, or one of the classes that speak, as ``exported_model.json`` says."""
    path = Path(folder)
    settings = json.loads((path / "exported_model.json").read_text(encoding="utf8"))
    kinds = {"clip": DualEncoder, "prefix": PrefixModel, "cross": CrossModel, "t5": T5Model}
    return kinds[settings["kind"]](path, settings)


class ImageEncoder:
    """Pooled features [B, D] of images, or tokens [B, N, D] of a hidden ``layer``."""

    def __init__(self, folder: Path, pool: str | None, layer: int | None, num_prefix: int) -> None:
        self.pool, self.layer, self.num_prefix = pool, layer, num_prefix
        self.model: Any = transformers.AutoModel.from_pretrained(folder).eval()
        # without torchvision, whose pixels differ
        self.processor: Any = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")

    def pixels(self, images: Sequence[Picture]) -> Tensor:
        """Normalised images [B, 3, H, W]."""
        opened = [Image.open(one) if isinstance(one, str | Path) else one for one in images]
        found = self.processor([one.convert("RGB") for one in opened], return_tensors="pt")
        return found["pixel_values"]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        timm_model = getattr(self.model, "timm_model", None)
        if self.layer not in (None, -1):
            if timm_model is None:
                return self.model(pixels, output_hidden_states=True).hidden_states[self.layer]
            states = self.model(  # patches and class tokens apart
                pixels, output_hidden_states=True, norm=False, output_fmt="NLC",
                return_prefix_tokens=True,
            ).hidden_states[self.layer]  # fmt: skip
            return torch.cat(states[::-1], 1)
        found = self.model(pixels)
        if self.pool == "model":
            return found.pooler_output
        states = found.last_hidden_state
        if self.pool == "first":
            return states[:, 0]
        if self.pool == "mean":
            return states[:, self.num_prefix :].mean(1)
        if states.ndim < 4:
            return states
        last = getattr(timm_model, "output_fmt", "NCHW") == "NHWC"  # a convolutional network's
        return states.flatten(1, 2) if last else states.flatten(2).transpose(1, 2)


class TextEncoder:
    """Pooled features [B, D] of texts."""

    def __init__(self, folder: Path, pool: str, max_length: int) -> None:
        self.pool, self.max_length = pool, max_length
        self.model: Any = transformers.AutoModel.from_pretrained(folder).eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        given = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length,
            return_token_type_ids=False, return_tensors="pt",
        )  # fmt: skip
        return self.pooled(given["input_ids"], given["attention_mask"])

    @torch.no_grad()
    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features of token ids [B, T]; ``mask`` is 0 for padding, on the right."""
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pool == "first":
            return states[:, 0]
        if self.pool == "last":
            return states[torch.arange(len(states)), mask.sum(1) - 1]
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class DualEncoder:
    """A clip run: L2-normalised features of images and texts."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.image_encoder = ImageEncoder(folder / "image_encoder", **settings["image"])
        self.text_encoder = TextEncoder(folder / "text_encoder", **settings["text"])
        self.more = load_file(folder / "projections.safetensors")

    def image_features(self, images: Sequence[Picture]) -> Tensor:
        """[B, D]."""
        return self._features("image", self.image_encoder(self.image_encoder.pixels(images)))

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """[B, D]."""
        return self._features("text", self.text_encoder(texts))

    def _features(self, side: str, pooled: Tensor) -> Tensor:
        return nn.functional.normalize(pooled @ self.more[f"{side}_projection.weight"].T)

    def logits(self, images: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """[images, texts]: softmax over texts, or the sigmoid where there is a ``logit_bias``."""
        found = self.image_features(images) @ self.text_features(texts).T
        if "logit_scale" in self.more:
            found = self.more["logit_scale"].exp() * found
        return found + self.more.get("logit_bias", 0)


class LanguageModel:
    """What models that speak have in common: images as tokens, and a language model."""

    auto = "AutoModelForSeq2SeqLM"

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.image_encoder = ImageEncoder(folder / "image_encoder", **settings["image"])
        self.connector = nn.Sequential(
            *(getattr(nn, name)(*sizes) for name, *sizes in settings["connector"])
        )
        weights = load_file(folder / "connector.safetensors")
        # one layer alone was saved without a number
        weights = {n if n[0].isdigit() else f"0.{n}": w for n, w in weights.items()}
        self.connector.load_state_dict(weights)
        places = folder / "positions.safetensors"
        self.positions = load_file(places)["positions"] if places.exists() else None
        language = folder / "language_model"
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(language)
        self.model: Any = getattr(transformers, self.auto).from_pretrained(language).eval()
        self.embed = self.model.get_input_embeddings()

    @torch.no_grad()
    def image_tokens(self, pixels: Tensor) -> Tensor:
        """What the language model is given of normalised images, [B, N, D]."""
        states = self.image_encoder(pixels)[:, self.settings["num_dropped"] :]
        tokens = self.connector(states)
        return tokens if self.positions is None else tokens + self.positions

    def prompt(self, question: str | None = None) -> str:
        """What the model is asked; of a vqa run with the question in it."""
        return self.settings["prompt"].replace("{question}", question or "")

    def text_ids(self, prompt: str) -> Tensor:
        """int64 [1, T]: the tokens that open a text, and the prompt's."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return torch.tensor([[*self.settings["start"], *ids]])

    @torch.no_grad()
    def answer(self, image: Picture, question: str | None = None) -> str:
        """What the model says of an image: the likeliest token at each step."""
        tokens = self.image_tokens(self.image_encoder.pixels([image]))
        said = self.say(tokens, self.prompt(question))
        return self.tokenizer.decode(said, skip_special_tokens=True).strip()

    def say(self, image: Tensor, prompt: str) -> list[int]:
        """The tokens that follow the prompt, with its end if there is one."""
        raise NotImplementedError


class PrefixModel(LanguageModel):
    """A causal language model behind image tokens, which see one another."""

    auto = "AutoModelForCausalLM"

    def read(self, image: Tensor, ids: Tensor) -> tuple[Any, Tensor]:
        """transformers' output for an image and a text, and the positions of their tokens."""
        num_image, num_text = image.shape[1], ids.shape[1]
        sees = torch.ones(num_image + num_text, num_image + num_text).tril().bool()
        sees[:num_image, :num_image] = True
        mask = torch.zeros(sees.shape).masked_fill(~sees, -3e38)[None, None]
        place = torch.arange(num_image + num_text)[None]
        none = self.settings["none"]  # a position of zeros: image tokens have none of their own
        if none is not None:
            place = torch.tensor([[none] * num_image + list(range(num_text))])
        embeds = torch.cat([image, self.embed(ids)], 1)
        return self.next(None, None, place, inputs_embeds=embeds, attention_mask=mask), place

    def next(self, token: Tensor | None, cache: Any, place: Tensor, **more: Tensor) -> Any:
        """transformers' output for one more token of each row, at the position ``place``."""
        if self.settings["takes_positions"]:
            more["position_ids"] = place
        return self.model(token, past_key_values=cache, use_cache=True, **more)

    def say(self, image: Tensor, prompt: str) -> list[int]:
        ids = self.text_ids(prompt)
        out, place = self.read(image, ids)
        said: list[int] = []
        while ids.shape[1] + len(said) < self.settings["max_length"]:
            token = out.logits[:, -1:].argmax(-1)
            if token.item() == self.settings["end"]:
                break
            said.append(int(token))
            out = self.next(token, out.past_key_values, place[:, -1:] + len(said))
        return said

    @torch.no_grad()
    def labels(self, image: Picture) -> dict[str, float]:
        """Labels with their probabilities, the likeliest first: those of a recognize run."""
        options = self.settings["labels"]
        tokens = self.image_tokens(self.image_encoder.pixels([image]))
        out, place = self.read(tokens, self.text_ids(self.prompt()))
        first = out.logits[0, -1].log_softmax(-1)
        first[options["separator"]] = -torch.inf  # it begins no label
        log_p, token = first.topk(options["first_tokens"])
        cache, ids, ended = out.past_key_values, token[:, None], torch.zeros(len(token)).bool()
        cache.batch_repeat_interleave(len(token))  # image and prompt, for each label
        for number in range(1, options["room"]):
            out = self.next(ids[:, -1:], cache, place[:, -1:] + number)
            following, token = out.logits[:, -1].log_softmax(-1).max(-1)
            log_p += torch.where(ended, 0.0, following)
            ids = torch.cat([ids, token[:, None]], 1)
            ended |= token == options["separator"]
        found: dict[str, float] = {}
        for row, prob in zip(ids[ended].tolist(), log_p[ended].exp().tolist(), strict=True):
            row = row[: row.index(options["separator"])]
            label = self.tokenizer.decode(row, skip_special_tokens=True).strip()
            found[label] = found.get(label, 0.0) + prob
        best = sorted(found.items(), key=lambda pair: -pair[1])[: options["num_labels"]]
        return dict(best)


class CrossModel(LanguageModel):
    """T5's decoder over image tokens."""

    def say(self, image: Tensor, prompt: str) -> list[int]:
        ids = self.text_ids(prompt)
        # a new object for each call: generate changes it
        memory: Any = BaseModelOutput(last_hidden_state=image)
        found = self.model.generate(
            encoder_outputs=memory, decoder_input_ids=ids, eos_token_id=self.settings["end"],
            max_new_tokens=self.settings["max_length"] - ids.shape[1],
        )  # fmt: skip
        return found[0, ids.shape[1] :].tolist()


class T5Model(LanguageModel):
    """T5 with the image in its encoder's text, at the mark ``<image>``."""

    def encoded(self, image: Tensor, prompt: str) -> Tensor:
        """What goes into the encoder, [1, S, D]."""
        before, after = (
            self.tokenizer(part, add_special_tokens=False).input_ids
            for part in prompt.split("<image>")
        )
        before += [self.settings["end"]] if self.settings["ends_chunks"] else []
        first, last = (
            self.embed(torch.tensor([ids], dtype=torch.long))
            for ids in (before, [*after, self.settings["end"]])
        )
        return torch.cat([first, image, last], 1)

    def say(self, image: Tensor, prompt: str) -> list[int]:
        embeds = self.encoded(image, prompt)
        caches = (transformers.DynamicCache(), transformers.DynamicCache())
        found = self.model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]),
            eos_token_id=self.settings["end"], max_new_tokens=self.settings["max_length"],
            past_key_values=transformers.EncoderDecoderCache(*caches),
        )  # fmt: skip
        return found[0, 1:].tolist()
