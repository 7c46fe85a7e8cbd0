"""Rules that the text of the project keeps: the direction of imports, no code from data, small files."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

CODE = sorted([*ROOT.glob("core/**/*.py"), *ROOT.glob("efficientids/**/*.py"), ROOT / "train_llama.py"])
ALL_PYTHON = sorted([*CODE, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
TORCH_DOOR = ROOT / "core" / "weight_files.py"
# Written in pieces, for this file is searched too.
MACHINE_PATH = re.compile(
    "|".join(re.escape("/" + name + "/") for name in ("work", "root", "home", "Users")) + "|/tm" + "p/"
)
REGISTRY = re.compile(re.escape("pypi" + ".org") + "|" + re.escape("pythonhosted" + ".org"))


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(), str(file)))


def calls(file: Path, name: str) -> list[ast.Call]:
    """The calls of `name`, such as "np.load", by the text of the callee."""
    return [node for node in nodes(file) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def keyword(call: ast.Call, name: str) -> object:
    """A keyword's constant; None where it is absent or no constant."""
    found = [k.value for k in call.keywords if k.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def imported(file: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def test_there_is_code_to_look_at() -> None:
    assert len(CODE) > 40 and TORCH_DOOR in CODE and len(ALL_PYTHON) > len(CODE)


def test_core_never_imports_the_application() -> None:
    """By its text: no import of it, and no name in quotes to import by."""
    for file in ROOT.glob("core/**/*.py"):
        assert not [name for name in imported(file) if re.match(r"\.*efficientids\b", name)], file
        assert not calls(file, "importlib.import_module") and not calls(file, "__import__"), file


def test_nothing_is_unpickled() -> None:
    banned = {"cloudpickle", "dill", "joblib", "shelve", "marshal", "pickle5", "_pickle"}
    for file in CODE:
        assert not imported(file) & banned, file
        for node in nodes(file):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "pickle", file
            # torch raises pickle's error; nothing else of that module may be named.
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError" and file == TORCH_DOOR, f"{file}:{node.lineno}"


def test_torch_loads_weights_only_and_at_one_door() -> None:
    for file in CODE:
        if file != TORCH_DOOR:
            assert not [name for name in imported(file) if name.split(".")[0] == "torch"], file
    (door,) = calls(TORCH_DOOR, "torch.load")
    assert keyword(door, "weights_only") is True


def test_arrays_are_read_without_pickle_and_yaml_without_objects() -> None:
    found = 0
    for file in CODE:
        for call in [*calls(file, "np.load"), *calls(file, "numpy.load")]:
            assert keyword(call, "allow_pickle") is False, f"{file}:{call.lineno}"
            found += 1
        for name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
            assert not calls(file, name), f"{file}: {name}"
    assert found >= 3


def test_no_code_of_a_checkpoint_is_trusted() -> None:
    for file in ALL_PYTHON:
        for node in nodes(file):
            named = node.arg if isinstance(node, ast.keyword) else node.id if isinstance(node, ast.Name) else None
            assert named != "trust_remote_code", file


@pytest.mark.parametrize("file", ALL_PYTHON, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_small(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= (39 if file.name == "train_llama.py" else 400)
    for node in nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name}, line {node.lineno}"


def test_no_tracked_file_names_a_machines_path_or_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"no git checkout: {listed.stderr.strip()}")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert ROOT / "train_llama.py" in files
    for file in files:
        if file.is_file():  # not deleted since
            for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
                found = MACHINE_PATH.search(line) or REGISTRY.search(line)
                assert found is None, f"{file}:{number}: {line.strip()}"
