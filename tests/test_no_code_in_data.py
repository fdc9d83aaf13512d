"""No file that is read can run code: no unrestricted pickle anywhere in the package, the tests or the benchmarks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("puna", "tests", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "shelve"}


def called(node: ast.Call) -> str:
    """The dotted name that is called, as it is written."""
    return ast.unparse(node.func)


def keyword(node: ast.Call, name: str) -> object:
    return next((ast.unparse(word.value) for word in node.keywords if word.arg == name), None)


def dangers(source: str) -> Iterator[str]:
    """What in a source may run code out of a file it reads."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, weights_only = called(node), keyword(node, "weights_only")
            if name == "torch.load" and weights_only != "True":
                yield f"line {node.lineno}: torch.load does not say that it loads weights only"
            if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads"):
                yield f"line {node.lineno}: {name}"
            if keyword(node, "allow_pickle") == "True":
                yield f"line {node.lineno}: {name} with allow_pickle"
        elif isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases):
            if not any(isinstance(part, ast.FunctionDef) and part.name == "find_class" for part in node.body):
                yield f"line {node.lineno}: {node.name} builds whatever a pickle names"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"line {node.lineno}: imports {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES)
            if names == ["pickle"] and isinstance(node, ast.ImportFrom):
                yield f"line {node.lineno}: imports names out of pickle, which hides their use"


def test_there_are_sources():
    assert len(SOURCES) > 100


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_runs_nothing_that_it_reads(path):
    text = path.read_text(encoding="utf-8")
    assert list(dangers(text)) == []
    assert "weights_only=" + "False" not in text


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file, weights_only=" + "False)",
        "torch.load(file)",
        "torch.load(file, weights_only=trusted)",
        "pickle.load(file)",
        "pickle.loads(data)",
        "pickle.Unpickler(file).load()",
        "np.load(file, allow_pickle=True)",
        "from pickle import loads",
        "import dill",
        "class Mine(pickle.Unpickler):\n    pass",
    ],
)
def test_dangers_are_noticed(line):
    assert list(dangers(line)) != []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file, weights_only=True, mmap=True)",
        "import pickle\npickle.dumps(value)",
        "class Mine(pickle.Unpickler):\n    def find_class(self, module, name):\n        raise ValueError",
        "np.load(file, allow_pickle=False)",
    ],
)
def test_what_is_safe_passes(line):
    assert list(dangers(line)) == []
