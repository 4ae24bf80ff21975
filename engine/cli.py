"""What a worker does: train, evaluate, or check a configuration without training.

Exit codes: 0 done (also after a polite stop), 2 the user's mistake, 1 a fault.
"""

from __future__ import annotations

import sys
import traceback

from engine.config.load import Loaded, load
from engine.errors import FaultError, UserError


def main(arguments) -> int:
    """Run one worker; ``arguments`` are the launcher's. Returns the exit code."""
    loaded: Loaded | None = None
    try:
        loaded = load(arguments.cfg, arguments.overrides)
        from engine import run  # imports torch: after the configuration is known to be sound

        return run.run(arguments, loaded)
    except UserError as error:
        print(f"error: {located(error, loaded)}", file=sys.stderr)
        return 2
    except FaultError as error:
        print(f"fault: {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def located(error: UserError, loaded: Loaded | None) -> str:
    """The message, led by the file and line in which its key was written."""
    place = loaded.where(error.key) if loaded and error.key else None
    prefix = ": ".join(part for part in (place, error.key) if part)
    return f"{prefix}: {error}" if prefix else str(error)
