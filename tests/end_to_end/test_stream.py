"""Runs on shards that are streamed: over HTTP and from commands, stopped, broken and refused."""

import json
import shlex
import shutil

import pytest

from tests.data.stream.shard_server import serve, write_shards
from tests.end_to_end.test_resume import kill_until_done

SIZES = [12] * 6
FLAGS = (
    *("data.datasets.web.format=webdataset", "data.datasets.web.window=16"),
    *("data.train_name=[web]", "data.valid_name=[]", "epoch=2", "ckpt.keep_last=99"),
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.stream.open._FIRST_PAUSE", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(tmp_path / "shards", SIZES)
    with serve(tmp_path / "shards") as server:
        yield server


def over_http(server, *more):
    urls = f"{server.url}/{{00000..{len(SIZES) - 1:05d}}}.tar"
    return (*FLAGS, f"data.datasets.web.train={json.dumps(urls)}", *more)


def forget_after(launch, exp_name, step):
    for folder in (launch.output / exp_name / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_is_exact(launch, server, workers):
    flags = over_http(server, f"data.num_workers={workers}")
    first = launch("--exp_name=whole", *flags)
    assert "6 shards, 1 × " in first.stdout
    assert "a resume is exact on as many" in first.stdout
    losses, weights = launch.losses("whole"), launch.weights(12, "whole")
    assert len(losses) == 12
    forget_after(launch, "whole", 3)
    again = launch("--exp_name=whole", *flags)
    assert "from step 3" in again.stdout
    assert "resumed exactly where it stopped" in again.stdout
    assert launch.losses("whole") == losses
    assert launch.weights(12, "whole") == weights


def test_a_resume_with_other_workers_says_so(launch, server):
    launch("--exp_name=moved", *over_http(server, "data.num_workers=2"))
    forget_after(launch, "moved", 3)
    again = launch("--exp_name=moved", *over_http(server, "data.num_workers=3"))
    assert "1 × 3 processes × workers, 1 × 2 before; resumed at least once" in again.stdout
    assert len(launch.losses("moved")) == 12


def test_other_shards_are_no_continuation(launch, server):
    launch(*over_http(server))
    forget_after(launch, "tiny", 3)
    done = launch(*over_http(server, "data.datasets.web.window=20"), code=2)
    assert "what the order of samples depends on has changed\n  streamed shards" in done.stderr


@pytest.mark.slow
def test_two_processes_go_on_exactly_too(launch, server):
    flags = ("--exp_name=two", "--nproc_per_node=2", *over_http(server, "data.num_workers=1"))
    assert "6 shards, 2 × 1 processes × workers" in launch(*flags).stdout
    losses, weights = launch.losses("two"), launch.weights(12, "two")
    assert len(losses) == 12
    forget_after(launch, "two", 3)
    assert "resumed exactly where it stopped" in launch(*flags).stdout
    assert launch.losses("two") == losses
    assert launch.weights(12, "two") == weights
    forget_after(launch, "two", 3)
    alone = over_http(server, "data.num_workers=1")
    assert "2 × 1 before; resumed at least once" in launch("--exp_name=two", *alone).stdout
    assert len(launch.losses("two")) == 12


def test_commands_run_only_where_they_are_allowed(launch, server, tmp_path):
    command = shlex.join(["cat", str(tmp_path / "shards")])
    urls = f"data.datasets.web.train={json.dumps(f'pipe:{command}/{{00000..00005}}.tar')}"
    done = launch(*FLAGS, urls, code=2)
    assert "would run a command on this machine" in done.stderr
    assert "allow_pipe: true" in done.stderr
    assert "data.datasets.web.train" in done.stderr
    assert not launch.output.exists()
    launch(*FLAGS, urls, "data.datasets.web.allow_pipe=true", "epoch=1")
    assert len(launch.losses()) == 6


def test_a_shard_that_breaks_for_good_is_named_and_the_rest_is_used(launch, server, tmp_path):
    flags = over_http(server, "data.datasets.web.length=72", "data.max_bad_fraction=0.5")
    server.status["00002.tar"] = 500
    torn = tmp_path / "shards" / "00004.tar"
    torn.write_bytes(torn.read_bytes()[:9000])
    server.cuts["00001.tar"] = [3000]
    launch(*flags, "epoch=1")
    lines = (launch.output / "tiny" / "bad_samples.jsonl").read_text().splitlines()
    bad = {row["key"].rpartition("/")[2]: row for row in map(json.loads, lines)}
    assert {name: row["cause"] for name, row in bad.items()} == {
        "00002.tar": "unreadable",
        "00004.tar": "truncated shard",
    }
    assert "HTTP 500" in bad["00002.tar"]["detail"]


def test_a_loss_that_is_not_finite_names_its_samples(launch, server):
    done = launch(*over_http(server, "optim.lr.init=1e30"), code=1)
    assert "samples of the step (12, all in " in done.stderr
    (told,) = (launch.output / "tiny").glob("nonfinite_step_*.json")
    names = json.loads(told.read_text())
    assert len(set(names)) == 12
    assert all(name.startswith(f"web[{server.url}/0000") for name in names)
    assert names[0] in done.stderr


def test_check_reads_a_few_samples(launch, server):
    done = launch(*over_http(server), "--mode=check")
    assert "web: 72 samples" in done.stdout
    assert "training compute" in done.stdout
    assert not launch.output.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["data.train_type=sequential"], "streamed datasets have no rows for data.train_type"),
        (["data.train_name=[web, tiny]"], "streamed datasets (web) beside others"),
        (["data.num_workers=7"], "6 streamed shards are too few for 1 processes with"),
        (["data.batch_size=100"], "data.batch_size is 100, but the training data has 72"),
    ],
)
def test_mistakes_are_told(launch, server, flags, told):
    assert told in launch(*over_http(server), *flags, code=2).stderr


def test_a_validation_split_is_copied_once_and_scored(launch, server, tmp_path):
    valid = f"data.datasets.web.valid={server.url}/00005.tar"
    flags = over_http(server, valid, "data.valid_name=[web]", "epoch=1")
    done = launch(*flags)
    assert "web: copying 1 shards to " in done.stdout
    row = next(row for row in launch.rows() if "web/RSUM" in row)
    asked = len(server.requests)
    launch(*flags, "--mode=eval")
    assert len(server.requests) == asked
    told = (launch.output / "tiny" / "evaluations.jsonl").read_text()
    assert json.loads(told)["web/RSUM"] == row["web/RSUM"]


def test_shards_of_this_machine_are_streamed_if_asked(launch, server, tmp_path):
    shards = f"data.datasets.web.train={tmp_path / 'shards'}/*.tar"
    assert "streamed" not in launch("--exp_name=rows", *FLAGS, shards, "epoch=1").stdout
    done = launch("--exp_name=streamed", *FLAGS, shards, "data.datasets.web.stream=true", "epoch=1")
    assert "streamed: 6 shards" in done.stdout
    assert len(launch.losses("rows")) == len(launch.losses("streamed")) == 6


@pytest.mark.slow
def test_kill_9_loses_nothing(launch, server):
    flags = over_http(server, "data.num_workers=2", "ckpt.step_interval=1", "epoch=20")
    launch("--exp_name=whole", *flags)
    assert kill_until_done(launch, "killed", 4, *flags) >= 2
    assert launch.losses("killed") == launch.losses("whole")
    assert launch.weights(120, "killed") == launch.weights(120, "whole")
