"""Code that uses an exported folder by transformers alone, for its README: pieces of a program."""

from __future__ import annotations

from string import Template

from torch import nn

from engine.models.connectors import Positions

START = Template("""import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

torch.set_grad_enabled(False)
encoder = AutoModel.from_pretrained("image_encoder").eval()
processor = AutoImageProcessor.from_pretrained("image_encoder", backend="pil")
pixels = processor(Image.open("a.jpg").convert("RGB"), return_tensors="pt").pixel_values
""")

CLIP = Template("""
texts = ["a photo of a dog", "a photo of a cat"]
tokenizer = AutoTokenizer.from_pretrained("text_encoder")
text_encoder = AutoModel.from_pretrained("text_encoder").eval()
more = load_file("projections.safetensors")
given = tokenizer(texts, padding=True, truncation=True, max_length=$max_length,
                  return_token_type_ids=False, return_tensors="pt")
states, mask = text_encoder(**given).last_hidden_state, given["attention_mask"]
text = torch.nn.functional.normalize($text @ more["text_projection.weight"].T)
image = torch.nn.functional.normalize($image @ more["image_projection.weight"].T)
logits = $logits
print(texts, logits.tolist())
""")

DUAL = Template("""import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel

torch.set_grad_enabled(False)
model = VisionTextDualEncoderModel.from_pretrained(".").eval()
processor = AutoImageProcessor.from_pretrained(".", backend="pil")
pixels = processor(Image.open("a.jpg").convert("RGB"), return_tensors="pt").pixel_values
tokenizer = AutoTokenizer.from_pretrained(".")
texts = ["a photo of a dog", "a photo of a cat"]
given = tokenizer(texts, padding=True, truncation=True, max_length=$max_length,
                  return_token_type_ids=False, return_tensors="pt")
out = model(pixel_values=pixels, **given)
image, text, logits = out.image_embeds, out.text_embeds, out.logits_per_image
print(texts, logits.tolist())
""")

POOLED = {
    "first": "states[:, 0]",
    "last": "states[torch.arange(len(states)), mask.sum(1) - 1]",
    "mean": "(states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
}

IMAGE = Template("""
states = $states
connector = $connector
connector.load_state_dict(load_file("connector.safetensors"))
image = connector(states$kept)$positions
""")

MODEL = Template("""
from transformers import $auto

tokenizer = AutoTokenizer.from_pretrained("language_model")
model = $auto.from_pretrained("language_model").eval()
embed = model.get_input_embeddings()
""")

PREFIX = Template("""
prompt = $prompt
text = torch.tensor([[$start, *tokenizer(prompt, add_special_tokens=False).input_ids]])
num_image, num_text = image.shape[1], text.shape[1]
sees = torch.ones(num_image + num_text, num_image + num_text).tril().bool()
sees[:num_image, :num_image] = True  # the image's tokens see one another
given = {"attention_mask": torch.zeros(sees.shape).masked_fill(~sees, -3e38)[None, None]}
$positions
out = model(inputs_embeds=torch.cat([image, embed(text)], 1), use_cache=True, **given)
""")

POSITIONS = """given["position_ids"] = torch.arange(num_image + num_text)[None]"""
POSITIONS_OF_TEXT = Template("""
# position $none is one of zeros: the image's tokens have none of their own
given["position_ids"] = torch.tensor([[$none] * num_image + list(range(num_text))])""")

CAPTION = Template("""
said = []
while num_text + len(said) < $max_length:
    token = out.logits[:, -1:].argmax(-1)
    if token.item() == $end:
        break
    said.append(token.item())
    given = {$next}
    out = model(token, past_key_values=out.past_key_values, use_cache=True, **given)
print(tokenizer.decode(said, skip_special_tokens=True).strip())
""")
NEXT = """"position_ids": given["position_ids"][:, -1:] + 1"""

LABELS = Template("""
first = out.logits[0, -1].log_softmax(-1)
first[$separator] = -torch.inf  # the separator begins no label
log_p, token = first.topk($first_tokens)
cache, labels, ended = out.past_key_values, token[:, None], torch.zeros(len(token)).bool()
cache.batch_repeat_interleave(len(token))  # what was read of image and prompt, for each label
for _ in range($room - 1):
    given = {$next}
    out = model(labels[:, -1:], past_key_values=cache, use_cache=True, **given)
    following, token = out.logits[:, -1].log_softmax(-1).max(-1)
    log_p += torch.where(ended, 0.0, following)
    labels = torch.cat([labels, token[:, None]], 1)
    ended |= token == $separator
found = {}
for ids, prob, whole in zip(labels.tolist(), log_p.exp().tolist(), ended.tolist()):
    if whole:
        label = tokenizer.decode(ids[: ids.index($separator)], skip_special_tokens=True).strip()
        found[label] = found.get(label, 0.0) + prob
for label, prob in sorted(found.items(), key=lambda one: -one[1])[:$num_labels]:
    print(f"{prob:.3f}  {label}")
""")

CROSS = Template("""
from transformers.modeling_outputs import BaseModelOutput

prompt = $prompt
text = torch.tensor([[$start, *tokenizer(prompt, add_special_tokens=False).input_ids]])
said = model.generate(
    encoder_outputs=BaseModelOutput(last_hidden_state=image), decoder_input_ids=text,
    max_new_tokens=$max_length - text.shape[1], eos_token_id=$end,
)[0, text.shape[1]:].tolist()
print(tokenizer.decode(said, skip_special_tokens=True).strip())
""")

QUESTION = Template("""
from transformers import DynamicCache, EncoderDecoderCache

prompt = $prompt
ids = [tokenizer(part, add_special_tokens=False).input_ids for part in prompt.split("<image>")]
before = embed(torch.tensor([ids[0]$ended], dtype=torch.long))
after = embed(torch.tensor([ids[1] + [$end]]))
given = torch.cat([before, image, after], 1)
said = model.generate(
    inputs_embeds=given, attention_mask=torch.ones(given.shape[:2]), eos_token_id=$end,
    max_new_tokens=$max_length, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
)[0, 1:].tolist()
print(tokenizer.decode(said, skip_special_tokens=True).strip())
""")


def expression(connector: nn.Module) -> str:
    """A connector as an expression; positions that it adds are no layer of it."""
    if isinstance(connector, nn.Sequential):
        layers = [expression(layer) for layer in connector if not isinstance(layer, Positions)]
        return f"torch.nn.Sequential({', '.join(layers)})"
    if isinstance(connector, nn.Linear):
        bias = "" if connector.bias is not None else ", bias=False"
        return f"torch.nn.Linear({connector.in_features}, {connector.out_features}{bias})"
    if isinstance(connector, nn.LayerNorm):
        return f"torch.nn.LayerNorm({connector.normalized_shape[0]})"
    return f"torch.nn.{type(connector).__name__}()"
