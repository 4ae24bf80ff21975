"""What was said of each image, and what of it is right word for word, or in content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Prediction:
    """An image's generated caption, and those that people gave it."""

    image_id: str
    row: int  # of the source
    caption: str
    references: list[str]
    candidates: list[str] = field(default_factory=list)  # of best_of_n
    cosines: list[float] = field(default_factory=list)  # of the candidates, by the ranker

    def to_json(self) -> dict[str, Any]:
        """A line of a predictions file."""
        told: dict[str, Any] = {"image_id": self.image_id, "caption": self.caption}
        if self.references:
            told["references"] = self.references
        if self.candidates:
            told |= {"candidates": self.candidates, "cosines": self.cosines}
        return told


def exact_match(predictions: Sequence[Prediction]) -> float:
    """Share, in percent, of captions that equal a reference but for case."""
    exact = [p.caption.lower() in {r.lower() for r in p.references} for p in predictions]
    return 100 * sum(exact) / len(exact)
