"""The Slurm script, with an srun that starts both nodes on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "configs" / "slurm" / "train.sbatch"
NODES = 2
SRUN = f"""#!/bin/bash
# As srun does: the command once a node, and every signal on to all of them
echo "$1" >"$SLURM_FAKE/asked"
shift
for node in $(seq 0 {NODES - 1}); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
signals=0
trap 'signals=1; kill -TERM "${{tasks[@]}}"' TERM
code=0
for task in "${{tasks[@]}}"; do
    wait "$task"; ended=$?
    if ((signals == 1)); then signals=2; wait "$task"; ended=$?; fi
    ((ended > code)) && code=$ended
done
exit $code
"""
SCONTROL = """#!/bin/bash
case "$1" in
show) printf '127.0.0.1\\nlocalhost\\n' ;;
requeue) echo "$2" >>"$SLURM_FAKE/requeued" ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def sbatch(tmp_path):
    """Starts the script as a job of two nodes with two GPUs each."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_FAKE": str(tmp_path),
        "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "tests" / "standin"),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_NNODES": str(NODES), "SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def start(*flags):
        command = ["bash", str(SCRIPT), f"--cfg={tmp_path / 'run.yaml'}", *flags]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    return start


def test_it_is_bash_and_asks_for_a_signal_to_itself_in_time():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if "#SBATCH" in line]
    assert {"--signal=B:TERM@300", "--requeue", "--ntasks-per-node=1"} <= set(options)


def test_every_process_knows_its_place_and_all_meet(sbatch, tmp_path):
    shown, err = sbatch(
        "--task=show", "data.batch_size=8", "dist.param={zero_stage: 3}"
    ).communicate(timeout=90)
    rows = sorted((json.loads(line) for line in shown.splitlines()), key=lambda row: row["RANK"])
    assert [row["RANK"] for row in rows] == ["0", "1", "2", "3"], err
    assert [row["LOCAL_RANK"] for row in rows] == ["0", "1", "0", "1"]
    assert {(row["WORLD_SIZE"], row["LOCAL_WORLD_SIZE"]) for row in rows} == {("4", "2")}
    assert {tuple(row["overrides"]) for row in rows} == {
        ("data.batch_size=8", "dist.param={zero_stage: 3}")
    }
    assert (tmp_path / "asked").read_text() == "--kill-on-bad-exit=1\n"
    reduced, err = sbatch("--task=reduce").communicate(timeout=90)
    assert sorted(reduced.splitlines()) == [f"rank {rank} total 10" for rank in range(4)], err
    assert not (tmp_path / "requeued").exists()


def test_before_the_time_is_up_every_rank_saves_and_the_job_is_queued_again(sbatch, tmp_path):
    job = sbatch("--task=train")
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("started_*"))) < 4:
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in range(4)] == ["1"] * 4
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"


def test_a_mistake_is_not_tried_again(sbatch, tmp_path):
    job = sbatch("--task=mistake")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "data.batch_size is odd; correct it" in err
    assert not (tmp_path / "requeued").exists()
