"""Every kind of part from a folder outside the tree: by dotted names, with options of its own."""

import json
import sys
import textwrap

import pytest
import yaml

from engine.config.load import load
from tests.end_to_end.conftest import ENVIRONMENT, SMALL, TINY, mistake

PARTS = {
    "task": """
        import torch
        from engine.config.section import Section
        from engine.tasks.clip import ClipTask

        class Options(Section):
            constant: float = 1.0

        class Task(ClipTask):
            def __init__(self, config, tokenizer, *, options):
                super().__init__(config, tokenizer)
                self.constant = options.constant

            def losses(self, features):
                return {**super().losses(features), "constant": torch.tensor(self.constant)}

        build = Task
        """,
    "loss": """
        from engine.config.section import Section
        from engine.losses import nce
        from pydantic import PositiveFloat

        class Options(Section):
            factor: PositiveFloat = 1.0

        class Scaled:
            def __init__(self, loss, factor):
                self.loss, self.factor = loss, factor
                self.mix, self.parameters, self.bounds = loss.mix, loss.parameters, loss.bounds

            def __call__(self, features):
                losses = self.loss(features)
                return {**losses, "loss": losses["loss"] * self.factor}

        def build(config, *, options):
            return Scaled(nce.build(config), options.factor)
        """,
    "encoder": """
        from engine.config.section import Section
        from engine.models.image import timm

        class Options(Section):
            tag: str

        def build(config, *, image_size, options):
            return timm.build(config.model_copy(update={"tag": options.tag}), image_size=image_size)
        """,
    "decoder": """
        from engine.config.section import Section
        from engine.models.decoders import causal

        class Options(Section):
            layers: int

        def build(section, *, vocab_size, pad_id, eos_id, options):
            sizes = {**section.config, "n_layer": options.layers}
            section = section.model_copy(update={"config": sizes})
            return causal.build(section, vocab_size=vocab_size, pad_id=pad_id, eos_id=eos_id)
        """,
    "format": """
        from pathlib import Path
        from engine.config.section import Section
        from engine.data.formats import csv

        class Config(Section):
            root: Path
            annotations: str

        def build(config, *, name, split, cache_dir):
            own = csv.Config(root=config.root, train_anno=config.annotations)
            return csv.build(own, name=name, split=split, cache_dir=cache_dir)
        """,
    "jitter": """
        import torch
        from engine.config.section import Section

        class Options(Section):
            amount: int = 0

        def build(config, *, options):
            def jitter(image_CHW):
                noise = torch.randint(options.amount + 1, image_CHW.shape, dtype=torch.uint8)
                return image_CHW // 2 + noise
            return jitter
        """,
    "step": """
        from engine.config.section import Section
        from engine.train.steps import plain

        class Options(Section):
            label: str = ""

        def build(runner, data, *, options, **parts):
            step = plain.build(runner, data, **parts)
            return lambda batch, number: {**step(batch, number), options.label: 1.0}
        """,
    "strategy": """
        from engine.config.section import Section
        from engine.dist import ddp
        from engine.dist.ddp import SHARDS, check, device_bytes

        class Options(Section):
            times: int = 0

        def build(module, optimizer, config, device, precision, *, options):
            for _ in range(options.times):
                print("wrapped by the strategy from outside")
            return ddp.build(module, optimizer, config, device, precision)
        """,
    "export": """
        from engine.config.section import Section

        class Options(Section):
            text: str

        def build(trained, folder, section, key, *, options):
            folder.mkdir(parents=True)
            names = len(trained.model.state_dict())
            (folder / "own.txt").write_text(f"{options.text} {names}", encoding="utf8")
        """,
    "order": """
        from engine.config.section import Section
        from engine.data.samplers import sequential

        class Options(Section):
            shown: str

        def build(inputs, *, options):
            print(options.shown)
            return sequential.build(inputs)
        """,
    "score": """
        from engine.config.section import Section
        from engine.evals.evaluation import Evaluation, Result

        MODALITIES = ("text",)

        class Options(Section):
            bonus: float = 0.0

        class Score(Evaluation):
            best = "score"
            bonus = 0.0

            def evaluate(self, dataset, model):
                return Result({"score": len(self.open(dataset)) + self.bonus}, [])

        def build(run, *, options):
            score = Score(run)
            score.bonus = options.bonus
            return score
        """,
    "mode": """
        from engine.config.section import Section

        class Options(Section):
            greeting: str = "hello"

        def run(run, *, options):
            print(options.greeting, type(run.task).__name__, len(run.task.tokenizer.state()))
        """,
    "silent": """
        def build(config):
            return lambda image: image
        """,
}
OPTIONS = {
    "own_parts.task": {"constant": 7.5},
    "own_parts.loss": {"factor": 3.0},
    "own_parts.encoder": {"tag": "vit_tiny_patch16_224"},
    "own_parts.jitter": {"amount": 9},
    "own_parts.step": {"label": "own"},
    "own_parts.strategy": {"times": 2},
    "own_parts.order": {"shown": "one after another"},
}
JITTER = "transforms.train_transforms=[random_resize_crop, own_parts.jitter]"


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The folder of the parts, where Python finds them, and a YAML that names them."""
    folder = tmp_path / "outside"
    (folder / "own_parts").mkdir(parents=True)
    for name, text in {"__init__": "", **PARTS}.items():
        (folder / "own_parts" / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(folder))
    for name in [name for name in sys.modules if name.startswith("own_parts")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


@pytest.fixture
def own(outside):
    """Writes the YAML: every part from outside, and ``more`` options."""

    def write(**more):
        sections = {
            "base": str(TINY),
            "runner": {"name": "own_parts.step"},
            "dist": {"name": "own_parts.strategy"},
            "data": {"train_type": "own_parts.order"},
            "loss": {"name": "own_parts.loss"},
            "model": {"image_encoder": {"name": "own_parts.encoder", "tag": "nothing"}},
            "transforms": {"train_transforms": ["random_resize_crop", "own_parts.jitter"]},
            "options": {**OPTIONS, **more},
        }
        path = outside / "own.yaml"
        path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf8")
        return path

    return write


def test_a_run_of_parts_from_outside(launch, own):
    jitter = (JITTER, "options.own_parts.jitter.amount=9")
    launch("--exp_name=plain", "epoch=1", "data.train_type=sequential", *jitter)
    printed = launch("--exp_name=own", "--task=own_parts.task", "epoch=1", cfg=own()).stdout
    assert printed.count("wrapped by the strategy from outside") == 2
    assert "one after another" in printed
    plain, rows = launch.rows("plain"), launch.rows("own")
    assert [row["constant"] for row in rows if "loss" in row] == [7.5] * 4
    assert [row["own"] for row in rows if "loss" in row] == [1.0] * 4
    assert rows[0]["loss"] == pytest.approx(3 * plain[0]["loss"], rel=1e-6)
    assert any("tiny/RSUM" in row for row in rows)

    saved = launch.output / "own" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["options"] == OPTIONS
    launch("--exp_name=again", "--task=own_parts.task", cfg=saved)
    assert launch.losses("again") == launch.losses("own")
    checked = launch("--mode=check", "--exp_name=new", "--task=own_parts.task", cfg=saved).stdout
    assert "own_parts.jitter:\n    amount: 9" in checked

    two = ("--exp_name=two", "--task=own_parts.task", "--nproc_per_node=2")
    launch(*two, "epoch=1", "options.own_parts.task.constant=2", cfg=own())
    assert {row["constant"] for row in launch.rows("two") if "loss" in row} == {2.0}


def test_a_transform_that_is_given_no_options_has_its_defaults(launch, outside):
    launch("epoch=1", JITTER)
    launch("--exp_name=plain", "epoch=1")
    assert launch.losses() != launch.losses("plain")
    saved = yaml.safe_load((launch.output / "tiny" / "config.yaml").read_text())
    assert saved["options"] == {"own_parts.jitter": {"amount": 0}}


def test_a_format_from_outside(launch, outside):
    launch("--mode=check")  # draws the data
    folder = launch.data / "tiny"
    (folder / "own.csv").write_bytes((folder / "train_anno.csv").read_bytes())
    data = {"own": {"format": "own_parts.format", "root": str(folder), "annotations": "own.csv"}}
    launch("--exp_name=plain", "epoch=1")
    launch("--exp_name=own", f"data.datasets={json.dumps(data)}", "data.train_name=[own]",
           "epoch=1", "data.valid_name=[]", "eval.epoch_interval=null")  # fmt: skip
    assert launch.losses("own") == launch.losses("plain")


def test_a_decoder_and_an_export_from_outside(caption, launch, outside):
    decoder = ("model.decoder.name=own_parts.decoder", "options.own_parts.decoder.layers=1")
    caption(*decoder)
    assert "trained" in (launch.output / "tiny" / "parameters.txt").read_text()
    saved = launch.output / "tiny" / "config.yaml"
    assert load(saved).options["own_parts.decoder"].layers == 1
    launch(*SMALL[:1], "--mode=export", "export.format=own_parts.export",
           "options.own_parts.export.text=written", cfg=saved)  # fmt: skip
    written = (launch.output / "tiny" / "export" / "export" / "own.txt").read_text()
    assert written.startswith("written ")


def test_faults_of_options_are_told_all_at_once_with_their_place(launch, own):
    path = own(**{
        "own_parts.loss": {"factr": 2.0, "factor": -1},
        "own_parts.encoder": {},
        "own_parts.jiter": {"amount": 1},
        "own_parts.export": {"text": "x"},
    })  # fmt: skip
    lines = path.read_text().splitlines()
    done = launch("--task=own_parts.task", "data.batch_sise=3", cfg=path, code=2)
    told = {line.split(": ")[1]: (line.split(": ")[0], line) for line in done.stderr.splitlines()}
    assert told.keys() == {
        "options.own_parts.loss.factr", "options.own_parts.loss.factor", "data.batch_sise",
        "options.own_parts.encoder.tag", "options.own_parts.jiter", "options.own_parts.export",
    }  # fmt: skip
    line = 1 + next(i for i, text in enumerate(lines) if "factr" in text)
    place, message = told["options.own_parts.loss.factr"]
    assert place == f"{path}:{line}" and "did you mean 'factor'?" in message
    assert "a number above 0, not -1" in told["options.own_parts.loss.factor"][1]
    assert "write tag: below options.own_parts.encoder" in told["options.own_parts.encoder.tag"][1]
    assert "did you mean 'own_parts.jitter'?" in told["options.own_parts.jiter"][1]
    assert "does not use the module" in told["options.own_parts.export"][1]


def test_an_evaluation_from_outside(launch, outside):
    extra = ("eval.extra=[own_parts.score]", "options.own_parts.score.bonus=0.5")
    launch(*extra, "ckpt.best_metric=score")
    scored = [row for row in launch.rows() if "tiny/RSUM" in row]
    assert [row["tiny/score"] for row in scored] == [16.5, 16.5]
    saved = launch.output / "tiny" / "checkpoints" / "step_8" / "manifest.json"
    assert json.loads(saved.read_text())["metric"] == 16.5
    assert "score" in launch("--mode=eval", *extra).stdout
    assert "tiny/score" in (launch.output / "tiny" / "evaluations.jsonl").read_text()
    launch("--mode=eval", extra[1], code=2)


def test_a_mode_from_outside(launch, outside):
    printed = launch("--mode=own_parts.mode", "options.own_parts.mode.greeting=good day").stdout
    assert printed.startswith("good day ClipTask ")
    done = launch("--mode=eval", "options.own_parts.mode.greeting=good day", code=2)
    mistake(done, "command line: options.own_parts.mode: this run does not use the module")


def test_a_module_without_options_is_given_none(launch, outside):
    names = "transforms.train_transforms=[random_resize_crop, own_parts.silent]"
    launch("epoch=1", names)
    done = launch(names, "options.own_parts.silent.x=1", code=2)
    mistake(done, "command line: options.own_parts.silent: ", "has no class Options; remove")
