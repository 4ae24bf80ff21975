"""Options of modules from outside: which module an override means, reloading, other runs' files."""

import sys
from textwrap import dedent

import pytest

from engine.config.load import load, load_with_places, resolved_yaml
from engine.config.options import override_path
from engine.errors import UserError
from engine.registry import options_of

MODULE = """
    from engine.config.section import Section

    class Inner(Section):
        a: int = 1

    class Options(Section):
        margin: float = 0.5
        inner: Inner = Inner()
    """


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_loss.py").write_text("")
    (tmp_path / "of_options").mkdir()
    (tmp_path / "of_options" / "loss.py").write_text(dedent(MODULE))
    (tmp_path / "of_options" / "plain.py").write_text("class Options: pass")
    (tmp_path / "run.yaml").write_text("loss: {name: of_options.loss}\n")
    yield tmp_path
    for name in ("of_options", "of_options.loss", "of_options.plain"):
        sys.modules.pop(name, None)


def started(folder, *overrides, named=("clip", "train")):
    return load_with_places(folder / "run.yaml", overrides, named).config.options


@pytest.mark.parametrize(
    ("path", "known", "is_mapping", "want"),
    [
        ("a.b.key", [], False, ["a.b", "key"]),
        ("a.b", [], True, ["a.b"]),
        ("a.b.key", [], True, ["a.b.key"]),
        ("a.b.key.sub", ["a.b"], False, ["a.b", "key", "sub"]),
        ("a.b.key", ["a", "a.b"], True, ["a.b", "key"]),
        ("a", [], False, ["a"]),
    ],
)
def test_the_module_of_an_override(path, known, is_mapping, want):
    found = override_path(["options", *path.split(".")], dict.fromkeys(known), is_mapping)
    assert found == ["options", *want]


def test_defaults_are_filled_in_and_loaded_again(folder):
    assert started(folder)["of_options.loss"].margin == 0.5
    found = started(folder, "options.of_options.loss.margin=2")["of_options.loss"]
    assert (found.margin, found.inner.a) == (2.0, 1)
    overrides = "options.of_options.loss={}", "options.of_options.loss.inner.a=7"
    config = load_with_places(folder / "run.yaml", overrides, ("clip", "train")).config
    assert config.options["of_options.loss"].inner.a == 7
    (folder / "saved.yaml").write_text(resolved_yaml(config))
    assert load(folder / "saved.yaml") == config
    module = sys.modules["of_options.loss"]
    assert options_of(module, config.options)["options"].inner.a == 7
    assert options_of(module, {})["options"].margin == 0.5
    assert options_of(sys.modules["engine.registry"], config.options) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["options.of_options.other.x=1"], "options.of_options.other: this run does not use"),
        (["options.of_options.loss.inner.b=1", "options.of_options.loss={}"], "unknown key 'b'"),
        (["loss.name=no_such.loss", "options.no_such.loss.x=1"], "cannot import 'no_such.loss'"),
        (["loss.name=of_options.plain"], "must derive from engine.config.section.Section"),
        (["options.of_options.loss=3"], "needs keys and values below it, not 3"),
        (["loss.name=NCE", "options.of_options.loss.x=1"], "no part of it is from outside"),
    ],
)
def test_faults(folder, overrides, message):
    with pytest.raises(UserError) as caught:
        started(folder, *overrides)
    assert (message in str(caught.value) and str(caught.value).startswith("command line: ")) or (
        "plain" in overrides[0] and message in str(caught.value)
    )


def test_another_runs_file_may_name_a_mode_or_what_is_not_here(folder):
    text = "options: {of_options.loss: {margin: 3}, not_here.mode: {x: 1}}\n"
    (folder / "run.yaml").write_text(text)
    options = load(folder / "run.yaml").options
    assert options["of_options.loss"].margin == 3 and options["not_here.mode"] == {"x": 1}
    with pytest.raises(UserError, match=r"run.yaml:1: options.not_here.mode: this run does not"):
        started(folder)
