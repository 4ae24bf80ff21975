"""The floors of the house, read from the sources: imports go down only."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.registry import names

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 500

# a module's floor is that of the longest name here that it starts with
FLOORS = {
    "engine": 0,  # the package itself: its version
    "engine.errors": 0,
    "engine.torchvision_ops": 0,
    "engine.types": 2.5,
    "engine.data.text.tokenizer": 2.2,
    "engine.flags": 1,
    "engine.registry": 1,
    "engine.masks": 1,
    "engine.config": 2,
    "engine.dist": 3,
    "engine.losses": 4,
    "engine.metrics": 4,
    "engine.logs": 4,
    "engine.data.transforms": 4,
    "engine.models": 5,
    "engine.data": 5,
    "engine.data.workers": 0.5,
    "engine.tools": 6,
    "engine.tools.shapes": 4,
    "engine.tasks": 6,
    "engine.generate": 6.5,
    "engine.train": 7,
    "engine.run": 8,
    "engine.evals": 9,
    "engine.export": 9,
    "engine.modes": 10,
    "engine.cli": 11,
    "launch": 12,
}

ONLY_IN = {
    "wandb": "engine.logs.wandb",
    "deepspeed": "engine.dist.deepspeed",
    "fairscale": "engine.dist.fairscale",
}

TOP_LEVEL = {
    "README.md",
    "setup.cfg",
    "launch.py",
    "engine",
    "configs",
    "data",
    "tests",
    "pyproject.toml",
    "requirements.txt",
    "LICENSE",
    "CHANGELOG.md",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted((ROOT / "engine").rglob("*.py"))}
SOURCES["launch"] = ROOT / "launch.py"


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Modules that a source names in its imports, wherever they stand; ``from x import y`` is x.y
    where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: None if is_package and node.level == 1 else -node.level]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in SOURCES or not base.startswith("engine") else base


def imported(module: str) -> set[str]:
    path = SOURCES[module]
    tree = ast.parse(path.read_text(encoding="utf8"))
    return set(imports(tree, module, path.name == "__init__.py"))


def floor_name(module: str) -> str:
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    found = next((prefix for prefix in prefixes if prefix in FLOORS), None)
    # a new file straight under engine/ must be given its floor: "engine" holds the package alone
    assert found and (found != "engine" or module == "engine"), f"{module} has no floor in FLOORS"
    return found


def is_part(module: str) -> bool:
    """Whether a YAML's ``name`` can choose this module: it defines ``build``."""
    folder, _, stem = module.removeprefix("engine.").rpartition(".")
    return bool(folder) and stem in names(folder.replace(".", "/")).values()


def breaches(module: str, targets: set[str]) -> list[str]:
    """What is wrong with ``module`` importing ``targets``."""
    found = []
    own = floor_name(module)
    for target in sorted(target for target in targets if target.split(".")[0] == "engine"):
        other = floor_name(target)
        if own != other and FLOORS[other] >= FLOORS[own]:
            found.append(f"{module} ({own}) imports {target} ({other}), which is no lower floor")
        same_slot = module.rpartition(".")[0] == target.rpartition(".")[0]
        if same_slot and is_part(module) and is_part(target):
            found.append(f"{module} imports its sibling {target}")
        in_dist = target == "engine.dist" or target.startswith("engine.dist.")
        if own == "engine.losses" and in_dist and target != "engine.dist.collectives":
            found.append(f"{module} imports {target}: losses know collectives only")
        if own == "engine.models" and in_dist:
            found.append(f"{module} imports {target}: models know nothing of parallelism")
    for target in targets:
        package = target.split(".")[0]
        if package in ONLY_IN and module != ONLY_IN[package]:
            found.append(f"{module} imports {package}; only {ONLY_IN[package]} may")
        knows_processes = target.startswith("torch.distributed")
        if knows_processes and own in ("engine.losses", "engine.models"):
            found.append(f"{module} imports {target}")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down_only(module):
    assert breaches(module, imported(module)) == []


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("engine.models")])
def test_models_do_not_reach_torch_distributed_through_torch(module):
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "distributed")


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("engine.losses.nce", "engine.train.loop"),
        ("engine.losses.nce", "engine.dist.launch"),
        ("engine.losses.nce", "torch.distributed"),
        ("engine.models.image.timm", "engine.data.loader"),
        ("engine.models.image.timm", "engine.dist.collectives"),
        ("engine.models.image.timm", "torch.distributed.nn"),
        ("engine.data.transforms.pipeline", "engine.data.loader"),
        ("engine.train.loop", "engine.evals.retrieval"),
        ("engine.train.loop", "wandb"),
        ("engine.config.schema", "engine.modes"),
    ],
)
def test_a_breach_would_be_found(module, target):
    assert len(breaches(module, {target})) == 1


def test_siblings_would_be_found(monkeypatch):
    monkeypatch.setattr(f"{__name__}.is_part", lambda module: True)
    assert len(breaches("engine.losses.nce", {"engine.losses.sigmoid"})) == 1
    assert breaches("engine.losses.nce", {"engine.dist.collectives"}) == []


@pytest.mark.parametrize(
    ("source", "is_package", "expected"),
    [
        ("import engine.losses.nce", False, {"engine.losses.nce"}),
        ("from engine.errors import UserError", False, {"engine.errors"}),
        ("from engine import registry", False, {"engine.registry"}),
        ("from . import registry", True, {"engine.registry"}),
        ("from .errors import UserError", False, {"engine.errors"}),
        ("def f():\n    from torch import distributed", False, {"torch.distributed"}),
    ],
)
def test_imports_are_read_from_the_source(source, is_package, expected):
    module = "engine" if is_package else "engine.types"
    assert set(imports(ast.parse(source), module, is_package)) == expected


@pytest.mark.parametrize("module", SOURCES)
def test_no_file_is_longer_than_its_reader_has_patience_for(module):
    assert len(SOURCES[module].read_text(encoding="utf8").splitlines()) <= MAX_FILE_LINES


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so ignored files cannot be told apart")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
