# SPDX-License-Identifier: Apache-2.0
"""Real verl runs on the CPU platform, each started once and shared by the tests that read what it left behind.

The launches that the collected tests name as fixtures (`launches.py`) run two at a time, in a fixed order, before and
while the first assertions wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.launches import LAUNCHES
from tests.e2e.runs import NUM_PLACES, Run, Workplace
from verl_gradalign.data.tasks import write_task_files


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Task files and a model brought to a middling success rate, as in the demonstration."""
    from verl_gradalign.toy.model import build_untrained_policy
    from verl_gradalign.toy.warmup import warm_up

    root = tmp_path_factory.mktemp("e2e")
    files = write_task_files(root / "data", num_pool=600, num_trusted=24, num_test=64, seed=0)
    # Fewer steps than the demonstration's: the habit is there, the skill is not yet complete.
    warm_up(build_untrained_policy(root / "untrained"), root / "model", num_steps=600)
    return Workplace(root, files, root / "model")


@pytest.fixture(scope="session")
def launched(request: pytest.FixtureRequest, workplace: Workplace) -> Iterator[dict[str, Future[Any]]]:
    """Every launch that a collected test asks for, begun or waiting for a place."""
    wanted: set[Any] = set()
    for item in request.session.items:
        wanted.update(getattr(item, "fixturenames", ()))
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        # Tests of other folders are parametrised by tuples of anything.
        wanted.update(name for p in parameters if isinstance(p, tuple) for name in p[:1] if isinstance(name, str))
    with ThreadPoolExecutor(NUM_PLACES) as places:
        yield {name: places.submit(launch, workplace) for name, launch in LAUNCHES.items() if name in wanted}
        places.shutdown(cancel_futures=True)


def _fixture_of(name: str) -> Any:
    @pytest.fixture(scope="session", name=name)
    def result(launched: dict[str, Future[Any]]) -> Any:
        return launched[name].result()

    return result


for _name in LAUNCHES:
    globals()[f"_{_name}"] = _fixture_of(_name)


@pytest.fixture(scope="session")
def cosine_run(series: dict[str, Run]) -> Run:
    """Six steps on one rank, chosen by cosine, validated before, with everything logged that can be."""
    return series["cosine"]
