# SPDX-License-Identifier: Apache-2.0
"""Dependencies point one way. Read from the source, so that imports inside functions count too.

Imports for type checkers alone do not: they are no dependency of what runs.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import verl_gradalign

ROOT = Path(verl_gradalign.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
HOSTS = {"verl", "ray", "transfer_queue"}
KNOW_VERL = {"integration", "doctor", "cpu", "plugin"}

LEAVES = {"config_fields", "errors", "files", "markdown", "types", "metrics", "rank_correlation", "student", "versions"}
SPINE = LEAVES | {"config", "findings"}
# What may be imported, by folder or module of the package, besides the part itself: a row for each.
ALLOWED_PARTS = {
    "__init__": {"types", "log", "probe", "selection"},
    "errors": set(),
    "files": set(),
    "markdown": set(),
    "versions": set(),
    "types": set(),
    "metrics": set(),
    "rank_correlation": set(),
    "student": set(),
    "findings": set(),
    "config": {"errors", "config_fields"},
    "config_fields": {"errors"},
    "reference": {"config", "files", "markdown", "metrics", "selection"},
    "plugin": {"integration", "cpu"},
    "data": {"files", "errors"},
    "probe": SPINE,
    "selection": SPINE,
    "log": SPINE | {"probe", "selection"},
    "toy": {"files", "data"},
    "cost": SPINE | {"probe"},
    "integration": SPINE | {"probe", "selection", "log", "data"},
    "cpu": {"integration", "types"},
    "bench": SPINE | {"probe", "cost", "data", "doctor", "toy", "experiments"},
    "doctor": SPINE | {"integration", "cost", "data", "probe", "selection"},
    "report": SPINE | {"log", "selection", "experiments", "data"},
    "experiments": SPINE | {"log", "selection", "toy", "data", "report"},
    "cli": SPINE | {"experiments", "doctor", "report", "cost", "data", "integration", "selection", "toy", "bench"},
}


def part_of(path):
    """The part of the package that a module belongs to: "probe" for tests/numerics/oracle.py, "types" for types.py."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def name_of(path):
    """The dotted name of a module; a package is its __init__."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes_that_run(tree):
    """Every node but those of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if is_for_type_checkers(child):
            yield from (n for other in child.orelse for n in nodes_that_run(other))
            continue
        yield child
        yield from nodes_that_run(child)


def imported_names(path, top_level_only=False):
    """Every module that a source file imports, as dotted names; `from a import b` gives a, and a.b if it is one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else nodes_that_run(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # A package's own names apart, what is imported from it are its modules.
            names |= {node.module} | inner if not inner <= set(NAMES) else inner
    return names


def imported_distributions(path, top_level_only=False):
    return {name.split(".")[0] for name in imported_names(path, top_level_only)}


def imported_parts(path):
    """Parts of the package itself that a module imports."""
    own = [name.split(".") for name in imported_names(path) if name.startswith("verl_gradalign.")]
    return {parts[1] for parts in own} & {part_of(path) for path in MODULES}


def modules_of(part):
    modules = [path for path in MODULES if part_of(path) == part]
    assert modules, f"no module in {part}"
    return modules


def test_verl_is_imported_in_its_folders_only():
    importers = {part_of(path) for path in MODULES if imported_distributions(path) & HOSTS}
    assert importers <= KNOW_VERL
    assert "integration" in importers  # the check sees something


def test_every_part_has_a_row():
    assert set(ALLOWED_PARTS) == {part_of(path) for path in MODULES}


@pytest.mark.parametrize("part", ALLOWED_PARTS)
def test_a_part_imports_only_the_parts_below_it(part):
    for path in modules_of(part):
        assert imported_parts(path) <= ALLOWED_PARTS[part] | {part}, path


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: (imported_names(path) & set(NAMES)) - {name, "verl_gradalign"} for name, path in NAMES.items()}
    assert sum(map(len, graph.values())) > 200  # the check sees something
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


@pytest.mark.parametrize("module", ["__init__.py", "plugin.py"])
def test_what_every_verl_process_imports_is_light(module):
    assert not imported_distributions(ROOT / module, top_level_only=True) & (HOSTS | {"torch", "hydra"})


def test_configuration_is_importable_without_torch_or_verl():
    names = imported_distributions(ROOT / "config.py")
    assert not names & (HOSTS | {"torch", "hydra"})
