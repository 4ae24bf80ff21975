"""A run that was stopped, however rudely, ends as one that was not."""

import random
import signal
import time

import pytest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_polite_stop_saves_and_goes_on_bit_for_bit(launch, name):
    launch("--exp_name=whole", "epoch=12")
    process = launch.start("--exp_name=stopped", "epoch=12")
    wait_for_rows(launch, process, "stopped", 5)
    process.send_signal(getattr(signal, name))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert f"{name}: saved at step" in printed
    launch("--exp_name=stopped", "epoch=12")
    assert launch.losses("stopped") == launch.losses("whole")
    assert launch.weights(48, "stopped") == launch.weights(48, "whole")


def kill_until_done(launch, exp_name: str, kills: int, *flags: str) -> int:
    """Kill -9 a run at random moments and start it again, ``kills`` times; then let it end."""
    rng = random.Random(0)
    killed = 0
    for _ in range(kills):
        process = launch.start(f"--exp_name={exp_name}", *flags)
        done = len(launch.rows(exp_name)) if (launch.output / exp_name).exists() else 0
        wait_for_rows(launch, process, exp_name, done + 1)
        time.sleep(rng.uniform(0.0, 0.4))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    launch(f"--exp_name={exp_name}", *flags)
    return killed


def wait_for_rows(launch, process, exp_name: str, rows: int, seconds: float = 120.0) -> None:
    path = launch.output / exp_name / "metrics.jsonl"
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.01)


def assert_killed_run_equals_whole(launch, kills: int, epochs: int) -> None:
    flags = (f"epoch={epochs}", "ckpt.step_interval=1", "eval.epoch_interval=null")
    launch("--exp_name=whole", *flags)
    killed = kill_until_done(launch, "killed", kills, *flags)
    assert killed >= kills // 2, "the run ended before it could be killed"
    steps = 4 * epochs
    assert launch.weights(steps, "killed") == launch.weights(steps, "whole")
    assert launch.losses("killed") == launch.losses("whole")


def test_kill_9_loses_nothing(launch):
    assert_killed_run_equals_whole(launch, kills=2, epochs=20)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(launch):
    assert_killed_run_equals_whole(launch, kills=20, epochs=100)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(launch):
    launch()
    newest = launch.output / "tiny" / "checkpoints" / "step_8" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(bytes(data))
    whole = launch.losses()
    done = launch()
    assert "step_8" in done.stdout + done.stderr and "damaged" in done.stdout + done.stderr
    assert "from step 6" in done.stdout
    assert launch.losses() == whole
