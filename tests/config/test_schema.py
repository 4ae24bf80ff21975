import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from engine.config.__main__ import json_schema
from engine.config.explain import dotted_keys
from engine.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]


def test_sections_are_those_of_the_yaml():
    assert list(Config.model_fields)[:12] == [
        "task",
        "runner",
        "epoch",
        "dist",
        "log",
        "wandb",
        "ckpt",
        "optim",
        "data",
        "transforms",
        "model",
        "loss",
    ]
    assert {"data.batch_size", "loss.nce_loss.gather_backward"} <= set(dotted_keys())


def test_a_section_does_not_change_after_loading():
    config = Config()
    with pytest.raises(ValidationError):
        config.data.batch_size = 3


def test_true_is_not_a_number_but_words_are_truth_values():
    for values in ({"data": {"batch_size": True}}, {"transforms": {"normalize": {"mean": [True]}}}):
        with pytest.raises(ValidationError, match="true and false are not values here"):
            Config.model_validate(values)
    config = Config.model_validate(
        {"wandb": {"enable": "yes"}, "optim": {"param": {"fused": True}}}
    )
    assert config.wandb.enable is True
    assert config.optim.param == {"fused": True}


def test_the_json_schema_is_printed():
    command = [sys.executable, "-m", "engine.config"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    schema = json.loads(printed)
    assert schema == json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {*Config.model_fields, "base"}
    assert schema["properties"]["epoch"]["anyOf"][0] == {"type": "integer", "exclusiveMinimum": 0}
