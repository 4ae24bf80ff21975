"""A whole run as a user starts it: train, evaluate, check, run its own config again."""

import torch
import yaml
from safetensors.torch import load


def test_training_leaves_a_whole_run_folder(launch):
    printed = launch("log.tensorboard=true").stdout
    run = launch.output / "tiny"
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "checkpoints", "tokenizer", "report.html",
    }  # fmt: skip
    assert list(run.glob("events.*"))
    assert "text_to_image_R@1" in printed and "8/8" in printed
    rows = launch.rows()
    training = [row for row in rows if "lr" in row]
    assert [row["step"] for row in training] == list(range(1, 9))
    assert {"epoch", "loss", "lr", "samples_per_second", "data_wait"} <= set(training[0])
    scored = [row for row in rows if "tiny/RSUM" in row]
    assert [row["step"] for row in scored] == [4, 8]
    assert {"tiny/image_to_text_R@1", "tiny/text_to_image_R@10"} <= set(scored[0])


def test_eval_mode_gives_the_figures_of_training(launch):
    launch()
    trained = next(row for row in reversed(launch.rows()) if "tiny/RSUM" in row)
    before = (launch.output / "tiny" / "metrics.jsonl").read_bytes()
    launch("--mode=eval", f"ckpt.resume={launch.output / 'tiny'}")
    lines = (launch.output / "tiny" / "evaluations.jsonl").read_text().splitlines()
    evaluated = yaml.safe_load(lines[-1])
    figures = {key: value for key, value in trained.items() if key.startswith("tiny/")}
    assert {key: evaluated[key] for key in figures} == figures
    assert (launch.output / "tiny" / "metrics.jsonl").read_bytes() == before


def test_saved_config_runs_again_to_the_same_losses(launch):
    launch()
    saved = launch.output / "tiny" / "config.yaml"
    launch("--exp_name=again", cfg=saved)
    assert launch.losses("again") == launch.losses()


def test_check_mode_tells_everything_and_writes_nothing(launch):
    printed = launch("--mode=check", "model.text_encoder.tokenizer.name=bpe").stdout
    for told in ("batch_size: 12", "image_encoder", "trained", "steps: 4 an epoch × 2 = 8",
                 "training compute", "memory of a device"):  # fmt: skip
        assert told in printed, told
    assert not launch.output.exists()


def test_train_steps_bounds_an_epoch(launch):
    launch("data.train_steps=2")
    assert len(launch.losses()) == 4


def test_a_run_can_be_started_from_the_weights_of_another(launch):
    launch("epoch=1")
    start = f"model.init={launch.output / 'tiny'}"
    launch("--exp_name=second", "epoch=1", start, "optim.lr.init=1e-12")
    first, second = load(launch.weights(4)), load(launch.weights(4, "second"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-8)
