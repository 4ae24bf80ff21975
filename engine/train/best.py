"""Which figure of an evaluation decides which checkpoint is the best."""

from __future__ import annotations

from engine.types import Metrics

# Of retrieval, captions, questions, labels, classes: the first that an evaluation has
_USUAL = ("RSUM", "CIDEr", "accuracy", "exact_F1@", "accuracy@1")


def best_metric(metrics: Metrics, name: str | None) -> float | None:
    """The figure called ``name`` (``DATASET/FIGURE``, or FIGURE of the first dataset that has it),
    else the first of those that are usual; None where there is none."""
    figures = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    if name is not None:
        if name in figures:
            return figures[name]
        return next((v for key, v in figures.items() if key.endswith(f"/{name}")), None)
    for usual in _USUAL:
        for key, value in figures.items():
            figure = key.partition("/")[2]
            if figure == usual or (usual.endswith("@") and figure.startswith(usual)):
                return value
    return None


def missing(metrics: Metrics, name: str | None) -> str | None:
    """What to say of an evaluation that has not the figure that ``ckpt.best_metric`` names."""
    if name is None or not metrics or best_metric(metrics, name) is not None:
        return None
    known = [key for key, value in metrics.items() if isinstance(value, int | float)]
    return (
        f"warning: ckpt.best_metric: no figure of the evaluation is called {name!r}, so that no "
        f"checkpoint is the best; there are {', '.join(known[:8])}{' …' if len(known) > 8 else ''}"
    )
