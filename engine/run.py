"""Put a run together from its configuration, and carry it out in one of its modes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from engine import registry
from engine.config.load import Loaded, resolved_yaml
from engine.config.schema import Config
from engine.data.bad_samples import BadSamples
from engine.data.sources import open_source
from engine.data.text import tokenizer as tokenizers
from engine.dist import collectives
from engine.dist.launch import init_process_group, shutdown
from engine.errors import UserError
from engine.evals.run import evaluate
from engine.logs.run_log import RunLog
from engine.train.checkpoint import CheckpointStore, load_model, open_checkpoint
from engine.train.loop import Training
from engine.train.plan import make_plan, order_key
from engine.train.precision import Precision
from engine.train.signals import StopRequest
from engine.train.state import make_state
from engine.types import Metrics


def run(arguments, loaded: Loaded) -> int:
    """Carry out ``arguments.mode``; returns the exit code."""
