"""Questions as a user asks them: evaluation, a file of questions, scores of a CSV, mistakes."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from engine.evals import vqa as vqa_answers
from engine.evals import vqa_score
from engine.metrics import vqa
from tests.end_to_end.conftest import ROOT, Launcher, interrupted

CFG = ROOT / "tests/end_to_end/vqa.yaml"
ANSWERS = ["yes", "no", "2", "red"]
ALLOWED = f"generate.answers={json.dumps(ANSWERS)}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A launcher whose run has been trained for four steps and evaluated, and what that printed."""
    data = tmp_path_factory.mktemp("questions")
    folder = data / "asked" / "images"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with (data / "asked" / "anno.csv").open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answers", "question_id", "question_type"])
        for i in range(16):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            said = [ANSWERS[i % 4]] * 7 + [ANSWERS[(i + 1) % 4]] * 3
            writer.writerow([f"{i}.png", f"What is {i}?", "|".join(said), 100 + i, "what is"])
    launcher = Launcher(data, tmp_path_factory.mktemp("output"))
    done = launcher("--task=vqa", ALLOWED, cfg=CFG)
    return launcher, done.stdout


@pytest.fixture
def ask(trained, tmp_path):
    """launch.py --task=vqa --mode=generate on a copy of the trained run's folder."""
    launcher, _ = trained

    def started(*flags, code=0):
        flags = ("--task=vqa", "--mode=generate", f"generate.output={tmp_path / 'out'}", *flags)
        return launcher(*flags, cfg=CFG, code=code)

    return started


def test_training_evaluates_and_writes_its_answers(trained, capsys):
    launcher, printed = trained
    run = launcher.output / "asked"
    row = launcher.rows("asked")[-1]
    # predictions are in the official form: the metric's own command finds the same figure
    rows = [json.loads(line) for line in (run / "samples" / "asked.step_4.jsonl").open()]
    assert [r["question_id"] for r in rows] == [str(100 + i) for i in range(16)]
    assert {r["answer"] for r in rows} <= set(ANSWERS)
    annotations = [
        {
            "question_id": int(r["question_id"]), "answer_type": "other",
            "question_type": r["question_type"], "answers": [{"answer": a} for a in r["answers"]],
        }
        for r in rows
    ]  # fmt: skip
    path = run / "annotations.json"
    path.write_text(json.dumps({"annotations": annotations}), encoding="utf8")
    results = run / "samples" / "asked.step_4.results.json"
    assert vqa.main([f"--annotations={path}", f"--results={results}"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["overall"] == row["asked/accuracy"]
    assert told["majority"]["overall"] == row["asked/majority_accuracy"]
    assert row["asked/question:what is"] == row["asked/accuracy"]
    assert row["asked/yes_no_questions"] == 8
    assert "answer:number" in printed
    assert "What is 0?" in (run / "report.html").read_text(encoding="utf8")


def test_eval_prints_the_same_figures(trained):
    launcher, _ = trained
    done = launcher("--task=vqa", "--mode=eval", ALLOWED, cfg=CFG)
    assert "majority_accuracy" in done.stdout
    told = json.loads(
        (launcher.output / "asked" / "evaluations.jsonl").read_text().splitlines()[-1]
    )
    last = launcher.rows("asked")[-1]
    assert {k: v for k, v in told.items() if "/" in k} == {
        k: v for k, v in last.items() if "/" in k
    }


def test_a_file_of_questions_is_answered(trained, ask, tmp_path):
    images = trained[0].data / "asked" / "images"
    questions = [
        {"question_id": 7, "image_id": 3, "question": "What?"},
        {"question_id": 8, "image_id": 99, "question": "Where?"},
        {"question_id": 9, "question": "Why?"},
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"questions": questions}), encoding="utf8")
    done = ask(f"input={path}", f"generate.images={images}")
    assert "Answers to 2 questions" in done.stdout
    assert "1 question left out: 1 missing" in done.stdout
    official = json.loads((tmp_path / "out" / "answers_vqa.json").read_text(encoding="utf8"))
    assert [r["question_id"] for r in official] == [7, 9]
    bad = json.loads((tmp_path / "out" / "bad_samples.jsonl").read_text(encoding="utf8"))
    assert "image 99" in bad["detail"]
    page = (tmp_path / "out" / "answers.html").read_text(encoding="utf8")
    assert "What? · 3" in page and "Why?" in page
    chosen = ask(f"input={path}", f"generate.images={images}", ALLOWED)
    assert chosen.returncode == 0
    lines = (tmp_path / "out" / "answers.jsonl").read_text(encoding="utf8").splitlines()
    assert all(json.loads(line)["answer"] in ANSWERS for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "input=FILE names a CSV or JSON file of questions"),
        (("input=/no/such.csv",), "there is no file /no/such.csv"),
        (("input=/no/such.csv", "generate.answers=[a,a]"), "has 'a' twice"),
    ],
)
def test_mistakes_of_asking(ask, flags, message):
    done = ask(*flags, code=2)
    assert message in done.stderr
    assert len((done.stdout + done.stderr).strip().splitlines()) == 1


def test_ctrl_c_keeps_what_is_answered_and_scored(trained, ask, tmp_path, monkeypatch, capsys):
    images, run = trained[0].data / "asked" / "images", trained[0].output / "asked"
    path = tmp_path / "questions.csv"
    path.write_text("image,question\n" + "".join(f"{i}.png,What?\n" for i in range(6)), "utf8")
    flags = (f"input={path}", f"generate.images={images}", "generate.batch_size=2")
    with monkeypatch.context() as patch:
        patch.setattr(vqa_answers, "generate_batch", interrupted(vqa_answers.generate_batch))
        done = ask(*flags)
    assert "SIGINT: 2 of 6 questions done; the rest is left out" in done.stderr + done.stdout
    answers = tmp_path / "out" / "partial" / "answers.jsonl"
    assert len(answers.read_text(encoding="utf8").splitlines()) == 2
    # one that fails leaves an earlier one's answers as they are
    path.write_text("image,question\nno.png,What?\n", "utf8")
    assert "none of the 1 questions" in ask(*flags, code=2).stderr
    assert len(answers.read_text(encoding="utf8").splitlines()) == 2

    path.write_text("image,text\n" + "".join(f"{i}.png,a dog\n" for i in range(6)), "utf8")
    tokens = interrupted(vqa_score.VQAScore._tokens)
    monkeypatch.setattr(vqa_score.VQAScore, "_tokens", lambda *given: tokens(*given))
    command = [f"--model={run}", f"--csv={path}", f"--images={images}", f"--out={tmp_path / 's'}"]
    assert vqa_score.main([*command, "--device=cpu", "--batch_size=2"]) == 0
    assert "SIGINT: 2 of 6 pairs are scored; the rest is left out" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "s" / "scores.jsonl").open(encoding="utf8")]
    assert [row["vqa_score"] is None for row in rows] == [False] * 2 + [True] * 4


def test_scores_of_a_csv(trained, tmp_path, capsys):
    launcher, _ = trained
    shutil.copytree(launcher.data / "asked" / "images", tmp_path / "images")
    path = tmp_path / "pairs.csv"
    lines = [f"images/{i}.png,a {i} dog,{i % 5}" for i in range(8)]
    path.write_text("\n".join(["image,text,human_score", *lines, "images/no.png,x,1"]), "utf8")
    run = launcher.output / "asked"
    command = [f"--model={run}", f"--csv={path}", "--device=cpu"]
    assert vqa_score.main(command) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["rows"], told["left_out"], told["human_scores"]) == (9, 1, 8)
    assert {"pearson", "kendall_tau_b", "pairwise_accuracy"} <= set(told)
    assert err.count("no.png is left out: missing") == 1
    folder = run / "vqa_score" / "pairs"
    assert Image.open(folder / "histogram.png").width == 920
    rows = [json.loads(line) for line in (folder / "scores.jsonl").open(encoding="utf8")]
    own = vqa_score.VQAScore(run / "checkpoints" / "step_4", device="cpu")
    found = own.pairs([tmp_path / row["image"] for row in rows[:8]], [r["text"] for r in rows[:8]])
    assert [row["vqa_score"] for row in rows[:8]] == pytest.approx(found.tolist(), rel=1e-5)
    assert rows[8]["vqa_score"] is None


def test_a_run_with_adapters_scores(trained):
    launcher, _ = trained
    groups = [{"pattern": "SelfAttention", "train": "lora"}, {"pattern": "", "train": "freeze"}]
    launcher(
        "--task=vqa",
        f"optim.groups={json.dumps(groups)}",
        "data.exp_name=adapted",
        ALLOWED,
        cfg=CFG,
    )
    score = vqa_score.VQAScore(launcher.output / "adapted", device="cpu")
    adapters = [p for name, p in score.model.named_parameters() if "lora_B" in name]
    image = next((launcher.data / "asked" / "images").iterdir())
    before = score([image], ["a dog"])
    assert adapters and all(p.abs().max() > 0 for p in adapters)  # trained, not new
    for parameter in adapters:
        parameter.zero_()
    assert score([image], ["a dog"]) != before


def test_mistakes_of_scoring(trained, tmp_path):
    launcher, _ = trained
    path = tmp_path / "pairs.csv"
    path.write_text("image,text\nno.png,x\n", encoding="utf8")
    with pytest.raises(vqa_score.UserError, match=r"none of the pairs of .*missing"):
        vqa_score.main([f"--model={launcher.output / 'asked'}", f"--csv={path}", "--device=cpu"])
    for device in ("meta_", "cuda:99"):
        with pytest.raises(vqa_score.UserError, match=f"there is no device '{device}' here; take"):
            vqa_score.VQAScore(launcher.output / "asked", device=device)
    with pytest.raises(vqa_score.UserError, match="is not the folder of a run"):
        vqa_score.main([f"--model={tmp_path}", f"--csv={path}"])
