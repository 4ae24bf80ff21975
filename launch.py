"""Start a run: python launch.py --task=clip --cfg=configs/clip/shapes.yaml [section.key=value …].

Exit codes: 0 done, 1 a fault, 2 a user error, 130 stopped by a second Ctrl-C.
"""

import os
import sys
from pathlib import Path

from engine.dist.workers import end_with_launcher, first_to_report, is_worker, run_workers
from engine.errors import reported
from engine.flags import parse
from engine.registry import names


def main(argv: list[str]) -> int:
    with reported(first_to_report) as outcome:
        arguments = parse(argv, tasks=list(names("tasks")), modes=list(names("modes")))
        several = arguments.nproc_per_node * arguments.nnodes > 1
        if several and not is_worker():
            return run_workers(Path(__file__).resolve(), argv, arguments)
        end_with_launcher()
        # Threads that spin between two operations take the data workers' cores: on two cores this
        # has cost a run five sixths of its speed. Read when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from engine.cli import opened  # imports torch

        with opened(arguments) as work:
            work()
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
