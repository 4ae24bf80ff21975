"""User errors, which the user can correct, and faults, which stop a run."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class UserError(Exception):
    """An error that the user can correct: printed as one message without a traceback, exit code 2.

    The message names the thing, its value, the place and the remedy. ``key`` is the dotted
    configuration path that it is about, where there is one: the command line then adds the file
    and line in which the user wrote it.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class FaultError(RuntimeError):
    """A run cannot continue for a reason outside its configuration (a NaN loss, say): exit code 1.

    Printed without a traceback, because the message holds all that is known.
    """


def message_of(error: Exception) -> str:
    """The error's text, and the notes that were added to it on its way."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def first_line(error: Exception) -> str:
    """The error's first line; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass
class Outcome:
    """How a program's work ended: its exit code."""

    code: int = 0


@contextmanager
def reported(prints: Callable[[int], bool] = lambda code: True) -> Iterator[Outcome]:
    """Around a program's work: an error is printed as one message and becomes the exit code.

    2 is for a user error, 1 for a fault. ``prints`` says by the code whether this process prints.
    """
    outcome = Outcome()
    try:
        yield outcome
        sys.stdout.flush()
        return
    except UserError as error:
        message, outcome.code = message_of(error), 2
    except FaultError as error:
        message, outcome.code = message_of(error), 1
    except KeyboardInterrupt:
        outcome.code = 130
        return
    except BrokenPipeError:  # the reader of what is printed has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it
        outcome.code = 128 + 13
        return
    except Exception:
        message, outcome.code = traceback.format_exc(), 1
    if prints(outcome.code):
        print(message.rstrip(), file=sys.stderr, flush=True)


def exit_code(work: Callable[[], int]) -> int:
    """What ``work`` returns, or the code of the error that it raises, as ``reported``."""
    with reported() as outcome:
        outcome.code = work()
    return outcome.code
