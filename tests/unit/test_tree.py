# SPDX-License-Identifier: Apache-2.0
"""What holds for every file of the tree."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 500_000
# "About 300", and 400 where one page is read as one page, like config: a longer module has two ideas.
MAX_LINES = 400
# One table or one fixture in several claims.
LONGER_TESTS = 510


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout, so what belongs to the tree is not known")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_source_file_states_its_licence():
    files = [p for p in tracked() if p.suffix == ".py" and p.stat().st_size]
    assert len(files) > 100
    assert [p for p in files if "SPDX-License-Identifier: Apache-2.0" not in p.read_text(encoding="utf-8")[:200]] == []


def test_no_file_is_large():
    assert [(p, p.stat().st_size) for p in tracked() if p.stat().st_size > MAX_BYTES] == []


def test_modules_have_one_idea_each():
    sources = [p for p in tracked() if p.suffix == ".py"]
    limits = {p: LONGER_TESTS if "tests" in p.relative_to(ROOT).parts else MAX_LINES for p in sources}
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in sources}
    assert {str(p): n for p, n in lengths.items() if n > limits[p]} == {}
