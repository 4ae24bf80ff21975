import pytest

from engine.errors import UserError
from engine.flags import Arguments, parse


def test_both_ways_of_writing_a_flag():
    expected = parse(["--task=clip", "--cfg=a.yaml", "--mode=eval", "--nproc_per_node=2"])
    words = ["--nproc_per_node", "2", "--mode", "eval", "--cfg", "a.yaml", "--task", "clip"]
    assert parse(words) == expected
    assert (expected.task, str(expected.cfg), expected.mode) == ("clip", "a.yaml", "eval")
    assert (expected.nproc_per_node, expected.nnodes, expected.overrides) == (2, 1, ())


def test_overrides_stand_anywhere_and_hold_the_experiments_name():
    arguments = parse(["a.b=-1", "--task=clip", "c=[x, y]", "--cfg=a.yaml", "--exp_name=no: 1"])
    assert arguments.overrides == ("a.b=-1", "c=[x, y]", 'data.exp_name="no: 1"')


def test_arguments_do_not_change():
    with pytest.raises(AttributeError):
        Arguments(task="clip", cfg="a.yaml").task = "vqa"


def test_help_names_the_tasks(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"], tasks=["clip", "vqa"])
    assert end.value.code == 0
    assert "clip, vqa" in capsys.readouterr().out


@pytest.mark.parametrize("abbreviation", ["--mod=eval", "--nproc=2", "-x"])
def test_flags_are_not_abbreviated(abbreviation):
    with pytest.raises(UserError, match="unknown flag"):
        parse(["--task=clip", "--cfg=a.yaml", abbreviation])
