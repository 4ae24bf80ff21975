"""The accumulation benchmarks run, and their truth table says what it is quoted for."""

import pytest

from tests.bench import dga, dga_truth


@pytest.mark.parametrize("loss", ["NCE", "Sigmoid"])
def test_our_gradients_are_the_truth_and_the_peers_scale_is_not(loss: str) -> None:
    ours = dga_truth.compare("ours", loss, 1, 4)
    assert all(error < 1e-10 for _, error in ours.values())
    assert ours.keys() == ({"weights", "scale"} if loss == "NCE" else {"weights", "scale", "bias"})
    peer = dga_truth.compare("open_clip", loss, 1, 4)
    assert peer["scale"][1] > 0.5


def test_ours_on_two_ranks() -> None:
    assert all(error < 1e-10 for _, error in dga_truth.compare("ours", "NCE", 2, 2).values())


def test_the_comparison_runs() -> None:
    row = dga.compare(2, rows=4, image_size=16, repeats=1)
    ours = {f"ours {kept}" for kept in ("keep 1", "keep all", "auto")}
    limits = {"limit keep 1", "limit keep all"}
    assert row["seconds"].keys() == ours | limits | {"gradcache", "open_clip"}


def test_one_kept_graph_costs_no_peak_memory() -> None:
    mib = dga.memory(4, sub_batch=4, image_size=224)
    assert mib["ours keep 1"] <= mib["gradcache"] < 1.3 * mib["plain"]
