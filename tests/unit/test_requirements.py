# SPDX-License-Identifier: Apache-2.0
"""What the package imports is declared in setup.py. Nothing is installed or imported here but setuptools."""

import ast
import importlib.metadata
import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
# Import names that are not their distribution's.
DISTRIBUTION_OF = {"PIL": "pillow", "hydra": "hydra-core", "transfer_queue": "transferqueue", "yaml": "pyyaml"}
# What only a folder (or module) may import: what an extra brings.
EXTRA_OF = {
    "cpu": {"verl_gradalign/cpu", "verl_gradalign/toy", "verl_gradalign/experiments", "recipes/quickstart"},
    "gpu": {"verl_gradalign/cpu/registration.py"},
}


def normalised(requirement):
    """The distribution's name: no version, no extra."""
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0].strip().lower().replace("_", "-")


@pytest.fixture(scope="module")
def declared():
    """Distributions by extra; "" holds what is always required."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **options: given.update(options))
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return {
        "": {normalised(r) for r in given["install_requires"]},
        **{extra: {normalised(r) for r in listed} for extra, listed in given["extras_require"].items()},
    }


def imports_of(path):
    """The top-level names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"verl_gradalign", "setuptools", "tests"}


def brought_by_verl():
    """What verl itself requires, extras apart, with what its trainers cannot be imported without."""
    listed = {normalised(r) for r in importlib.metadata.requires("verl") if "extra ==" not in r}
    # verl leaves the choice of torch's build to its extras, and to the `cpu` extra here.
    return listed | {"torch"}


@pytest.mark.parametrize("folder", ["verl_gradalign", "recipes"])
def test_every_import_is_declared(folder, declared):
    known = declared[""] | brought_by_verl()
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        name = str(path.relative_to(ROOT))
        allowed = known | {
            d for extra, places in EXTRA_OF.items() for d in declared[extra] if name.startswith(tuple(places))
        }
        allowed |= {"vllm"} if name.startswith(tuple(EXTRA_OF["gpu"])) else set()
        missing = {DISTRIBUTION_OF.get(n, n).replace("_", "-") for n in imports_of(path)} - allowed
        assert not missing, f"{name} imports {missing}, which setup.py does not declare"


def test_an_undeclared_import_is_found(declared, tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def f():\n    import undeclared_package\n")
    assert imports_of(path) == {"undeclared_package"} and "undeclared-package" not in declared[""]


def test_the_antlr_runtime_is_the_one_that_hydra_works_with(declared):
    name = "antlr4-python3-runtime"
    assert importlib.metadata.version(name) == "4.9.3" and name in declared["test"]
