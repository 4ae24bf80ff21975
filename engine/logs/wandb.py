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
        self,
        config: schema.Wandb,
        run_dir: Path,
        settings: dict[str, Any],
        *,
        warn: Callable[[str], None],
        init_seconds: float = INIT_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self._config, self._run_dir, self._settings = config, run_dir, settings
        self._warn, self._init_seconds, self._close_seconds = warn, init_seconds, close_seconds
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
        """Wait until all is sent, at most ``close_seconds``."""
        if self._failed.is_set():
            return
        try:
            self._queue.put_nowait(None)
            self._thread.join(self._close_seconds)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._warn(f"warning: wandb had not sent all rows after {self._close_seconds:.0f} s")
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

        online = self._config.mode == "online"
        run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.name or self._run_dir.name,
            tags=list(self._config.tags),
            config=self._settings,
            dir=str(self._run_dir),
            mode=self._config.mode,
            id=_run_id(self._run_dir),
            resume="allow" if online else None,
            settings=wandb.Settings(
                init_timeout=self._init_seconds,
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
            ),
        )
        # Its own step counter refuses to go back, which a resumed run does.
        run.define_metric("*", step_metric="step")
        return run


def _images(examples: Sequence[Example]) -> list[Any]:
    import wandb

    return [
        wandb.Image(
            shown.image,
            caption="\n".join([*texts(shown), *(f"own: {own}" for own in shown.captions)]),
        )
        for shown in examples
    ]


def _run_id(run_dir: Path) -> str:
    path = run_dir / _ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
