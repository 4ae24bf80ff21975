"""What one process of a run does: read the configuration, open the run, carry out its mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from engine.config.load import load_with_places
from engine.errors import UserError
from engine.flags import Arguments


@contextmanager
def opened(arguments: Arguments) -> Iterator[Callable[[], None]]:
    """The work that the arguments ask of this process, which joins the others for the block.

    Raises UserError, led by the file and line of the key that it is about, and FaultError.
    """
    named = arguments.task, arguments.mode
    loaded = load_with_places(arguments.cfg, arguments.overrides, named)
    try:
        # torch is imported only now, when the configuration is known to be sound
        from engine import registry
        from engine.dist.launch import init_process_group, shutdown
        from engine.run import Run
        from engine.train.signals import StopRequest

        mode = registry.find("modes", arguments.mode)
        with StopRequest(saves=False) as stop:
            device = init_process_group(loaded.config.dist)
            try:
                options = registry.options_of(mode, loaded.config.options)
                run = Run(arguments.task, loaded.config, device, stop)
                yield partial(mode.run, run, **options)
            finally:
                shutdown()
    except UserError as error:
        raise UserError(loaded.located(error), key=error.key) from error
