"""``--mode=eval``: score a checkpoint on every ``data.valid_name`` and labelled set."""

from __future__ import annotations

from engine.evals.evaluation import Evaluations
from engine.run import Run


def run(run: Run) -> None:
    """Print the table of figures, and add it to the run folder's ``evaluations.jsonl``."""
    Evaluations(run).score_run()
