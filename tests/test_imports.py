"""The plan of the package: which room may import which, no circles, and one address for each name."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS = [
    {"errors", "__init__"},
    {"objectives", "theory"},
    {"config", "versions"},
    {"data"},
    {"prompting"},
    {"models"},
    {"distributed", "endpoints"},
    {"engine", "rewards", "planning"},
    {"policy", "targets"},
    {"environments"},
    {"training"},
    {"evaluation"},
    {"experiments", "serving"},
    {"demo"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
"""The rooms of `alignpro` from the ground up: a room may import those of lower floors, and `alignpro_kernels`."""

NARROWER = {
    "engine": {"models", "config", "errors"},
    "objectives": {"errors"},
    "theory": {"errors"},
    "endpoints": {"config", "errors"},
    "config": {"objectives", "errors"},
    "rewards": {"models", "prompting", "data", "config", "endpoints", "errors"},
    "targets": {"engine", "endpoints", "models", "prompting", "data", "config", "errors"},
    "distributed": {"models", "config", "errors"},
    "planning": {"config", "prompting", "models", "distributed", "errors"},
}
"""Rooms that may import less than their floor allows."""

EXTERNAL = {"objectives": {"torch", "alignpro_kernels"}, "theory": {"numpy", "scipy", "torch", "alignpro_kernels"}}
"""Pure rooms, and the libraries that they may import besides the standard library."""

FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def sources(package: str) -> dict[str, Path]:
    """Module name → file of a package in this repository."""
    root = ROOT / package
    found = {}
    for path in root.rglob("*.py"):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources("alignpro")


def imported(path: Path) -> set[str]:
    """Every module, or name of a module, that a file imports, by its dotted name."""
    return named(ast.walk(ast.parse(path.read_text())))


def imported_at_start(path: Path) -> set[str]:
    """What a file imports when it is imported itself: not within functions, nor for type checkers alone."""
    return named(ast.parse(path.read_text()).body)


def named(nodes: Iterable[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def internal(module: str) -> frozenset[str]:
    """The modules of `alignpro` that a module imports; the package itself imports what it offers only on demand."""
    if module == "alignpro":
        return frozenset()
    names = imported(MODULES[module])
    return frozenset(
        name if name in MODULES else name.rpartition(".")[0]
        for name in names
        if name in MODULES or name.rpartition(".")[0] in MODULES
    )


def room(module: str) -> str:
    """The room of a module: the package or module directly under `alignpro`."""
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    own = room(module)
    for other in map(room, internal(module)):
        if other != own:
            assert FLOOR[other] < FLOOR[own], f"{module} imports {other}"
            assert other in NARROWER.get(own, {other}), f"{module} imports {other}"


def test_no_circle_of_files() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for other in internal(module):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("own", EXTERNAL)
def test_objectives_and_theory_are_pure(own: str) -> None:
    for module, path in MODULES.items():
        if room(module) == own:
            packages = {name.partition(".")[0] for name in imported(path)} - {"alignpro", "__future__"}
            standard = {"collections", "dataclasses", "enum", "functools", "itertools", "math", "typing"}
            assert packages <= EXTERNAL[own] | standard, module


def test_kernels_do_not_import_alignpro() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {name for name in imported(path) if name.partition(".")[0] == "alignpro"}, path


def test_peft_is_imported_only_for_an_adapter() -> None:
    """It takes an eighth of the time to import what `alignpro rewrite` needs."""
    reached, waiting = set(), {"alignpro.environments.rewriter"}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        names = imported_at_start(MODULES[module])
        assert "peft" not in {name.partition(".")[0] for name in names}, module
        found = {each for name in (module, *names) for each in (name, name.rpartition(".")[0])}
        waiting |= (found & set(MODULES)) - reached
    assert "alignpro.models.loading" in reached


def test_nothing_imports_the_command_line() -> None:
    users = {m for m in MODULES if room(m) != "cli" and "cli" in map(room, internal(m))}
    assert users <= {"alignpro.__main__"}


def test_the_hallway_is_short() -> None:
    entries = {room(module) for module in MODULES if module != "alignpro"}
    assert entries <= set(FLOOR)
    assert len(entries) <= 24
    graph = {
        name: {o for m in MODULES if room(m) == name for o in map(room, internal(m)) if o != name} for name in FLOOR
    }

    def longest(name: str) -> int:
        return 1 + max(map(longest, graph[name]), default=0)

    assert max(map(longest, entries)) <= 15


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_a_package_says_what_is_in_it(module: str) -> None:
    docstring = importlib.import_module(module).__doc__
    assert docstring
    if module.count(".") == 1:
        assert "ay import" in docstring or "eads" in docstring, f"{module} does not say what it may import"


@pytest.mark.parametrize("module", MODULES)
def test_a_name_has_one_address(module: str) -> None:
    """A package's exports are imported from the package, by all modules outside it; nothing is re-exported."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname != alias.name for alias in node.names), f"{module}: re-export"
            package = ".".join((node.module or "").split(".")[:2])
            if room(module) != room(package) and package in MODULES and node.module != package:
                exported = getattr(importlib.import_module(package), "__all__", ())
                assert not {alias.name for alias in node.names} & set(exported), f"{module} imports from {node.module}"
