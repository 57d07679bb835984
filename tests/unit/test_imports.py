# SPDX-License-Identifier: Apache-2.0
"""Dependencies point one way. Read from the source, so that imports inside functions count too."""

import ast
from pathlib import Path

import pytest

import verl_gradalign

ROOT = Path(verl_gradalign.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
HOSTS = {"verl", "ray", "transfer_queue"}
# What may be imported of the package, by part of the package.
ALLOWED_PARTS = {
    "types": set(),
    "rank_correlation": set(),
    "probe": {"types", "config", "rank_correlation", "probe"},
    "selection": {"types", "config", "rank_correlation", "selection"},
    "data": {"data"},
}


def part_of(path):
    """The part of the package that a module belongs to: "probe" for probe/oracle.py, "types" for types.py."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_names(path, top_level_only=False):
    """Every module that a source file imports, as dotted names; `from a import b` gives a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_distributions(path, top_level_only=False):
    return {name.split(".")[0] for name in imported_names(path, top_level_only)}


def imported_parts(path):
    """Parts of the package itself that a module imports."""
    own = [name.split(".") for name in imported_names(path) if name.startswith("verl_gradalign.")]
    return {parts[1] for parts in own}


def parts_at_the_top(path):
    own = [name.split(".") for name in imported_names(path, top_level_only=True) if name.startswith("verl_gradalign.")]
    return {parts[1] for parts in own}


def modules_of(part):
    modules = [path for path in MODULES if part_of(path) == part]
    assert modules, f"no module in {part}"
    return modules


def test_only_the_integration_the_cpu_platform_and_the_plugin_know_verl():
    importers = {part_of(path) for path in MODULES if imported_distributions(path) & HOSTS}
    assert importers <= {"integration", "cpu", "plugin"}
    assert "integration" in importers  # the check sees something


@pytest.mark.parametrize("part", ALLOWED_PARTS)
def test_a_part_imports_only_the_parts_below_it(part):
    for path in modules_of(part):
        assert imported_parts(path) <= ALLOWED_PARTS[part], path


def test_reports_need_neither_estimators_nor_verl():
    for path in modules_of("report"):
        assert not imported_parts(path) & {"probe", "integration", "cpu", "plugin"}, path


def test_nothing_but_the_plugin_and_the_miniatures_imports_the_cpu_platform():
    importers = {part_of(path) for path in MODULES if "cpu" in imported_parts(path)}
    assert importers <= {"cpu", "experiments", "plugin"}


@pytest.mark.parametrize("module", ["__init__.py", "plugin.py"])
def test_what_every_verl_process_imports_is_light(module):
    assert not imported_distributions(ROOT / module, top_level_only=True) & (HOSTS | {"torch", "hydra"})


def test_configuration_is_importable_without_torch_or_verl():
    for path in modules_of("config"):
        assert not imported_distributions(path, top_level_only=True) & (HOSTS | {"torch", "hydra"}), path
        assert all(part == "config" for part in parts_at_the_top(path)), path
