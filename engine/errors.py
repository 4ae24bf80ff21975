"""User errors, which the user can correct, and faults, which stop a run."""

import os
import sys
import traceback
from collections.abc import Callable


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


def exit_code(work: Callable[[], int]) -> int:
    """What ``work`` returns; 2 for a user error and 1 for a fault, printed as one message."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except UserError as error:
        message, code = message_of(error), 2
    except FaultError as error:
        message, code = message_of(error), 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of what is printed has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it
        return 128 + 13
    except Exception:
        message, code = traceback.format_exc(), 1
    print(message.rstrip(), file=sys.stderr, flush=True)
    return code
