import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each file imports from its own floor and those below it only; a new module needs a place here.
FLOORS = [
    {"concepts", "sandbox", "stats", "default_model"},
    {"models"},
    {"activations"},
    {"transcripts"},
    {"corpora"},
    {"vectors", "generation", "writers"},
    {"shards", "steering"},
    {"extraction", "reading", "geometry", "formats"},
    {"layers"},
    {"checks", "default_vectors"},
    {"training", "audit"},
    {"report"},
    {"commands"},
    {"cli"},
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
SOURCES = [
    path for folder in ("calibrate", "recipes", "data_curation") for path in ROOT.joinpath(folder).rglob("*.py")
]
FILES = {str(path.relative_to(ROOT)): path for path in SOURCES}
LIBRARY = [name for name in FILES if name.startswith("calibrate/")]
CURATION = [name for name in FILES if name.startswith("data_curation/")]
IMPORT_BY_NAME = ("calibrate/__init__.py", "calibrate/cli.py", "data_curation/cli.py")


def parse(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imported(name: str) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions too; of `from a import b` both `a` and `a.b`."""
    found = set()
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def home(dotted: str) -> str | None:
    """The module or package directly below `calibrate` to which a name belongs."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "calibrate" and len(parts) > 1 and parts[1] != "__version__" else None


@pytest.mark.parametrize("name", LIBRARY)
def test_nothing_imports_upwards(name):
    own = Path(name).parts[1].removesuffix(".py")
    used = {unit for unit in map(home, imported(name)) if unit}
    if own == "__init__":
        assert not used  # the public names load lazily
        return
    assert {own, *used} <= set(FLOOR), "give the module a floor"
    assert all(FLOOR[unit] <= FLOOR[own] for unit in used), used
    # An auditor that shares code with the trainer shares its blind spots.
    assert {"training": "audit", "audit": "training"}.get(own) not in used
    assert not any(
        dotted.split(".")[0] in ("recipes", "data_curation", "benchmarks", "tests") for dotted in imported(name)
    )


@pytest.mark.parametrize("name", LIBRARY + CURATION)
def test_dangerous_calls_are_absent(name):
    """Pickles, code of a checkpoint, swallowed errors, and imports that the floors could not see."""
    modules = {dotted.split(".")[0] for dotted in imported(name)}
    assert modules.isdisjoint({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
    for node in ast.walk(parse(name)):
        text = ast.unparse(node)
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno}"
            assert not re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)), f"{name}:{node.lineno}"
        elif isinstance(node, ast.keyword):
            assert text not in ("trust_remote_code=True", "weights_only=False", "allow_pickle=True"), text
        elif isinstance(node, ast.Attribute):
            assert text != "torch.load", f"{name}:{node.lineno}"
        elif isinstance(node, ast.Call) and name not in IMPORT_BY_NAME:
            called = ast.unparse(node.func).split(".")[-1]
            assert called not in ("import_module", "__import__"), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    """Under about 300 lines and about 40 in the rules; beyond these limits something is to be split."""
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 330
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_import_is_light():
    """Neither the package nor the command's help loads torch or transformers."""
    heavy = "{'torch', 'transformers', 'trl', 'matplotlib'}"
    check = f"import sys, calibrate, calibrate.cli; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_paths_in_documents_exist():
    """A path in backticks is checked where it starts with one of our folders; MODEL and X stand for any name."""
    documents = [path for pattern in ("*.md", "[a-z]*/**/*.md") for path in ROOT.glob(pattern)]
    documents = [path for path in documents if not {"runs", "calibrate.egg-info"} & set(path.relative_to(ROOT).parts)]
    folders = "calibrate|data_curation|docs|recipes|tests|accelerate_configs|benchmarks"
    paths = [
        (document.name, path)
        for document in documents
        for quoted in re.findall(r"`([^`\n]+)`", document.read_text(encoding="utf-8"))
        for path in re.findall(rf"(?:^|\s)((?:{folders})/\S*)", quoted)
    ]
    assert paths
    missing = [found for found in paths if not list(ROOT.glob(re.sub(r"MODEL|\bX\b", "*", found[1]).rstrip("/")))]
    assert missing == []
