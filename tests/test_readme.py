"""The commands of the README and of its page on many GPUs, as they are printed, on small data."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engine.tools.shapes import folder as drawn

ROOT = Path(__file__).parents[1]
PAGES = {
    path: (ROOT / path).read_text(encoding="utf8")
    for path in ("README.md", "configs/slurm/README.md")
}
SMALL = [
    "epoch=1", "data.train_steps=2", "data.batch_size=16", "data.batch_size_val=16",
    "data.num_workers=0", "log.tensorboard=false",
]  # fmt: skip

DRAWN = {  # at first use, of the size asked for
    "vqa": ("shapes_vqa", "shapes_matches"), "recognize": ("shapes_labels",),
}  # fmt: skip
SCORED = {
    "clip": "text_to_image_R@1", "caption": "CIDEr", "vqa": "accuracy", "recognize": "exact_F1",
}  # fmt: skip
SAID = {"caption": "Captions of 16 images", "vqa": "Answers to ", "recognize": "16 "}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL)
    lines = [line for block in blocks for line in block.strip().splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


LAUNCHES = [command for command in commands() if "launch.py" in command]
TOOLS = [command for command in commands() if "-m engine." in command]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder in which the commands can be typed: the project, and small data under data/."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("launch.py", "engine", "configs"):
        (place / name).symlink_to(ROOT / name)
    for name in ("shapes", "mine"):
        (place / "data" / name).mkdir(parents=True)
        drawn.write(place / "data" / name, drawn.Options(num_train=48, num_valid=16))
    return place


def task_of(command: str) -> str:
    return command.partition("--task=")[2].split()[0]


@pytest.mark.parametrize("task", sorted({task_of(command) for command in LAUNCHES}))
def test_launch_commands(checkout, task):
    """In their order, since some use the run of one before; tests share nothing."""
    for command in LAUNCHES:
        if task_of(command) == task:
            launch(checkout, command, task)


def launch(checkout, command, task):
    words = shlex.split(command)
    assert words[0] == ".venv/bin/python"
    small = [
        f"data.datasets.{name}.num_{number}"
        for name in DRAWN.get(task, ()) for number in ("train=48", "valid=16")
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words[1:], *SMALL, *small], cwd=checkout, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, command + done.stdout + done.stderr
    if "--mode=generate" in command:
        assert SAID[task] in done.stdout, command
    elif "--mode=check" not in command:
        assert SCORED["caption" if "stage1" in command else task] in done.stdout, command


@pytest.mark.parametrize("command", TOOLS)
def test_data_tool(checkout, command):
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=checkout, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "48" in done.stdout


def test_the_other_commands_install_and_test():
    others = [command for command in commands() if command not in LAUNCHES + TOOLS]
    assert set(others) == {
        "python -m venv .venv",
        ".venv/bin/pip install -r requirements.txt",
        '.venv/bin/pip install -r requirements.txt -e ".[test]"',
        ".venv/bin/python -m pytest -n auto --dist loadfile",
    }


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_to_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target
