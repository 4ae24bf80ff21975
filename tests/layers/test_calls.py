"""How far it is from ``launch.main`` to the loss, counted on the stack of real runs.

Counted are calls into the engine's own files; torch's frames between them are left out.
"""

import traceback
from pathlib import Path

import pytest

from engine.losses import language_model
from engine.losses.contrast import Contrast
from engine.models import vision_language
from tests.end_to_end.conftest import SMALL, Launcher

ROOT = Path(__file__).parents[2]
CAPTION = ROOT / "configs" / "caption" / "shapes_causal.yaml"


def calls(stack: traceback.StackSummary) -> list[str]:
    """The engine's functions on the stack below ``launch.main``, the loss's own one the last."""
    own = ROOT / "engine", ROOT / "launch.py"  # a virtual environment may be in the checkout
    names = [f"{Path(f.filename).relative_to(ROOT)}:{f.name}" for f in stack
             if any(map(Path(f.filename).is_relative_to, own))]  # fmt: skip
    return names[names.index("launch.py:main") + 1 :]


@pytest.fixture
def launch(tmp_path):
    return Launcher(tmp_path / "data", tmp_path / "output")


@pytest.mark.parametrize(("step", "most"), [("plain", 5), ("dga", 6)])
def test_clip_is_five_calls_from_its_loss(launch, monkeypatch, step, most):
    """dga computes the loss as a part of its own, which may be run again: one call more."""
    seen = []
    compute = Contrast.__call__

    def recorded(self, features):
        seen.append(traceback.extract_stack()[:-1])
        return compute(self, features)

    monkeypatch.setattr(Contrast, "__call__", recorded)
    launch("epoch=1", "data.train_steps=1", "eval.epoch_interval=null", f"runner.name={step}",
           "data.batch_size_train=6")  # fmt: skip
    found = [*calls(seen[0]), "the loss"]
    assert len(found) <= most, found


def test_captions_are_six_calls_from_their_loss(launch, monkeypatch):
    seen = []

    def recorded(*given, **options):
        seen.append(traceback.extract_stack()[:-1])
        return language_model.row_losses(*given, **options)

    monkeypatch.setattr(vision_language, "row_losses", recorded)
    launch(*SMALL, "data.train_steps=1", cfg=CAPTION)
    found = [*calls(seen[0]), "the loss"]
    assert len(found) <= 6, found
