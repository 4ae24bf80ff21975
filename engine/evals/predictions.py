"""What was said of each image, and what of it is right word for word, or in content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.data.shapes import wording


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


def scene_scores(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Share, in percent, of drawn scenes told right: whole, and colours, shapes, counts, relation.

    Nothing for other data. A text that tells no scene has everything wrong.
    """
    pairs = [(wording.read(p.caption), wording.read(p.references[0])) for p in predictions]
    if any(true is None for _, true in pairs):
        return {}
    told = [(s, t) for s, t in pairs if s is not None and t is not None]
    share = 100 / len(pairs)
    right = {
        part: [
            all(getattr(getattr(s, g), part) == getattr(getattr(t, g), part)
                for g in ("first", "second"))
            for s, t in told
        ]
        for part in ("colour", "shape", "count", "size")
    }  # fmt: skip
    right["relation"] = [said.relation == true.relation for said, true in told]
    right["scene"] = [said == true for said, true in told]
    return {f"content_{name}": share * sum(hits) for name, hits in right.items()}
