"""What one process of a run does: read the configuration, then train, evaluate or check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config.load import Loaded, load_with_places
from engine.errors import UserError
from engine.flags import Arguments

if TYPE_CHECKING:  # torch is imported when the configuration is known to be sound
    from engine.setup import Setup


def main(arguments: Arguments) -> int:
    """Carry out ``arguments.mode`` in this process; returns the exit code.

    Raises UserError, led by the file and line of the key it hangs on, and FaultError.
    """
    loaded = load_with_places(arguments.cfg, arguments.overrides)
    try:
        return _work(arguments, loaded)
    except UserError as error:
        raise UserError(located(error, loaded), key=error.key) from error


def located(error: UserError, loaded: Loaded) -> str:
    """The message, led by the file and line in which its key was written, and the key."""
    if not error.key:
        return str(error)
    named = str(error).startswith(error.key)  # a message may open with its key
    return f"{loaded.where(error.key)}: {'' if named else error.key + ': '}{error}"


def _work(arguments: Arguments, loaded: Loaded) -> int:
    # torch is imported only now, when the configuration is known to be sound
    from engine import check, modes
    from engine.dist.launch import init_process_group, shutdown
    from engine.train.signals import StopRequest

    with StopRequest(saves=arguments.mode in ("train", "generate")) as stop:
        device = init_process_group(loaded.config.dist)
        try:
            setup = modes.Setup(arguments.task, loaded.config, device, stop)
            if arguments.mode == "check":
                check.check(setup)
            elif arguments.mode == "export":
                from engine import exporting

                exporting.export(setup)
            elif _answers(arguments, setup):
                from engine import answering  # with transformers, which takes a while to import

                answering.generate(setup)
            elif (arguments.mode, arguments.task) == ("generate", "recognize"):
                from engine import recognizing

                recognizing.generate(setup)
            elif arguments.mode == "generate":
                from engine import captioning  # with its scorers, which take a while to import

                captioning.generate(setup)
            elif arguments.task == "linear_probe":
                modes.probe(setup)
            elif arguments.mode == "eval":
                modes.evaluate(setup)
            else:
                modes.train(setup)
        finally:
            shutdown()
    return 0


def _answers(arguments: Arguments, setup: Setup) -> bool:
    """Whether questions are to be answered: a template of --task=vqa may speak captions."""
    asked = (arguments.mode, arguments.task) == ("generate", "vqa")
    return asked and "answer" in setup.task.modalities
