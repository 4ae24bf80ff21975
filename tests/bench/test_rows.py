"""Every row of the benchmarks runs, and what it compares is equal; no time is looked at."""

from pathlib import Path

import pytest
import torch

from tests.bench import __main__ as bench
from tests.bench import ablation, learning, runs, table, text

QUICK = table.Options(quick=True, threads=1, repeats=1)


@pytest.mark.parametrize("name", [name for name in bench.ROWS if name not in bench.LONG])
def test_row_runs(name: str) -> None:
    lines = list(bench.ROWS[name](QUICK))
    assert lines and all(line.ours is not None and line.ours >= 0 for line in lines)
    marked = [line for line in lines if line.mark]
    assert all(line.met is not None for line in marked)
    assert marked or name == "loss"  # whose marks are for large batches


@pytest.mark.slow
@pytest.mark.parametrize("towers", ["same", "own"])
def test_learning_row_runs(towers: str) -> None:
    lines = list(learning.rows(QUICK, towers=[towers]))
    rsum = [line for line in lines if line.what.startswith("RSUM")]
    assert len(rsum) == 2 and all(line.ours and line.peer for line in rsum)
    flops = next(line for line in lines if line.unit == "TFLOP")
    assert flops.ours and flops.peer and 0.5 < flops.ours / flops.peer < 2


@pytest.mark.slow
def test_ablation_runs_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--quick", "--seeds", "0", "--methods", "debias", "--threads", "1"]
    argv += ["--keep", str(tmp_path), "--output", str(tmp_path / "table.md")]
    ablation.main(argv)
    first = (tmp_path / "table.md").read_text()
    assert "| baseline" in first and "| debias" in first
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    ablation.main(argv)  # from what was kept
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == before
    with pytest.raises(SystemExit, match="other settings"):
        ablation.main([*argv, "optim.lr.init=1e-4"])


def test_lines_know_whether_they_meet_their_mark() -> None:
    assert table.Line("a", ratio=0.97, mark="≥ 0.97").met
    assert table.Line("a", ratio=0.96, mark="≥ 0.97").met is False
    assert table.Line("a", ratio=0.7, mark="≤ 0.70").met
    assert table.Line("a", ratio=0.7).met is None
    assert table.Line("a", 1234.5, 0.12345, unit="ms").cells()[2:4] == ("1,234 ms", "0.1235 ms")
    head, rule, row = table.table([table.Line("x", 1.0, ratio=2.0, spread=0.05)]).splitlines()
    assert len(head) == len(rule) == len(row) and "2 ± 5%" in row


def test_unknown_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["lose"])
    assert "lose" in capsys.readouterr().err


def test_captions_are_as_long_as_quoted() -> None:
    batch = text.make_batch(512, 8)
    lengths = batch["attention_mask_BT"].sum(1)
    assert abs(float(lengths.float().mean()) - text.MEAN_TOKENS) < 1
    assert lengths.min() >= 8 and lengths.max() <= 40
    assert (batch["input_ids_BT"].ne(0) == batch["attention_mask_BT"].bool()).all()
    assert text.padded(batch)["input_ids_BT"].shape == (512, 77)


def test_a_difference_between_the_sides_is_found() -> None:
    model = text.make_model(quick=True)
    batch = text.make_batch(8, 64)
    other = text.make_batch(8, 64, 499)
    work = [text.tower(model, b, 2, trimmed=t) for b, t in ((batch, True), (other, False))]
    with pytest.raises(AssertionError):
        text.assert_equal(model, work)


def test_methods_of_the_study() -> None:
    one = {name: ablation.method(name, 64, 16) for name in ("baseline", "debias", "mixup", "dga")}
    assert one["baseline"] == {}
    assert one["dga"]["data.batch_size"] == 64 and one["dga"]["data.batch_size_train"] == 16
    assert ablation.method("all", 64, 16) == one["debias"] | one["mixup"] | one["dga"]
    options = ablation.parse(["--tune", "dga:optim.lr.init=2e-3", "--", "epoch=3"])
    assert options.tuned == {"dga": {"optim.lr.init": 2e-3}}
    assert options.changed == {"epoch": 3}
    with pytest.raises(SystemExit):
        ablation.parse(["--tune", "none:epoch=3"])


def test_a_methods_gain_is_counted_seed_by_seed() -> None:
    baseline = [ablation.Score(recall, 100.0, 5.0) for recall in (10.0, 20.0, 30.0)]
    better = [ablation.Score(recall, 110.0, 6.0) for recall in (11.0, 19.0, 33.0)]
    cells = ablation.row("mixup", better, baseline)
    assert cells[:6] == ("mixup", "11.00", "19.00", "33.00", "21.00", "+1.00")
    assert cells[6] == "2/3"
    assert ablation.row("baseline", baseline, baseline)[5:7] == ("", "")


def test_rsum_is_the_mean_over_sets_without_shuffled_captions() -> None:
    metrics = {"a/RSUM": 10.0, "b/RSUM": 20.0, "a/shuffled_words/RSUM": 90.0, "a/R@1": 5.0}
    assert learning.rsum(metrics) == 15.0


def test_flops_are_counted_with_attention(tmp_path: Path) -> None:
    path, values = runs.settings(QUICK, tmp_path)
    config = runs.configuration(path, values | {"data.num_workers": 0})
    torch.set_num_threads(1)
    each, per_epoch = learning.ours_flop(config)
    assert per_epoch == 4  # 48 drawn scenes in batches of 12
    weights = 12 * 32 * 32  # of one layer of either tower
    tokens = 12 * 5  # the image's alone
    assert each > 6 * weights * tokens


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no mode is called dance"):
        command = ["sh", "-c", "echo no mode is called dance; exit 3"]
        runs.run_process(command, tmp_path / "log.txt", 1)
