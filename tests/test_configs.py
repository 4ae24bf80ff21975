"""Every shipped YAML trains: its own recipe, on a handful of drawn scenes and with tiny towers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import launch as launcher
from engine.config.load import load

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip

T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
LANGUAGE = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
DECODERS = {  # tiny ones of the recipes' families
    "gcc_lora_base_attn_ffn.yaml": T5,
    "git_opt350m.yaml": {
        "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 16,
        "do_layer_norm_before": False, **LANGUAGE,
    },
    "git_llama2_7b.yaml": {"model_type": "llama", "intermediate_size": 64, **LANGUAGE},
    "git_mpt_7b.yaml": {"model_type": "mpt", "d_model": 32, "n_layers": 1, "n_heads": 2},
    "clip_flant5_stage1.yaml": T5,
    "clip_flant5_stage2.yaml": T5,
    "clip_flant5_stage2_lora.yaml": T5,
    "nxtp_llama2_7b.yaml": {
        "model_type": "llama", "intermediate_size": 64, **LANGUAGE, "num_hidden_layers": 8,
    },
}  # fmt: skip
CLIP_VISION = {
    "model_type": "clip_vision_model", "intermediate_size": 64, "patch_size": 32, **LANGUAGE,
}  # fmt: skip
LARGE = {"num_hidden_layers": 2, "patch_size": 48}  # for images of 336 pixels, and layer -2
DEEP = {"embed_dim": 32, "depth": 24, "num_heads": 2}  # timm's, of which the last six train


def small(path: Path, folder: Path) -> list[str]:
    """Overrides that leave the recipe alone and shrink data, towers and length."""
    config = load(path)
    large = config.transforms.center_crop.size == 336
    names = [f"drawn{i}" for i in range(len(config.data.train_name))]
    options = {"format": "shapes", "num_train": 32, "num_valid": 8, "image_size": 32}
    if path.parent.name == "vqa" and not config.data.prompt.template.startswith("t5_plain"):
        options["texts"] = "questions"
    if path.parent.name == "recognize" and config.data.labels.source == "given":
        options["texts"] = "labels"
    changed = {
        "data.data_path": str(folder / "data"),
        "data.datasets": {name: {**options, "seed": i} for i, name in enumerate(names)},
        "data.train_name": names,
        "data.valid_name": names[:1],
        "data.batch_size": 16,
        "data.batch_size_train": 8 if config.data.batch_size_train else None,
        "data.batch_size_val": 8,
        "data.train_steps": 2,
        "data.num_workers": 0,
        "epoch": 1,
        "ckpt.dir": str(folder / "output"),
        "log.tensorboard": False,
    }
    if path.parent.name == "vqa":
        changed |= {"model.init": None, "model.decoder.tokenizer.datasets": []}
    if path.parent.name == "recognize":
        changed |= {"eval.recognition.encoder": None, "ckpt.best_metric": None, "model.init": None}
    if config.model.image_encoder.init:
        changed["model.image_encoder.init"] = None
    if path.name in DECODERS:
        changed |= {
            "dist": None,
            "dist.precision": "fp32",
            "model.image_encoder.pretrained": False,
            "model.image_encoder.embedding_dim": None,
            "model.image_encoder.param": CLIP_VISION | (LARGE if large else {})
            if config.model.image_encoder.name == "huggingface"
            else DEEP,
            "model.decoder.tag": None,
            "model.decoder.pretrained": False,
            "model.decoder.config": DECODERS[path.name],
            "model.decoder.tokenizer.name": "bytes",
        }
    elif config.model.image_encoder.pretrained:
        changed |= {
            "model.image_encoder.pretrained": False,
            "model.image_encoder.embedding_dim": None,
            "model.image_encoder.tag": "vit_tiny_patch16_224",
            "model.image_encoder.param": {"embed_dim": 32, "depth": 1, "num_heads": 2},
            "model.text_encoder.tag": None,
            "model.text_encoder.pretrained": False,
            "model.text_encoder.embedding_dim": None,
            "model.text_encoder.config": {**BERT, "max_position_embeddings": 64},
        }
    return [f"{key}={json.dumps(value)}" for key, value in changed.items()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_trains(path, tmp_path, capsys):
    task = "linear_probe" if path.parent.name == "linear_probe" else path.parent.name
    code = launcher.main([f"--task={task}", f"--cfg={path}", *small(path, tmp_path)])
    assert code == 0, capsys.readouterr().err
    rows = [json.loads(line) for p in tmp_path.rglob("metrics.jsonl") for line in p.open()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)


def test_there_are_configs():
    assert {"shapes.yaml", "flickr8k.yaml", "zerovl.yaml"} <= {path.name for path in CONFIGS}


RECIPES = {
    "zerovl.yaml": {
        "runner.name": "plain", "data.train_type": "debias", "data.batch_size": 1024,
        "loss.name": "MixUpNCE", "loss.mixup.beta": 0.1, "loss.temperature.name": "parameter",
        "loss.temperature.value": 0.02, "loss.nce_loss.gather_backward": True,
        "model.projection.dim": 512, "model.text_encoder.max_length": 25,
        "transforms.text_augment.mask": 0.1, "transforms.text_augment.random": 0.02,
        "transforms.text_augment.delete": 0.08, "optim.lr.init": 1e-4,
        "optim.lr.warmup_proportion": 0.025, "optim.param": {
            "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.001,
        },
        "optim.lr.name": "cosine_schedule_with_warmup_min_lr_scale",
    },
    "zerovl_dga.yaml": {
        "runner.name": "clip_bsgs", "data.train_type": "debias", "data.batch_size": 16384,
        "data.batch_size_train": 1024, "loss.name": "MixUpNCE",
    },
    "shapes_debias.yaml": {"data.train_type": "debias", "loss.name": "NCE"},
    "shapes_dga.yaml": {
        "runner.name": "dga", "data.train_type": "debias", "loss.name": "MixUpNCE",
        "data.batch_size": 1024, "data.batch_size_train": 256,
    },
    "siglip.yaml": {
        "loss.name": "Sigmoid", "loss.sigmoid_loss.scale": 10.0, "loss.sigmoid_loss.bias": -10.0,
        "data.train_type": "shuffle",
    },
    "gcc_lora_base_attn_ffn.yaml": {
        "model.decoder.name": "t5_cross", "model.decoder.tag": "google/flan-t5-base",
        "model.connector.name": "linear", "model.connector.keep_cls": True,
        "model.lora": {"rank": 8, "alpha": 8.0, "rank_stabilised": True, "dropout": 0.1},
        "data.batch_size": 128, "optim.lr.init": 4e-5, "optim.lr.warmup_proportion": 0.2,
        "optim.lr.name": "linear_schedule_with_warmup", "optim.name": "torch.optim.AdamW",
        "optim.grad_clip": 1.0, "dist.precision": "bf16", "generate.num_beams": 10,
        "generate.method": "beam", "model.image_encoder.tag": "openai/clip-vit-base-patch16",
    },
    **{
        f"git_{name}.yaml": {
            "model.decoder.name": "causal", "model.decoder.tag": tag,
            "model.connector.name": "linear_norm", "model.connector.keep_cls": True,
            "model.lora": {"rank": 8, "alpha": 32.0, "rank_stabilised": False, "dropout": 0.01},
            "data.prompt.template": "instruction_answer", "dist.precision": "fp16",
            "optim.lr.init": 5e-5, "model.image_encoder.tag": "openai/clip-vit-base-patch16",
        }
        for name, tag in {
            "opt350m": "facebook/opt-350m", "llama2_7b": "meta-llama/Llama-2-7b-hf",
            "mpt_7b": "mosaicml/mpt-7b",
        }.items()
    },
    "clip_flant5_stage1.yaml": {
        "model.image_encoder.tag": "openai/clip-vit-large-patch14-336",
        "model.connector.name": "mlp2x_gelu", "model.connector.layer": -2,
        "model.connector.keep_cls": False,
        "model.decoder.name": "t5", "model.decoder.tag": "google/flan-t5-xxl",
        "model.decoder.max_length": 2048, "model.decoder.gradient_checkpointing": True,
        "data.prompt.template": "t5_plain_split_text", "data.prompt.tokenize": "reference",
        "dist.name": "deepspeed", "dist.param": {"zero_stage": 2},
        "transforms.image_aspect_ratio": "pad", "data.batch_size": 256, "optim.lr.init": 1e-2,
        "optim.param": {"weight_decay": 0.0}, "optim.lr.warmup_proportion": 0.03,
        "optim.lr.name": "cosine_schedule_with_warmup", "dist.precision": "bf16",
    },
    "clip_flant5_stage2.yaml": {
        "model.init": "./output/clip_flant5_stage1", "data.prompt.template": "t5_v1",
        "data.train_type": "modality_grouped", "data.batch_size": 96, "optim.lr.init": 2e-5,
        "data.prompt.tokenize": "reference", "model.connector.name": "mlp2x_gelu",
        "dist.name": "deepspeed", "dist.param": {"zero_stage": 3},
    },
    "nxtp_llama2_7b.yaml": {
        "model.image_encoder.tag": "vit_large_patch14_clip_quickgelu_224.openai",
        "model.connector.name": "linear_no_bias", "model.connector.layer": -1,
        "model.connector.keep_cls": False,
        "model.decoder.name": "truncated", "model.decoder.num_blocks": 6,
        "model.decoder.tag": "meta-llama/Llama-2-7b-hf", "model.decoder.mask": "nxtp",
        "model.decoder.image_token": "<|image|>", "data.labels.source": "nouns",
        "data.batch_size": 512, "optim.lr.init": 1e-5, "optim.lr.warmup_steps": 2000,
        "optim.param": {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.1}, "epoch.total": 3,
        "generate.method": "one_shot", "generate.num_labels": 10,
    },
    "lit.yaml": {
        "model.image_encoder.trainable": False, "model.image_encoder.pretrained": True,
        "model.text_encoder.trainable": True, "loss.name": "NCE",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_what_they_are_called(name):
    (path,) = (ROOT / "configs").glob(f"*/{name}")
    config = load(path).model_dump(mode="json")
    for key, value in RECIPES[name].items():
        found = config
        for part in key.split("."):
            found = found[part]
        assert found == value, key


def test_lit_leaves_the_image_tower_as_it_is(tmp_path, capsys):
    path = ROOT / "configs/clip/lit.yaml"
    every_step = ["ckpt.step_interval=1", "optim.lr.warmup_proportion=0", "data.exp_name=lit"]
    arguments = ["--task=clip", f"--cfg={path}", *small(path, tmp_path), *every_step]
    assert launcher.main(arguments) == 0, capsys.readouterr().err
    folder = tmp_path / "output/lit/checkpoints"
    first, second = (load_file(folder / f"step_{n}/model.safetensors") for n in (1, 2))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert not any(name.startswith("image_encoder.") for name in changed)
    assert any(name.startswith("text_encoder.") for name in changed)
    assert "image_projection.weight" in changed


ADAPTED = {  # adapters of one layer of the tiny model: pairs of matrices
    "gcc_lora_base_attn_ffn.yaml": 2 * 4 + 3,  # self- and cross-attention, feed-forward
    "git_opt350m.yaml": 3,
    "git_llama2_7b.yaml": 3,
    "git_mpt_7b.yaml": 1,  # one matrix for q, k and v
    "clip_flant5_stage2_lora.yaml": 2 * (4 + 3) + 4,  # encoder and decoder, cross-attention
}


@pytest.mark.parametrize("name", ADAPTED)
def test_recipes_adapt_the_layers_they_name(name, tmp_path, capsys):
    (path,) = (ROOT / "configs").glob(f"*/{name}")
    arguments = [f"--task={path.parent.name}", f"--cfg={path}", *small(path, tmp_path)]
    assert launcher.main([*arguments, "eval.epoch_interval=null"]) == 0, capsys.readouterr().err
    (folder,) = (tmp_path / "output").iterdir()
    saved = load_file(folder / "adapters" / "adapter_model.safetensors")
    adapters = [key for key in saved if ".lora_" in key]
    assert len(adapters) == 2 * ADAPTED[name]
    rest = {key.split(".")[0] for key in saved if ".lora_" not in key}
    assert rest == {"connector"}
    assert all(key.startswith("decoder.") for key in adapters)
