# SPDX-License-Identifier: Apache-2.0
"""Families of causal language models through ghost: exact in float64, or refused by the layer's name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.numerics.families import EXACT, REFUSED, try_family

PAGE = Path(__file__).parents[2] / "recipes/how_to/models.md"


@pytest.mark.parametrize("family", ["bloom", "cohere2", "gemma3_text", "llama", "mixtral", "mpt", "phi", "qwen3_moe"])
def test_a_family_is_exact(family: str) -> None:
    outcome = try_family(family)
    assert outcome.kind == EXACT, outcome
    assert f"`{family}`" in PAGE.read_text(encoding="utf-8").partition("## Refused")[0]


@pytest.mark.parametrize(
    ("family", "layer"),
    [("gpt_neo", "transformer.wpe"), ("mamba", "mixer.A_log"), ("gpt_oss", "experts.gate_up_proj")],
)
def test_a_family_is_refused_by_the_layers_name(family: str, layer: str) -> None:
    outcome = try_family(family)
    assert outcome.kind == REFUSED and layer in outcome.why and "Remedy" in outcome.why
    assert re.search(rf"^\| `{family}` \| .*{re.escape(layer)}", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.nightly
def test_the_page_says_what_comes_of_every_family() -> None:
    """In a process of its own, whose memory is bounded: some ask for more than there is."""
    command = [sys.executable, "-m", "tests.numerics.families"]
    done = subprocess.run(command, cwd=PAGE.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == PAGE.read_text(encoding="utf-8")
