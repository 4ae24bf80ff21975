"""Saving while training continues, and continuing from what was saved."""

import os
import threading

import pytest
import torch

from engine.errors import FaultError
from engine.train import checkpoint
from engine.train.checkpoint import CheckpointStore, open_checkpoint


def save(store, step, **options):
    return store.save(step, model={"w": torch.ones(3)}, state={}, config_text="", **options)


def test_in_the_background_the_saved_moment_is_kept(tmp_path, monkeypatch):
    release, write = threading.Event(), checkpoint.Snapshot.write

    def slowly(self, folder):
        release.wait(10)
        write(self, folder)

    monkeypatch.setattr(checkpoint.Snapshot, "write", slowly)
    weight, state = torch.zeros(10), {"seen": [1]}
    with CheckpointStore(tmp_path) as store:
        store.save(1, model={"w": weight}, state=state, config_text="")
        weight += 1
        state["seen"].append(2)
        assert store.steps() == []
        release.set()
        store.save(2, model={"w": weight}, state=state, config_text="")
        assert 1 in store.steps()  # the second waited for the first
    for step, seen in ((1, [1]), (2, [1, 2])):
        saved = open_checkpoint(tmp_path / f"step_{step}")
        assert saved.model()["w"].sum() == 10 * (step - 1) and saved.state() == {"seen": seen}


def test_a_failure_in_the_background_comes_with_the_next_call(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Snapshot, "write", lambda *_: os.open("/nowhere/x", 0))
        save(store, 1)
        with pytest.raises(FaultError, match="step_1 could not be saved"):
            save(store, 2)
        store.settle()
        with pytest.raises(KeyError) as caught, store:  # what broke off the run comes first
            save(store, 3)
            raise KeyError
    assert "step_3 could not be saved" in caught.value.__notes__[0]
    save(store, 4)
    store.wait()
    assert store.steps() == [4]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.98), "amsgrad": True}),
        (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    ],
)
@pytest.mark.parametrize("copy", [False, True])
def test_an_optimizer_continues_exactly(tmp_path, make, options, copy):
    def build():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
        groups = [{"params": net[0].parameters(), "lr_scale": 0.1}, {"params": net[2].parameters()}]
        return net, make(groups, **options)

    def train(net, optimizer, steps):
        for step in steps:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    net, optimizer = build()
    with CheckpointStore(tmp_path) as store:
        train(net, optimizer, range(5))
        store.save(5, model=net.state_dict(), state={"optimizer": optimizer.state_dict()},
                   config_text="", copy=copy)  # fmt: skip
        if not copy:
            store.wait()  # nothing may change what is not copied
        train(net, optimizer, range(5, 10))
    resumed, resumed_optimizer = build()
    saved = open_checkpoint(tmp_path)
    resumed.load_state_dict(saved.model())
    resumed_optimizer.load_state_dict(saved.state()["optimizer"])
    train(resumed, resumed_optimizer, range(5, 10))
    assert all(map(torch.equal, net.parameters(), resumed.parameters()))
    assert resumed_optimizer.param_groups[0]["lr_scale"] == 0.1
