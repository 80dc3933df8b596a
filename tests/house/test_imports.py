"""The house: which room may know of which, and what a command may import before it has anything to do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import mimscale
from mimscale.cli import COMMANDS

HOUSE = Path(mimscale.__file__).parent
# Arrows point from a room to those behind it, and from all but models and mim to data, which stands alone.
ROOMS = ("commands", "study", "transfer", "training", "mim", "models")
NO_DATA = ("models", "mim")
ENTRANCE = ("cli", "completion", "__main__")  # they know the commands
ALLOWED_DEEPSPEED = {"training/engine.py", "training/deepspeed_private.py"}
MOST_MODULES = 16


@dataclass(frozen=True)
class Arrow:
    """``source`` imports ``target``: ``now`` when it is imported itself, else later or for types alone."""

    source: str
    target: str
    now: bool


def _modules() -> dict[str, Path]:
    found = {}
    for path in HOUSE.rglob("*.py"):
        if "carried" not in path.parts:
            parts = path.relative_to(HOUSE.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imports(tree: ast.AST, now: bool = True) -> Iterator[tuple[str, bool]]:
    """Every dotted name that is imported, and whether at once."""
    for node in ast.iter_child_nodes(tree):
        yield from ((name, now) for name in _named(node))
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from _imports(node, now and not later and not types)


@cache
def _homes(package: Path) -> dict[str, str]:
    """Where a package that imports its names on first use has them from (``_HOME``)."""
    for node in ast.parse(package.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOME":
            return ast.literal_eval(node.value)
    return {}


@cache
def arrows() -> frozenset[Arrow]:
    """All imports among mimscale's modules."""
    modules = _modules()
    found = set()
    for source, path in modules.items():
        for name, now in _imports(ast.parse(path.read_text())):
            target = name
            while target and target not in modules:
                target = target.rpartition(".")[0]
            if not target:
                continue
            home = _homes(modules[target]).get(name.removeprefix(f"{target}.")) if target != name else None
            target = f"{target}.{home}" if home else target
            if target != source:
                found.add(Arrow(source, target, now))
    return frozenset(found)


def _room(module: str) -> str:
    return [*module.split("."), ""][1]


def _up(arrow: Arrow) -> bool:
    source, target = _room(arrow.source), _room(arrow.target)
    if source == target or source in ENTRANCE:
        return False
    if source in ROOMS:
        if target in ROOMS:
            return ROOMS.index(target) < ROOMS.index(source)
        return target in ENTRANCE or (target == "data" and source in NO_DATA)
    if source == "data":
        return target in ROOMS or target in ENTRANCE
    # What all rooms stand on may reach into them later, as a registry does, but not need them.
    return arrow.now and (target in ROOMS or target == "data")


def test_no_arrow_points_up():
    assert not sorted(f"{arrow.source} imports {arrow.target}" for arrow in arrows() if _up(arrow))


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, by Tarjan's strongly connected components."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in edges.get(module, ()):
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            part = stack[stack.index(module) :]
            del stack[-len(part) :]
            if len(part) > 1:
                found.append(sorted(part))

    for module in edges:
        if module not in number:
            visit(module)
    return found


def test_no_modules_import_each_other():
    edges: dict[str, set[str]] = {}
    for arrow in arrows():
        if arrow.now:
            edges.setdefault(arrow.source, set()).add(arrow.target)
    assert not circles(edges)


def test_only_the_engine_imports_deepspeed():
    found = set()
    for path in _modules().values():
        names = (name for name, _ in _imports(ast.parse(path.read_text())))
        if any(name.partition(".")[0] == "deepspeed" for name in names):
            found.add(path.relative_to(HOUSE).as_posix())
    assert found <= ALLOWED_DEEPSPEED


def test_no_folder_is_a_drawer():
    counts: dict[Path, int] = {}
    for path in _modules().values():
        if path.name != "__init__.py":
            counts[path.parent] = counts.get(path.parent, 0) + 1
    assert not {str(folder.relative_to(HOUSE)): n for folder, n in counts.items() if n > MOST_MODULES}


# -- what is imported before there is anything to do ---------------------------------------------------------------------


def _heavy_after(words: list[str], folder: Path) -> list[str]:
    """Which of the packages that take seconds are imported once ``mimscale WORDS`` has ended well."""
    program = (
        "import sys\nfrom mimscale.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as end:\n    status = end.code\n"
        "print('status', status, *(n for n in ('torch', 'deepspeed', 'timm', 'scipy', 'pandas') if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=folder, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1].split() if done.stdout else []
    assert last[:2] == ["status", "0"], done.stdout + done.stderr
    return last[2:]


KINDS_OF_BENCH = ("step", "memory", "data", "communication", "save")


@pytest.mark.parametrize(
    "words", [[], *([word] for word in COMMANDS), *(["bench", kind] for kind in KINDS_OF_BENCH)], ids=" ".join
)
def test_help_waits_for_no_library(words, tmp_path):
    assert _heavy_after([*words, "--help"], tmp_path) == []


@pytest.mark.parametrize("study", ["smoke", "mini", "paper"])
def test_a_study_is_planned_and_looked_at_without_torch(study, tmp_path):
    assert _heavy_after(["study", "plan", study], tmp_path) == []
    assert _heavy_after(["study", "status", study], tmp_path) == []


def test_shards_are_listed_and_a_run_is_looked_at_without_torch(solar_shards, tmp_path):
    assert _heavy_after(["shards", "list", str(solar_shards)], tmp_path) == []
    (tmp_path / "recipe.yaml").write_text("train: {iterations: 10, global_batch: 4}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0, "images_per_s": 2.0}\n')
    (tmp_path / "result.json").write_text("{}")
    assert _heavy_after(["status", str(tmp_path)], tmp_path) == []
