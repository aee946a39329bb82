"""The arrows of the house hold: who may import whom, what a bare import costs, and that every file says what it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"pipeline.errors", "pipeline.cifar", "pipeline.intervals", "pipeline.wnids", "pipeline.failpoints"},
    {"pipeline.atomic"},
    {"pipeline.locks"},
    {"pipeline.sources"},
    {"pipeline.samples"},
    {"pipeline.filters"},
    {"pipeline.boxes"},
    {"pipeline.models", "pipeline.saliency", "pipeline.statistics"},
    {"pipeline.explanation"},
    {"pipeline.manifest", "pipeline.units", "pipeline.census"},
    {"pipeline.store", "pipeline.doctor"},
    {"pipeline.profiler"},
    {"pipeline.worker"},
    {"pipeline.interventions"},
    {"pipeline.experiment"},
    {"pipeline.depth"},
]  # each may import those above it, and modules of its own room (sources, saliency, interventions)
FORBIDDEN = {
    "pipeline": {"index", "jobs", "ray", "faiss", "tests"},
    "index": {"jobs", "ray", "torch", "torchvision", "tests"},
    "jobs": {"tests"},
}
LIGHT = ["pipeline", "index", "pipeline.sources", "pipeline.samples", "pipeline.units", "pipeline.store", "pipeline.statistics", "pipeline.worker", "pipeline.interventions.choice"]


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; of `from package import module` the module too."""
    found = set()
    package = module_of(path, root).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(package[: len(package) - node.level + 1] if node.level else []), *([node.module] if node.module else [])])
            found.update({base} | {f"{base}.{alias.name}" for alias in node.names})
    return found


def floor_of(module: str, layers: list[set[str]]) -> int | None:
    """The layer that a module, or the room it lies in, belongs to."""
    return next((i for i, names in enumerate(layers) for name in names if module == name or module.startswith(name + ".")), None)


def faults(root: Path) -> list[str]:
    """Every arrow of a tree of packages that points the wrong way, and every file without a docstring."""
    found = []
    for path in sorted(p for package in FORBIDDEN for p in (root / package).rglob("*.py")):
        name = module_of(path, root)
        wanted = imports(path, root)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            found.append(f"{name} does not begin with a docstring")
        found += [f"{name} imports {other}" for other in sorted(wanted) if other.split(".")[0] in FORBIDDEN[name.split(".")[0]]]
        own = floor_of(name, LAYERS)
        if own is None and name.startswith("pipeline."):
            found.append(f"{name} has no place in the order")
        for other in sorted(wanted) if own is not None else []:
            place = floor_of(other, LAYERS)
            room = next(n for n in LAYERS[own] if name == n or name.startswith(n + "."))
            if place is not None and place >= own and not (other == room or other.startswith(room + ".")):
                found.append(f"{name} imports {other}, which comes after it")
    return found


def test_arrows_hold():
    assert faults(ROOT) == []
    assert {p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()} >= {"pipeline", "index", "jobs"}


GOOD = {"pipeline/__init__.py": '"""A."""', "pipeline/errors.py": '"""A."""', "pipeline/samples.py": '"""A."""\nfrom pipeline.errors import Fault', "index/run.py": '"""A."""\nimport pipeline.store'}


@pytest.mark.parametrize(
    "file, text, fault",
    [
        ("pipeline/units.py", '"""A."""\nimport ray', "pipeline.units imports ray"),
        ("pipeline/units.py", '"""A."""\ndef f():\n    from ray.data import x', "pipeline.units imports ray.data"),
        ("pipeline/units.py", '"""A."""\nimport faiss as f', "pipeline.units imports faiss"),
        ("pipeline/store.py", '"""A."""\nfrom index import Run', "pipeline.store imports index"),
        ("pipeline/store.py", '"""A."""\nfrom pipeline import worker', "pipeline.store imports pipeline.worker, which comes after it"),
        ("pipeline/samples.py", '"""A."""\nfrom . import models', "pipeline.samples imports pipeline.models, which comes after it"),
        ("pipeline/sources/tar.py", '"""A."""\nfrom ..samples import decode', "pipeline.sources.tar imports pipeline.samples, which comes after it"),
        ("pipeline/saliency/a.py", '"""A."""\nfrom pipeline.statistics import x', "pipeline.saliency.a imports pipeline.statistics, which comes after it"),
        ("pipeline/worker.py", '"""A."""\nfrom pipeline.interventions.pruning import Pruner', "pipeline.worker imports pipeline.interventions.pruning, which comes after it"),
        ("pipeline/newcomer.py", '"""A."""', "pipeline.newcomer has no place in the order"),
        ("index/run.py", '"""A."""\nimport torch.nn', "index.run imports torch.nn"),
        ("index/run.py", '"""A."""\nfrom jobs.cluster import x', "index.run imports jobs.cluster"),
        ("jobs/cli.py", "import os", "jobs.cli does not begin with a docstring"),
    ],
)
def test_check_can_fail(tmp_path, file, text, fault):
    """A made-up tree in which all is well, then with one fault: it is found, by name."""
    for name, content in (GOOD | {file: text}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert any(found.startswith(fault) for found in faults(tmp_path))
    (tmp_path / file).write_text(GOOD.get(file, '"""A."""'))
    assert [found for found in faults(tmp_path) if "no place" not in found] == []


HEAVY = {"torch", "torchvision", "ray", "faiss"}


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Module -> the heavy packages that are loaded when it is imported in a fresh process."""
    code = "import sys, importlib; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    answers = {}
    for module in [*LIGHT, "torch"]:
        run = subprocess.run([sys.executable, "-c", code, module], cwd=ROOT, capture_output=True, text=True, check=True)
        answers[module] = HEAVY & set(run.stdout.split())
    return answers


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_nothing_heavy(module, loaded):
    """So that `--help`, notebooks and decode workers start at once; and the measure can tell."""
    assert loaded[module] == set() and loaded["torch"] == {"torch"}


@pytest.mark.parametrize("package", ["pipeline", "index", "jobs"])
def test_files_stay_readable(package):
    """Under 350 lines each, functions under 70."""
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert len(path.read_text(encoding="utf-8").splitlines()) < 350, path.name
        long = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 70]
        assert not long, f"{path.name}: {long}"
