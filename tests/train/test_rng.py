"""Seeds are pure functions, and what is drawn from them disturbs no one."""

import pytest
import torch

from engine.train import rng

CPU = torch.device("cpu")


def test_derive_hangs_on_each_number_and_their_order() -> None:
    assert rng.derive(1, 2, 3) == rng.derive(1, 2, 3)
    seeds = {
        rng.derive(seed, step, rank, part)
        for seed in range(5)
        for step in range(10)
        for rank in range(4)
        for part in range(4)
    }
    assert len(seeds) == 800
    assert len({rng.derive(1, 23), rng.derive(12, 3), rng.derive(123), rng.derive(1, 2, 3)}) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derive_is_the_same_in_every_version() -> None:
    assert rng.derive(0, 1, 2) == 4529435921577843265


def test_isolated_repeats_and_restores() -> None:
    torch.manual_seed(5)
    want = torch.rand(4)
    torch.manual_seed(5)
    with rng.isolated(7, CPU):
        inside = torch.rand(3)
        with rng.isolated(8, CPU):
            assert not torch.equal(torch.rand(3), inside)
        torch.rand(1)
    assert torch.equal(torch.rand(4), want)
    with rng.isolated(7, CPU):
        assert torch.equal(torch.rand(3), inside)


def test_isolated_restores_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="within"), rng.isolated(7, CPU):
        torch.rand(3)
        raise ValueError("within")
    assert torch.equal(torch.get_rng_state(), state)


def test_isolated_does_not_seed_other_devices_generators() -> None:
    other = torch.Generator().manual_seed(1)
    state = other.get_state()
    with rng.isolated(7, CPU):
        torch.rand(3)
    assert torch.equal(other.get_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_isolated_on_cuda() -> None:
    device = torch.device("cuda", 0)
    state = torch.cuda.get_rng_state(device)
    with rng.isolated(7, device):
        first = torch.rand(3, device=device)
    with rng.isolated(7, device):
        assert torch.equal(torch.rand(3, device=device), first)
    assert torch.equal(torch.cuda.get_rng_state(device), state)
