"""The rules of the house that no linter knows: who may import whom, and what keeps a module readable.

Everything ruff or mypy can check (print, notes to self, docstrings of modules, types) is left to them; see
pyproject.toml.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"mobility_agent", "process_server", "config_server", "recovery"}
WORKSHOP = {"simulator", "bench", "tests"}
ROOMS = {"replicar"} | PARTS | WORKSHOP

# What a file may import besides its own room; the longest prefix that fits counts. The workshop may import everything.
ALLOWED = {
    "replicar": set(),
    "replicar/cli": {"recovery", "simulator"},  # the operator's entry point; `replicar demo` is the simulator's
    **{part: {"replicar"} for part in PARTS},
    **dict.fromkeys(WORKSHOP, ROOMS),
}

LINES_LIMIT = 400
_LOGGING = {"debug", "info", "warning", "error", "exception", "critical", "log"}
_MERGE_MARK = re.compile(r"^(?:<{7} |>{7} |={7}$)", re.MULTILINE)
_MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")


def _modules() -> list[str]:
    files = (file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    return sorted(str(file.relative_to(ROOT)) for file in files)


def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(), module)


def _imported_rooms(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and room of every import, at any depth of the module, relative ones resolved."""
    package = Path(module).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            # Beyond the top (`from ... import agent`) Python itself refuses; a room is then the first imported name.
            yield node.lineno, base[0] if base else (node.module or node.names[0].name).partition(".")[0]


def _allowed(module: str) -> set[str]:
    prefixes = [prefix for prefix in ALLOWED if module.startswith(prefix + "/")]
    return ALLOWED[max(prefixes, key=len)] | {module.partition("/")[0]}


def _swallows(handler: ast.ExceptHandler) -> bool:
    """Whether it catches everything and does nothing about it but, at most, log."""
    caught = handler.type
    names = {name.id for name in ast.walk(caught) if isinstance(name, ast.Name)} if caught is not None else set()
    if caught is not None and not names & {"Exception", "BaseException"}:
        return False
    return all(_is_logging_or_nothing(statement) for statement in handler.body)


def _is_logging_or_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Pass | ast.Continue):
        return True
    if not isinstance(statement, ast.Expr):
        return False
    if isinstance(statement.value, ast.Constant):
        return True
    call = statement.value
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _LOGGING


@pytest.mark.parametrize("module", _modules())
def test_a_room_imports_only_the_rooms_it_may(module: str) -> None:
    allowed = _allowed(module)
    wrong = [(line, room) for line, room in _imported_rooms(module, _tree(module)) if room in ROOMS - allowed]
    assert not wrong, f"{module} imports {wrong} (line, room); it may import {sorted(allowed)}"


@pytest.mark.parametrize("module", _modules())
def test_a_module_says_what_it_is_and_stays_readable(module: str) -> None:
    text = (ROOT / module).read_text()
    if text:  # an empty __init__.py only marks a package
        assert ast.get_docstring(_tree(module)), f"{module} has no docstring"
    lines = text.count("\n")
    assert lines <= LINES_LIMIT, f"{module} has {lines} lines, the limit is {LINES_LIMIT}: find the noun to split off"


@pytest.mark.parametrize("module", _modules())
def test_no_failure_is_swallowed(module: str) -> None:
    handlers = (node for node in ast.walk(_tree(module)) if isinstance(node, ast.ExceptHandler))
    lines = [handler.lineno for handler in handlers if _swallows(handler)]
    assert not lines, f"{module} catches everything and goes on, in lines {lines}; name what is expected, or raise"


@pytest.mark.parametrize("module", _modules())
def test_no_path_of_one_machine_is_written_down(module: str) -> None:
    constants = (node for node in ast.walk(_tree(module)) if isinstance(node, ast.Constant))
    texts = ((node.lineno, node.value) for node in constants if isinstance(node.value, str))
    found = [(line, text) for line, text in texts if _MACHINE_PATH.search(text)]
    assert not found, f"{module} names paths that exist on one machine only: {found}"


def test_no_document_has_the_marks_of_an_unfinished_merge() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.*"), *(ROOT / "setup").rglob("*.*")]
    assert not [path.name for path in documents if _MERGE_MARK.search(path.read_text())]
    assert _MERGE_MARK.search("one\n<<<<<<< HEAD\ntwo")


def test_every_dependency_is_locked_at_a_version_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "setup/requirements.txt").read_text(), re.MULTILINE))
    extras = [each for extra in project["optional-dependencies"].values() for each in extra]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        assert requirement.name in locked, f"{requirement.name} is not in setup/requirements.txt"
        assert locked[requirement.name] in requirement.specifier


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-node.txt", "package-lock.json"])
def test_a_lock_file_names_no_registry(name: str) -> None:
    text = (ROOT / "setup" / name).read_text()
    assert '"resolved"' not in text
    assert not re.search(r"^\s*(--index-url|--extra-index-url|--find-links|.* @ )", text, re.MULTILINE)


def test_the_rules_see_what_they_forbid() -> None:
    tree = ast.parse(
        "def f():\n    from process_server.ingest import x\ntry:\n    f()\nexcept Exception:\n    log.error('x')\n"
    )
    assert list(_imported_rooms("mobility_agent/a.py", tree)) == [(2, "process_server")]
    assert "process_server" not in _allowed("mobility_agent/a.py")
    assert "recovery" in _allowed("replicar/cli/recover.py")
    assert "recovery" not in _allowed("replicar/control/client.py")
    relative = ast.parse("from ..formats import frame")
    assert list(_imported_rooms("replicar/log/reader.py", relative)) == [(1, "replicar")]
    assert any(_swallows(node) for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))
    assert _MACHINE_PATH.search("/".join(["", "home", "somebody"]))
