# SPDX-License-Identifier: Apache-2.0
"""Prepared folders: splits that never meet, exact counts, equal files for equal arguments, and all or nothing."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.data.prepare import PreparationPlan, prepare
from verl_gradalign.data.rewards import compute_score
from verl_gradalign.data.schema import PREPARED_SCHEMA
from verl_gradalign.data.sources import SOURCES
from verl_gradalign.data.splits import SPLITS, Pool, SourceProblem, choose_problems, parse_request

GSM8K_FOLDER = Path(__file__).parents[2].parent / "shared/data/gsm8k"


@pytest.fixture
def folder(tmp_path):
    """Files of four sources whose problems do not overlap."""
    sizes = {"gsm8k/train": 40, "gsm8k/test": 10, "dapo": 60, "webinstruct": 30, "amc22": 5, "amc23": 6}
    for name, num in sizes.items():
        column, after = ("question", "#### ") if name.startswith("gsm8k") else ("question", "")
        column = {"dapo": "prompt"}.get(name, column)
        write_jsonl(tmp_path / f"{name}.jsonl", [{column: f"{name} {n}?", "answer": f"{after}{n}"} for n in range(num)])
    return tmp_path


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def origins(folder):
    files = {name: str(folder / f"{name}.jsonl") for name in ("dapo", "webinstruct", "amc22", "amc23")}
    return files | {"gsm8k": str(folder / "gsm8k")}


def plan_for(folder, **changes):
    settings = {
        "train": ("dapo:20", "webinstruct:10", "countdown:15"),
        "trusted": ("countdown:4", "amc22"),
        "test": ("countdown:6", "amc23"),
        "origins": origins(folder),
    }
    return PreparationPlan(**(settings | changes))


def read_rows(output):
    return {split: pq.read_table(output / f"{split}.parquet").to_pylist() for split in SPLITS}


def questions(rows):
    return [row["prompt"][0]["content"] for row in rows]


def test_counts_schema_and_indices_are_as_asked(folder):
    manifest = prepare(plan_for(folder, corrupted_share=0.4), folder / "out")
    rows = read_rows(folder / "out")
    families = {split: Counter(row["extra_info"]["family"] for row in of_split) for split, of_split in rows.items()}
    assert families == {
        "train": {"dapo": 20, "webinstruct": 10, "countdown": 15},
        "trusted": {"countdown": 4, "amc22": 5},
        "test": {"countdown": 6, "amc23": 6},
    }
    for split, of_split in rows.items():
        assert pq.read_schema(folder / f"out/{split}.parquet").equals(PREPARED_SCHEMA)
        assert [row["extra_info"]["index"] for row in of_split] == list(range(len(of_split)))
        assert {row["extra_info"]["split"] for row in of_split} == {split}
        assert manifest["splits"][split]["by_source"] == families[split]
        assert sum(row["extra_info"]["corrupted"] for row in of_split) == (18 if split == "train" else 0)
    assert manifest["splits"]["train"]["corrupted"] == 18
    assert {row["data_source"] for row in rows["test"]} == {"countdown", "amc23"}
    place = rows["trusted"][-1]["extra_info"]["source"]
    assert place == f"{folder}/amc22.jsonl, line 5"


def test_no_problem_is_in_two_splits_and_train_is_mixed(folder):
    plan = plan_for(folder, train=("gsm8k", "countdown:30"), trusted=("gsm8k:7",), test=("gsm8k", "gsm8k@train:3"))
    manifest = prepare(plan, folder / "out")
    asked = [question for of_split in read_rows(folder / "out").values() for question in questions(of_split)]
    assert len(asked) == len(set(asked)) == 40 + 10 + 30
    assert manifest["splits"]["train"]["held_out_for_another_split"] == {"gsm8k": 10}
    families = [row["extra_info"]["family"] for row in read_rows(folder / "out")["train"]]
    assert set(families[:30]) == set(families[-30:]) == {"gsm8k", "countdown"}


def test_equal_arguments_give_equal_files_and_the_manifest_proves_them(folder):
    first, again = (prepare(plan_for(folder), folder / name) for name in ("a", "b"))
    assert first == again == json.loads((folder / "a/manifest.json").read_text(encoding="utf-8"))
    for name, digest in first["sha256"].items():
        data = (folder / "a" / name).read_bytes()
        assert data == (folder / "b" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
    inputs = {path: digest for pool in first["sources"] for path, digest in pool["files"].items()}
    assert inputs[f"{folder}/dapo.jsonl"] == hashlib.sha256((folder / "dapo.jsonl").read_bytes()).hexdigest()
    assert set(first["versions"]) == {"verl_gradalign", "python", "pyarrow", "datasets"}
    other = prepare(plan_for(folder, seed=1), folder / "c")
    assert all(other["sha256"][name] != first["sha256"][name] for name in first["sha256"])


def test_trusted_and_test_problems_do_not_depend_on_the_train_problems(folder):
    small = plan_for(folder, trusted=("dapo:5", "countdown:4"), test=("countdown:6",))
    large = plan_for(folder, train=("dapo:50", "countdown:90"), trusted=small.trusted, test=small.test)
    prepare(small, folder / "small")
    prepare(large, folder / "large")
    for split in ("trusted", "test"):
        assert read_rows(folder / "small")[split] == read_rows(folder / "large")[split]


def test_first_rows_are_taken_in_the_order_of_the_file(folder):
    prepare(plan_for(folder, train=("webinstruct:first-12",)), folder / "out")
    asked = sorted(questions(read_rows(folder / "out")["train"]))
    assert asked == sorted(SOURCES["webinstruct"].prompt(f"webinstruct {n}?") for n in range(12))


def test_prepared_answers_are_rewarded(folder):
    prepare(plan_for(folder, train=("gsm8k", "dapo")), folder / "out")
    for row in read_rows(folder / "out")["train"]:
        truth = row["reward_model"]["ground_truth"]
        response = f"#### {truth}" if row["data_source"] == "openai/gsm8k" else f"\\boxed{{{truth}}}"
        assert compute_score(row["data_source"], response, truth, row["extra_info"])["score"] == 1.0


def test_duplicates_across_sources_of_one_split_are_removed_and_counted(folder):
    write_jsonl(folder / "dapo.jsonl", [{"prompt": f"webinstruct {n}?", "answer": "1"} for n in range(25, 50)])
    manifest = prepare(plan_for(folder, train=("webinstruct", "dapo:20")), folder / "out")
    assert manifest["splits"]["train"]["duplicates_removed"] == {"dapo": 5}
    assert manifest["splits"]["train"]["by_source"] == {"webinstruct": 30, "dapo": 20}


def test_data_that_overlap_between_sources_are_refused_or_dropped(folder):
    write_jsonl(folder / "amc22.jsonl", [{"problem": "new?", "answer": "1"}, {"problem": "DAPO  7 ?", "answer": "7"}])
    plan = plan_for(folder, train=("dapo:20",))
    with pytest.raises(ValueError, match=r"dapo.jsonl, line 8, .*--train dapo, is also .*amc22.jsonl, line 2.*trusted.*"
                                         r"--drop-overlap"):  # fmt: skip
        prepare(plan, folder / "out")
    assert not (folder / "out").exists()
    manifest = prepare(plan_for(folder, train=("dapo",), drop_overlap=True), folder / "out")
    assert manifest["splits"]["train"]["overlaps_removed"] == {"dapo": 1}
    assert manifest["splits"]["train"]["rows"] == 59


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ()}, "asks for no training problems"),
        ({"train": ("other:5",)}, "--train 'other:5' names no source; use one of gsm8k"),
        ({"train": ("dapo:x",)}, "is not NAME"),
        ({"train": ("dapo:0",)}, "asks for 0 problems"),
        ({"train": ("dapo:61",)}, "--train dapo:61 asks for 61 problems, .*60 rows .* 60 are left .*at most 60"),
        ({"train": ("dapo:5", "dapo:6")}, "--train names dapo twice"),
        ({"test": ("countdown",)}, "--test countdown is generated and needs a count; write countdown:500"),
        ({"test": ("dapo",)}, "--train dapo:20 asks for 20 problems, .* 0 are left .*60 in use elsewhere"),
        ({"train": ("dapo",), "test": ("dapo",)}, "--train dapo asks for all rows, .*leave the request out"),
        ({"corrupted_share": 1.5}, "corrupted_share=1.5 must lie within 0 and 1"),
        ({"origins": {"other": "x"}}, "--from other=... names no source"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be_met_are_refused_with_a_remedy(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(plan_for(folder, **changes), folder / "out")
    assert not any("out" in path.name for path in folder.iterdir())


def test_nothing_is_left_behind_when_writing_fails(folder, monkeypatch):
    calls = []

    def fail_at_the_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_table(*arguments, **options)

    write_table = pq.write_table
    monkeypatch.setattr(pq, "write_table", fail_at_the_second)
    before = set(folder.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        prepare(plan_for(folder), folder / "out")
    assert set(folder.rglob("*")) == before and len(calls) == 2


def test_an_output_that_is_there_is_not_touched(folder):
    (folder / "out").mkdir()
    prepare(plan_for(folder), folder / "out")  # an empty folder is as good as none
    before = (folder / "out/manifest.json").read_bytes()
    with pytest.raises(ValueError, match="out is there already; remove it or choose another --output"):
        prepare(plan_for(folder, seed=1), folder / "out")
    assert (folder / "out/manifest.json").read_bytes() == before


def test_an_origin_may_be_given_for_one_split(folder):
    here = {"gsm8k@train": str(folder / "gsm8k/train.jsonl"), "gsm8k@test": str(folder / "gsm8k/test.jsonl")}
    manifest = prepare(PreparationPlan(("gsm8k",), ("gsm8k:4",), ("gsm8k",), origins=here), folder / "out")
    assert {split: counts["rows"] for split, counts in manifest["splits"].items()} == {
        "train": 36,
        "trusted": 4,
        "test": 10,
    }


def pool_of(name, keys):
    problems = [SourceProblem(name, key, "1", key, f"{name}, row {n}") for n, key in enumerate(keys)]
    return Pool(SOURCES[name], "train", name, problems=problems, num_rows=len(problems))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=6, unique=True),
    st.lists(st.integers(0, 40), min_size=6, unique=True),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_whatever_the_overlap_splits_never_meet_and_all_of_train_is_used(dapo, web, num_trusted, num_test, seed):
    pools = {(name, "train"): pool_of(name, [f"q{k}" for k in keys]) for name, keys in (("dapo", dapo), ("amc22", web))}
    requests = {
        "test": [parse_request(f"amc22:{num_test}", "test")],
        "trusted": [parse_request(f"dapo:{num_trusted}", "trusted")],
    }
    used = choose_problems(requests, pools, seed, drop_overlap=True)
    held_out = {problem.key for split in ("test", "trusted") for problem in used[split].problems}
    left = {f"q{key}" for key in [*dapo, *web]} - held_out
    if not all({f"q{k}" for k in keys} - held_out for keys in (dapo, web)):
        return
    requests["train"] = [parse_request("dapo", "train")]
    chosen = choose_problems(requests, pools, seed, drop_overlap=True)
    train = {problem.key for problem in chosen["train"].problems}
    assert train == {f"q{key}" for key in dapo} & left
    assert len(chosen["trusted"].problems) == num_trusted and len(chosen["test"].problems) == num_test
    assert chosen["trusted"].problems == used["trusted"].problems


@pytest.mark.skipif(not GSM8K_FOLDER.is_dir(), reason=f"GSM8K's files are not at {GSM8K_FOLDER}")
def test_all_of_gsm8k_is_prepared(tmp_path):
    plan = PreparationPlan(("gsm8k",), ("gsm8k:64",), ("gsm8k",), origins={"gsm8k": str(GSM8K_FOLDER)})
    manifest = prepare(plan, tmp_path / "out")
    assert {split: counts["rows"] for split, counts in manifest["splits"].items()} == {
        "train": 7473 - 64,
        "trusted": 64,
        "test": 1319,
    }
    assert all(pool["duplicates_removed"] == 0 for pool in manifest["sources"])
    rows = [row for of_split in read_rows(tmp_path / "out").values() for row in of_split]
    assert all(row["reward_model"]["ground_truth"].lstrip("-").replace(".", "").isdigit() for row in rows)
