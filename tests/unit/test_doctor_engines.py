# SPDX-License-Identifier: Apache-2.0
"""The doctor on configurations of other engines than FSDP: it says what a launch would."""

import pytest

from tests.unit.test_doctor import command, errors, on_a_login_node, only_error, place  # noqa: F401  (fixtures)

FURTHER = ("actor_rollout_ref.rollout.name=vllm", "critic.enable=false", "gradalign.score=dot")


@pytest.mark.parametrize("estimator", ["backward", "finite_difference"])
@pytest.mark.parametrize("engine", ["veomni", "torchtitan"])
def test_what_asks_for_passes_alone_is_right_and_has_a_cost(command, monkeypatch, engine, estimator):  # noqa: F811
    keys = (f"model_engine={engine}", f"gradalign.estimator={estimator}")
    answer = on_a_login_node(command, monkeypatch, *FURTHER, *keys)
    assert answer["ok"], errors(answer)
    assert answer["cost"] is not None


@pytest.mark.parametrize("engine", ["veomni", "torchtitan"])
def test_ghost_is_one_error_with_backward_as_its_remedy(command, monkeypatch, engine):  # noqa: F811
    answer = on_a_login_node(command, monkeypatch, *FURTHER, f"model_engine={engine}")
    error = only_error(answer, "gradalign.estimator=ghost", engine)
    assert "gradalign.estimator=backward" in error["remedy"]
