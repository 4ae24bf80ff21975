import time

import pytest

from engine.config.yaml_source import MAX_BYTES, merge, parse, places, plain
from engine.errors import UserError


def parse_all(text, name="x.yaml"):
    """(the values, the faults)"""
    faults = []
    return parse(text, name, faults), faults


def value(text):
    root, faults = parse_all(text)
    assert not faults, faults
    return plain(root)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("1.0e-6", 1e-6),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("1E5", 1e5),
        (".inf", float("inf")),
        ("12", 12),
        ("012", 12),
        ("0x1F", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("null", None),
        ("'12'", "12"),
        ("!!str 12", "12"),
        (r'"\ud83d\ude00"', "😀"),
        ("!!float 3", 3.0),
        ("2024-01-01", "2024-01-01"),
        ("!!python/tuple [0.9, 0.98]", (0.9, 0.98)),
        ("[a, b, ...]", ["a", "b", "..."]),
        ("{no: 1, 3: 2}", {"no": 1, "3": 2}),
        ("{a: &x [1, 2], b: *x}", {"a": [1, 2], "b": [1, 2]}),
    ],
)
def test_values_are_read_as_they_look(text, expected):
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "kind"), [(r'"\ud83d"', "str"), ("!!int a", "int"), ("!!bool no", "bool")]
)
def test_scalars_that_are_not_what_they_claim(text, kind):
    _root, (fault,) = parse_all(f"a: {text}")
    assert str(fault).startswith("x.yaml:1: a: ")
    assert f"is not a valid {kind}; correct the value" in str(fault)


def test_an_empty_text_has_no_value():
    assert parse_all("# nothing\n") == (None, [])


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [ls]",
        "!!python/name:os.system ''",
        "!!python/module:os ''",
        "!!python/object/new:object {}",
        "!!python/tuple {a: 1}",
        "!!python/str x",
        "!!binary aGk=",
        "!!timestamp 2024-01-01",
        "!!set {a, b}",
        "!custom 3",
    ],
)
def test_every_other_tag_is_refused_with_its_line(tag):
    root, (fault,) = parse_all(f"a: 1\nb:\n  c: {tag}\n")
    assert str(fault).startswith("x.yaml:3: b.c: the tag !")
    assert plain(root) == {"a": 1, "b": {}}


def test_duplicate_merge_and_complex_keys_are_refused():
    _root, faults = parse_all("a: 1\nb: {c: 1, c: 2}\n<<: {x: 1}\n? [q]\n: 3\na: 2\n")
    assert [str(fault).split(";")[0] for fault in faults] == [
        "x.yaml:2: b.c: the key is written twice, first at x.yaml:2",
        "x.yaml:3: <<: merge keys are not read",
        "x.yaml:4: a list or mapping cannot be a key",
        "x.yaml:6: a: the key is written twice, first at x.yaml:1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "x.yaml:1: not valid YAML"),
        ("a: 1\n\tb: 2", "x.yaml:2: not valid YAML: .*indent with spaces"),
        ("a: 1\n--- \nb: 2", "x.yaml:2: not valid YAML: .*another document"),
        ("a: 1\nb: \x00", "x.yaml:2: not text"),
        ("a: *nowhere", "x.yaml:1: not valid YAML: found undefined alias"),
        ("#" * (MAX_BYTES + 1), "x.yaml: larger than 1,000,000 bytes"),
        ("a: &a [*a]", "nested more than 50 levels deep"),
        ("[" * 40_000, "x.yaml: nested more than 50 levels deep"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 levels deep"),
    ],
)
def test_texts_that_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        parse_all(text)


@pytest.mark.parametrize("leaf", ["[lol, lol, lol, lol, lol, lol, lol, lol]", "x" * 100_000])
def test_an_alias_bomb_is_refused_at_once(leaf):
    lines = [f"a0: &a0 {leaf}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12)]
    start = time.perf_counter()
    with pytest.raises(UserError, match="once aliases are filled in"):
        parse_all("\n".join(lines))
    assert time.perf_counter() - start < 10


def test_merge_goes_key_by_key_and_places_follow_the_values():
    below = parse("a: {x: 1, y: [1, 2]}\nb: 1\n", "below.yaml", [])
    above = parse("\na:\n  y: [3]\n  z: 4\nb: {c: 5}\n", "above.yaml", [])
    merged = merge(below, above)
    assert plain(merged) == {"a": {"x": 1, "y": [3], "z": 4}, "b": {"c": 5}}
    assert places(merged) == {
        "a": "above.yaml:2",
        "a.x": "below.yaml:1",
        "a.y": "above.yaml:3",
        "a.y.0": "above.yaml:3",
        "a.z": "above.yaml:4",
        "b": "above.yaml:5",
        "b.c": "above.yaml:5",
    }
