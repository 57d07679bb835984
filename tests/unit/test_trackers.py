# SPDX-License-Identifier: Apache-2.0
"""What verl's loggers wrote of the metrics, read back from each of them; and the pages for wandb."""

import json
import re

import numpy as np
import pytest
from verl.utils.tracking import Tracking

from tests.wandb_files import history
from verl_gradalign.log.wandb_pages import COLUMNS, Pages
from verl_gradalign.metrics import CATALOGUE, named

# Every metric of the catalogue, with words of a run's own in its name, and a value of its own.
VALUES = {re.sub(r"<(\w+)>", r"a-\1.b/c", metric.name): float(place) / 8 for place, metric in enumerate(CATALOGUE)}
STEPS = (1, 2)


def of_step(step):
    return named({name: value + step for name, value in VALUES.items()})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that all loggers write to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tensorboard"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlflow'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path


def log(backend):
    tracking = Tracking("project", "experiment", [backend], config={"trainer": {}})
    for step in STEPS:
        tracking.log(of_step(step), step=step)
    tracking.finish()


def test_the_console_shows_every_metric(place, capsys):
    log("console")
    printed = capsys.readouterr().out
    for step in STEPS:
        line = next(line for line in printed.splitlines() if line.startswith(f"step:{step} "))
        shown = dict(part.rsplit(":", 1) for part in line.split(" - ")[1:])
        # This logger prints three digits.
        assert {name: float(value) for name, value in shown.items()} == pytest.approx(of_step(step), abs=1e-3)


def test_the_file_holds_every_metric(place):
    log("file")
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "data": of_step(step)} for step in STEPS]


def test_tensorboard_holds_every_metric(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log("tensorboard")
    events = EventAccumulator(str(place / "tensorboard"))
    events.Reload()
    for name in of_step(1):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({step: of_step(step)[name] for step in STEPS})


def test_mlflow_holds_every_metric(place):
    import mlflow

    log("mlflow")
    (run,) = mlflow.search_runs(experiment_names=["project"], output_format="list")
    client = mlflow.MlflowClient()
    for name in of_step(1):
        history = client.get_metric_history(run.info.run_id, name)
        assert {m.step: m.value for m in history} == {step: of_step(step)[name] for step in STEPS}


def selection(num=40):
    rng = np.random.default_rng(0)
    score = rng.normal(size=num)
    score[0] = np.nan
    return {
        "problem_id": np.arange(num),
        "data_source": ["math"] * num,
        "score": score,
        "norm": np.ones(num),
        "dot_error": rng.uniform(size=num),
        "success_rate": rng.uniform(size=num),
        "kept": score > 0.5,
    }


def samples(step, num=40):
    return {
        "step": [step] * num,
        "problem_id": list(range(num)),
        "prompt": [f"<b>problem {i}</b> \u00e4\u4e2d" for i in range(num)],
        "answer": [str(i) for i in range(num)],
        "response": ["\x00no"] * num,
        "reward": [0.0] * num,
        "num_tokens": [3] * num,
    }


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory):
    """The folder of an offline run with metrics in every step and pages in the last."""
    import wandb

    folder = tmp_path_factory.mktemp("wandb_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        tracking = Tracking("project", "experiment", ["wandb"], config={"trainer": {}})
        pages = Pages(num_problems=3)
        composition = {"composition/data_source/math/pool": 1.0, "composition/data_source/math/kept": 1.0}
        for step in STEPS:
            pages.add(step, selection(), samples(step), composition)
            pages.add_lift(step, of_step(step))
            pages.add_lift(step + 2, {"gradalign/forecast/lift": 2.0})  # no interval yet
            if step == STEPS[-1]:
                pages.publish(wandb, step)
            tracking.log(of_step(step), step=step)
        tracking.finish()
        wandb.teardown()
    return folder


def test_wandb_holds_every_metric(wandb_run):
    rows = history(wandb_run)
    for step in STEPS:
        assert {name: rows[step][name] for name in of_step(step)} == of_step(step)


def test_wandb_gets_a_table_of_problems_in_the_same_step_as_the_metrics(wandb_run):
    assert history(wandb_run)[STEPS[-1]]["gradalign/problems/_type"] == "table-file"
    (path,) = wandb_run.glob("wandb/offline-run-*/files/media/table/gradalign/*.json")
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["columns"] == list(COLUMNS)
    rows = [dict(zip(COLUMNS, values, strict=True)) for values in table["data"]]
    assert [r["kind"] for r in rows] == ["top"] * 3 + ["bottom"] * 3 + ["uncertain"] * 3
    known, errors = selection()["score"][1:], selection()["dot_error"][1:]
    assert rows[0]["score"] == pytest.approx(known.max()) and rows[3]["score"] == pytest.approx(known.min())
    assert rows[6]["error"] == pytest.approx(errors.max())
    assert rows[0]["prompt"].startswith("<b>problem ") and rows[0]["prompt"].endswith("\u4e2d")


@pytest.mark.parametrize("name", ["score_against_success", "composition", "lift"])
def test_wandb_gets_figures_in_the_same_step_as_the_metrics(wandb_run, name):
    assert history(wandb_run)[STEPS[-1]][f"gradalign/figures/{name}/format"] == "png"
    (picture,) = wandb_run.glob(f"wandb/offline-run-*/files/media/images/gradalign/figures/{name}_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5_000


def test_pages_begin_anew_after_they_were_published():
    published = []

    class Wandb:
        Table = staticmethod(lambda columns, data: data)
        Image = staticmethod(lambda picture: picture.size)
        log = staticmethod(lambda pages, step: published.append((step, pages)))

    pages = Pages(num_problems=5)
    pages.add(1, selection(), samples(1), {})
    pages.publish(Wandb, 1)
    pages.add(2, selection(), samples(2), {})
    pages.publish(Wandb, 2)
    pages.publish(Wandb, 3)
    assert [step for step, _ in published] == [1, 2]
    steps = {row[COLUMNS.index("step")] for row in published[1][1]["gradalign/problems"]}
    assert steps == {2}
