"""Every shipped YAML trains: its own recipe, on a handful of drawn scenes and with tiny towers."""

import json
from pathlib import Path

import pytest

import launch as launcher
from engine.config.load import load

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip


def small(path: Path, folder: Path) -> list[str]:
    """Overrides that leave the recipe alone and shrink data, towers and length."""
    config = load(path)
    names = [f"drawn{i}" for i in range(len(config.data.train_name))]
    options = {"format": "shapes", "num_train": 32, "num_valid": 8, "image_size": 32}
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
    if config.model.image_encoder.pretrained:
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
