import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDIN = ROOT / "tests" / "standin"


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**kept, "PYTHONPATH": str(STANDIN), "OMP_NUM_THREADS": "1", **more}


def start(*flags, cfg="run.yaml", program=("launch.py",), env=None):
    command = [sys.executable, *program, f"--cfg={cfg}", *flags]
    pipe = subprocess.PIPE
    env = env or environment()
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process, seconds=90):
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still running after {seconds} s: {process.communicate()}")
    return process.returncode, out, err


def launch(*flags, **options):
    return finish(start(*flags, **options))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(paths, seconds=60):
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"waited {seconds} s for {paths}"
        time.sleep(0.02)


def test_help_answers_without_torch():
    program = (
        "import runpy, sys\n"
        "sys.argv = ['launch.py', '--help']\n"
        "try:\n    runpy.run_path('launch.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for flag in ("--task", "--cfg", "--mode", "--nproc_per_node", "section.key=value"):
        assert flag in done.stdout


def test_one_process_runs_in_place_with_overrides_anywhere():
    code, out, err = launch(
        "data.batch_size=8", "--task", "show", "epoch=2", "--exp_name=2024", "--mode=check"
    )
    assert code == 0, err
    shown = json.loads(out)
    assert shown["cfg"] == "run.yaml"
    assert shown["mode"] == "check"
    assert shown["overrides"] == ["data.batch_size=8", "epoch=2", 'data.exp_name="2024"']
    assert shown["RANK"] is None
    assert shown["torch"] is False, "the launcher itself needs no torch"


def test_several_processes_have_torchruns_environment():
    env = environment()
    del env["OMP_NUM_THREADS"]
    code, out, err = launch("--task=show", "--nproc_per_node=2", env=env)
    assert code == 0, err
    shown = sorted((json.loads(line) for line in out.splitlines()), key=lambda row: row["RANK"])
    assert [row["RANK"] for row in shown] == ["0", "1"]
    assert [row["LOCAL_RANK"] for row in shown] == ["0", "1"]
    assert {(row["WORLD_SIZE"], row["LOCAL_WORLD_SIZE"]) for row in shown} == {("2", "2")}
    assert shown[0]["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


@pytest.mark.parametrize("flags", [(), ("--nproc_per_node=2",)])
def test_processes_meet_in_a_process_group(flags):
    code, out, err = launch("--task=reduce", *flags)
    assert code == 0, err
    expected = ["rank 0 total 3", "rank 1 total 3"] if flags else ["rank 0 total 1"]
    assert sorted(out.splitlines()) == expected


def test_two_nodes_meet_through_our_own_flags():
    meeting = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    nodes = [start("--task=reduce", *meeting, f"--node_rank={rank}") for rank in (0, 1)]
    for rank, node in enumerate(nodes):
        code, out, err = finish(node)
        assert code == 0, err
        assert out.splitlines() == [f"rank {rank} total 3"]


def test_two_nodes_meet_through_torchrun():
    meeting = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    nodes = []
    for rank in (0, 1):
        program = ("-m", "torch.distributed.run", *meeting, f"--node_rank={rank}")
        program += ("--nproc_per_node=1", "launch.py")
        nodes.append(start("--task=reduce", program=program))
    for rank, node in enumerate(nodes):
        code, out, err = finish(node)
        assert code == 0, err
        assert out.splitlines() == [f"rank {rank} total 3"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task=show", "--mode=fly"), "argument --mode: invalid choice: 'fly'"),
        (("--task=show", "--nproc_per_nod=2"), "did you mean --nproc_per_node?"),
        (("--task=show", "--nproc_per_node=0"), "'0' is not a whole number of at least 1"),
        (("--task=show", "--nnodes=2"), "several nodes need a place to meet"),
        (("--task=show", "--node_rank=1"), "nodes are counted from 0"),
        ((), "the following arguments are required: --task"),
    ],
)
def test_mistaken_flags_are_one_message_and_exit_2(flags, message):
    code, out, err = launch(*flags)
    assert code == 2
    assert message in err
    assert err.startswith("command line: ")
    assert len(err.splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize("flags", [(), ("--nproc_per_node=3",)])
def test_a_users_mistake_is_printed_once_and_exits_2(flags):
    code, _, err = launch("--task=mistake", *flags)
    assert code == 2
    assert err == "data.batch_size is odd; correct it\n"


@pytest.mark.parametrize("task", ["reduce", "slow"])
def test_a_mistake_seen_by_one_rank_ends_the_others_without_their_noise(task):
    code, _, err = launch(f"--task={task}", "--mode=check", "--nproc_per_node=2")
    assert code == 2
    assert err.splitlines()[0] == "only rank 1 sees this"
    assert "Traceback" not in err


def test_a_fault_exits_1_with_one_traceback_and_no_one_waits():
    begin = time.monotonic()
    code, _, err = launch("--task=fault", "--nproc_per_node=2")
    assert code == 1
    assert err.count("Traceback") == 1
    assert err.endswith("ValueError: broken inside\n")
    assert time.monotonic() - begin < 40


def test_a_killed_worker_is_named():
    code, _, err = launch("--task=killed", "--nproc_per_node=2")
    assert code == 1
    assert err == (
        "launch.py: the process of rank 1 was killed by SIGKILL; most often memory ran out\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_reaches_every_worker_once_and_a_save_exits_0(tmp_path, number, count):
    process = start("--task=train", f"--nproc_per_node={count}", cfg=tmp_path / "run.yaml")
    wait_for([tmp_path / f"started_{rank}" for rank in range(count)])
    process.send_signal(number)
    code, _, err = finish(process)
    assert (code, err) == (0, "")
    saved = [(tmp_path / f"saved_{rank}").read_text() for rank in range(count)]
    assert saved == ["1"] * count, "signals that each worker saw"


def test_a_terminals_interrupt_of_the_whole_group_is_one_interrupt(tmp_path):
    pipe = subprocess.PIPE
    command = [sys.executable, "launch.py", "--task=train", "--nproc_per_node=2"]
    command += [f"--cfg={tmp_path / 'run.yaml'}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=pipe, text=True, start_new_session=True
    )
    wait_for([tmp_path / f"started_{rank}" for rank in range(2)])
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process)[0] == 0
    assert (tmp_path / "saved_0").read_text() == (tmp_path / "saved_1").read_text() == "1"


def test_a_second_interrupt_ends_all_with_130(tmp_path):
    cfg = tmp_path / "run.yaml"
    process = start("--task=train", "--mode=eval", "--nproc_per_node=2", cfg=cfg)
    wait_for([tmp_path / f"started_{rank}" for rank in range(2)])
    process.send_signal(signal.SIGINT)
    wait_for([tmp_path / f"saving_{rank}" for rank in range(2)])
    process.send_signal(signal.SIGINT)
    assert finish(process, seconds=30)[0] == 130
    assert not (tmp_path / "saved_0").exists()


def test_workers_save_and_end_when_the_launcher_is_killed(tmp_path):
    process = start("--task=train", "--nproc_per_node=2", cfg=tmp_path / "run.yaml")
    wait_for([tmp_path / f"started_{rank}" for rank in range(2)])
    process.kill()
    process.wait()
    wait_for([tmp_path / f"saved_{rank}" for rank in range(2)], seconds=20)
    process.communicate()
