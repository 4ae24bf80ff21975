"""Put on a child's PYTHONPATH: engine.cli is this stand-in, so that launching is tested alone.

``--task`` chooses what a worker does.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

RANK = int(os.environ.get("RANK", "0"))


def say(line):
    os.write(1, f"{line}\n".encode())  # whole, so that lines of two ranks never mix


def show(arguments):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    environment = {name: os.environ.get(name) for name in names}
    shown = {"cfg": str(arguments.cfg), "mode": arguments.mode, "torch": "torch" in sys.modules}
    say(json.dumps({**shown, "overrides": arguments.overrides, **environment}))
    return 0


def reduce(arguments):
    import torch

    from engine.config.schema import Dist
    from engine.dist.launch import init_process_group, shutdown

    device = init_process_group(Dist(device="cpu", timeout_seconds=60))
    total = torch.tensor([RANK + 1.0], device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    say(f"rank {RANK} total {int(total)}")
    if arguments.mode == "check" and RANK == 1:
        from engine.errors import UserError

        raise UserError("only rank 1 sees this")
    if arguments.mode == "check":
        torch.distributed.all_reduce(total)
    shutdown()
    return 0


def mistake(arguments):
    from engine.errors import UserError

    raise UserError("data.batch_size is odd; correct it")


def fault(arguments):
    if RANK == 1:
        raise ValueError("broken inside")
    time.sleep(60)


def slow(arguments):
    """Rank 1 says what is wrong, and takes so long to end that rank 0 fails in between."""
    from engine.errors import UserError

    if RANK == 1:
        atexit.register(time.sleep, 20)
        raise UserError("only rank 1 sees this")
    time.sleep(2)
    raise RuntimeError("the other process went away")


def killed(arguments):
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def train(arguments):
    """Runs until a signal asks it to stop, then saves for a second; a second SIGINT ends it."""
    folder = Path(arguments.cfg).parent
    asked = []

    def ask(number, frame):
        asked.append(number)
        if asked.count(signal.SIGINT) > 1:
            os._exit(130)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    (folder / f"started_{RANK}").write_text(str(os.getpid()))
    while not asked:
        time.sleep(0.02)
    end = time.monotonic() + (60 if arguments.mode == "eval" else 1)
    (folder / f"saving_{RANK}").touch()
    while time.monotonic() < end:
        time.sleep(0.02)
    (folder / f"saved_{RANK}").write_text(str(len(asked)))
    return 0


TASKS = {task.__name__: task for task in (show, reduce, mistake, fault, slow, killed, train)}


@contextlib.contextmanager
def opened(arguments):
    yield lambda: TASKS[arguments.task](arguments)


module = types.ModuleType("engine.cli")
module.opened = opened
sys.modules["engine.cli"] = module
