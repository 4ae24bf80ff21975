"""The models that judge what another one says, each opened when first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import UserError
from engine.run import Run

_ENCODER = "eval.recognition.encoder"


@dataclass
class Judges:
    """The judges that a run's configuration names."""

    run: Run
    opened: dict[str, Any] = field(default_factory=dict)

    def contrast(self, role: str) -> Any:
        """The ``ranker`` or ``scorer`` that ``generate`` names; None for none.

        A ranker is asked for by best_of_n alone, and by rank: clip of labels. Raises UserError.
        """
        chosen = self.run.config.generate
        name, key = getattr(chosen, role).model, f"generate.{role}.model"
        asks = {"rank: clip": chosen.rank == "clip", "best_of_n": chosen.method == "best_of_n"}
        asking = next((by for by, asks_for_one in asks.items() if asks_for_one), None)
        if role == "ranker" and asking is None:
            return None
        if name is None and role == "ranker":
            raise UserError(f"{asking} needs a model that chooses: a clip run or a CLIP", key=key)
        if name is None:
            return None
        if name not in self.opened:
            from engine.evals.clip_scorer import open_scorer  # with transformers

            self.opened[name] = open_scorer(name, key=key, run=self.run)
        return self.opened[name]

    def of_labels(self, task: Any, k: Sequence[int] = ()) -> tuple[Any, Any]:
        """Who ranks labels, and who tells how alike they are; None where nobody is asked.

        ``k`` are numbers of labels that are to be scored; without any nobody tells. Raises
        UserError for what cannot be had, or done.
        """
        from engine.evals.sentences import open_sentences  # with transformers
        from engine.generate import labels

        labels.check(self.run.config.generate, task.tokenizer.vocab_size)
        number = self.run.config.generate.num_labels
        if max(k, default=0) > number:
            raise UserError(
                f"figures at k {max(k)} are asked for, of {number} labels an image; raise "
                "generate.num_labels or leave that k out",
                key="eval.recognition.k",
            )
        name = self.run.config.eval.recognition.encoder
        if k and name is not None and _ENCODER not in self.opened:
            self.opened[_ENCODER] = open_sentences(name, key=_ENCODER, run=self.run)
        return self.contrast("ranker"), self.opened.get(_ENCODER)
