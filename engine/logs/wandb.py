"""Weights & Biases, off the step path: whatever it does, training neither waits nor fails.

Sign-in, upload and their time-outs happen in a thread that takes rows from a bounded queue. No
network, no account or no package: one line of warning, and the run continues without it.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.config import schema
from engine.logs.gallery import Example, texts

QUEUE_SIZE = 100_000  # rows: hours of steps while a network is down
INIT_SECONDS = 60.0
CLOSE_SECONDS = 60.0
_ID_FILE = "wandb_id"  # a resumed run continues the same W&B run


class Wandb:
    """Sends rows to Weights & Biases. No method raises, and only ``close`` waits (bounded)."""

    def __init__(
        self, config: schema.Wandb, run_dir: Path, settings: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._config, self._run_dir, self._settings, self._warn = config, run_dir, settings, warn
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(QUEUE_SIZE)
        self._dropped = 0
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def row(self, row: dict[str, Any]) -> None:
        """Queue a row; dropped and counted where W&B is hours behind."""
        self._put(lambda run: run.log(row))

    def examples(self, step: int, dataset: str, examples: Sequence[Example]) -> None:
        """Queue images with their texts beneath."""
        self._put(lambda run: run.log({"step": step, f"{dataset}/examples": _images(examples)}))

    def _put(self, send: Callable[[Any], None]) -> None:
        if self._failed.is_set():
            return
        try:
            self._queue.put_nowait(send)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait until all is sent, at most ``CLOSE_SECONDS``."""
        if self._failed.is_set():
            return
        try:
            self._queue.put_nowait(None)
            self._thread.join(CLOSE_SECONDS)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._warn(f"warning: wandb had not sent all rows after {CLOSE_SECONDS:.0f} s")
        elif self._dropped:
            self._warn(f"warning: wandb fell behind and missed {self._dropped} rows")

    def _work(self) -> None:
        try:
            run = self._open()
            while (send := self._queue.get()) is not None:
                send(run)
            run.finish()
        except BaseException as error:  # wandb raises its own kinds, SystemExit among them
            self._failed.set()
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._warn(
                f"warning: no Weights & Biases log ({reason}); metrics.jsonl has every row. "
                "wandb.mode=offline needs no network"
            )

    def _open(self) -> Any:
        import wandb

        config, known = self._config, self._run_dir / _ID_FILE
        if not known.exists():
            known.write_text(secrets.token_hex(4))
        run = wandb.init(
            project=config.project, entity=config.entity, name=config.name or self._run_dir.name,
            tags=list(config.tags), config=self._settings, dir=str(self._run_dir),
            mode=config.mode, id=known.read_text().strip(),
            resume="allow" if config.mode == "online" else None,
            settings=wandb.Settings(
                init_timeout=INIT_SECONDS, silent=True, console="off", save_code=False,
                disable_git=True,
            ),
        )  # fmt: skip
        # Its own step counter refuses to go back, which a resumed run does.
        run.define_metric("*", step_metric="step")
        return run


def _images(examples: Sequence[Example]) -> list[Any]:
    import wandb

    captions = ["\n".join([*texts(e), *(f"own: {own}" for own in e.captions)]) for e in examples]
    pairs = zip(examples, captions, strict=True)
    return [wandb.Image(shown.image, caption=caption) for shown, caption in pairs]
