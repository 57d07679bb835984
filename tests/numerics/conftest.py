# SPDX-License-Identifier: Apache-2.0
"""Models that the tests of a module share. A test that changes its model makes its own."""

from __future__ import annotations

import pytest
from torch import nn

from tests.numerics.models import make_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model("qwen2-tied")
