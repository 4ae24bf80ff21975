import socket

import pytest
import torch

from engine.config.schema import Dist
from engine.dist.launch import init_process_group, shutdown
from engine.errors import FaultError, UserError

RENDEZVOUS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)


def test_one_process_joins_nothing():
    assert init_process_group(Dist(device="cpu")) == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    shutdown()


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        init_process_group(Dist(device="cpu", num_threads=3))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_auto_follows_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert init_process_group(Dist()).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert init_process_group(Dist()) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("config", "key"),
    [(Dist(device="cuda"), "dist.device"), (Dist(device="cpu", backend="nccl"), "dist.backend")],
)
def test_devices_that_are_not_there(monkeypatch, config, key):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=";") as caught:
        init_process_group(config)
    assert caught.value.key == key


def test_a_world_without_a_meeting_place_is_a_mistake(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT; start the run with"):
        init_process_group(Dist(device="cpu"))


def test_processes_that_do_not_come_are_named(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in zip(RENDEZVOUS, ("2", "1", "1", "127.0.0.1", str(port)), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(FaultError, match=f"rank 1 could not meet .* at 127.0.0.1:{port} within 2"):
        init_process_group(Dist(device="cpu", timeout_seconds=2))
