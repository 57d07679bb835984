# SPDX-License-Identifier: Apache-2.0
"""Trusted and audit sets out of parquet files of one's own: apart by problem, in proportion, with everything kept."""

import json
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from verl_gradalign.cli import app
from verl_gradalign.data.hold_out import HoldOutPlan, hold_out, share_out
from verl_gradalign.data.identity import problem_identity

SCHEMA = pa.schema(
    [
        ("data_source", pa.dictionary(pa.int32(), pa.string())),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([("index", pa.int16()), ("tags", pa.list_(pa.string()))])),
        ("note", pa.decimal128(6, 2)),
    ],
    metadata={"owner": "me"},
)
SIZES = {"algebra": 70, "geometry": 25, "logic": 4, "single": 1}


def problem(source, number, truth=None, image=None, **more):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"{source} {number}?"}],
        "images": None if image is None else [{"bytes": image, "path": None}],
        "reward_model": {"style": "rule", "ground_truth": str(number) if truth is None else truth},
        "extra_info": {"index": number, "tags": ["a", source]},
        "note": None,
    } | more


def pool():
    return [problem(source, number) for source, num in SIZES.items() for number in range(num)]


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return str(path)


def read(folder):
    return {path.stem: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")}


def identities(rows):
    return {problem_identity(row["prompt"], [row["images"]]) for row in rows}


def sources(rows):
    return Counter(row["data_source"] for row in rows)


def test_each_data_source_gives_its_share_and_rows_and_schema_are_kept(tmp_path):
    rows = pool()
    random.Random(0).shuffle(rows)
    manifest = hold_out(HoldOutPlan((write(tmp_path / "in.parquet", rows),), trusted=20, audit=10), tmp_path / "out")
    held = read(tmp_path / "out")
    assert sources(held["trusted"]) == {"algebra": 14, "geometry": 5, "logic": 1}
    assert sources(held["audit"]) == {"algebra": 7, "geometry": 2, "logic": 1}
    assert [row for row in rows if row in held["train"]] == held["train"] and len(held["train"]) == 70
    assert sorted(map(str, rows)) == sorted(map(str, held["train"] + held["trusted"] + held["audit"]))
    for split in held:
        schema = pq.read_schema(tmp_path / f"out/{split}.parquet")
        assert schema.equals(pq.read_schema(tmp_path / "in.parquet"), check_metadata=True)
        assert manifest["splits"][split]["by_source"] == sources(held[split])
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["sha256"]) == {"train.parquet", "trusted.parquet", "audit.parquet"}


def test_what_is_drawn_follows_from_the_seed_and_the_problems_and_trusted_not_from_audit(tmp_path):
    rows = pool()
    first = write(tmp_path / "first.parquet", rows)
    other = write(tmp_path / "other.parquet", rows[::-1])
    drawn = {}
    for name, plan in {
        "a": HoldOutPlan((first,), 20, 10),
        "again": HoldOutPlan((first,), 20, 10),
        "reversed": HoldOutPlan((other,), 20, 10),
        "no audit": HoldOutPlan((first,), 20),
        "seed": HoldOutPlan((first,), 20, 10, seed=1),
    }.items():
        hold_out(plan, tmp_path / name)
        drawn[name] = read(tmp_path / name)
    assert drawn["a"] == drawn["again"] and "audit" not in drawn["no audit"]
    assert drawn["a"]["trusted"] == drawn["no audit"]["trusted"] != drawn["seed"]["trusted"]
    assert identities(drawn["a"]["trusted"]) == identities(drawn["reversed"]["trusted"])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, b"x", b"y"])), min_size=8, max_size=60),
    st.integers(0, 3),
)
def test_no_problem_is_in_two_files_however_often_it_stands_in_the_pool(tmp_path_factory, drawn, seed):
    folder = tmp_path_factory.mktemp("pool")
    rows = [problem("s", number, image=image) for number, image in drawn]
    path = write(folder / "in.parquet", rows)
    if len(set(drawn)) < 4:
        with pytest.raises(ValueError, match="ask for at most"):
            hold_out(HoldOutPlan((path,), 2, 2, seed), folder / "out")
        return
    manifest = hold_out(HoldOutPlan((path,), 2, 1, seed), folder / "out")
    held = read(folder / "out")
    sets = [identities(of_split) for of_split in held.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(set(drawn))
    assert (len(held["trusted"]), len(held["audit"])) == (2, 1)
    num_rows = sum(map(len, held.values())) + manifest["copies_of_held_out_problems"]
    assert num_rows == len(rows)


def test_the_same_text_with_another_image_is_another_problem(tmp_path):
    rows = [problem("s", 0, image=bytes([n])) for n in range(10)]
    manifest = hold_out(HoldOutPlan((write(tmp_path / "in.parquet", rows),), 3), tmp_path / "out")
    assert manifest["distinct"] == 10 and len(read(tmp_path / "out")["train"]) == 7


def test_a_problem_whose_copies_differ_in_their_truth_is_not_trusted(tmp_path):
    rows = [problem("s", n % 4) for n in range(8)]
    rows[6]["reward_model"]["ground_truth"] = "another"
    manifest = hold_out(HoldOutPlan((write(tmp_path / "in.parquet", rows),), 3), tmp_path / "out")
    held = read(tmp_path / "out")
    assert manifest["problems_of_several_truths_left_in_train"] == 1
    assert [row["extra_info"]["index"] for row in held["train"]] == [2, 2]


def test_several_files_are_one_pool(tmp_path):
    rows = pool()
    paths = tuple(write(tmp_path / f"{n}.parquet", rows[n::2]) for n in range(2))
    hold_out(HoldOutPlan(paths, 20), tmp_path / "out")
    assert len(read(tmp_path / "out")["train"]) == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "in.parquet, row 101 has no prompt in its column 'prompt'; fill it in, or leave such rows"),
        ({"prompt": [{"role": "user", "content": None}]}, "row 101 has a prompt that is no list of messages"),
        ({"reward_model": None}, "row 101 has an empty reward_model.ground_truth"),
        ({"reward_model": {"style": "rule", "ground_truth": "  "}}, "row 101 has an empty reward_model.ground_truth"),
    ],
)
def test_a_row_without_prompt_or_truth_is_refused_by_its_place_or_left_out_and_counted(tmp_path, change, message):
    path = write(tmp_path / "in.parquet", [*pool(), problem("algebra", 99, **change)])
    with pytest.raises(ValueError, match=message):
        hold_out(HoldOutPlan((path,), 20), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = hold_out(HoldOutPlan((path,), 20, skip_bad_rows=True), tmp_path / "out")
    assert manifest["bad_rows_skipped"] == 1 and sum(map(len, read(tmp_path / "out").values())) == 100
    assert message.split(" in its")[0].split("in.parquet, ")[-1] in manifest["first_reasons"][0]


def test_held_out_rows_are_graded_by_the_reward_function_of_the_run(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    return float(solution_str == ground_truth and int(ground_truth) % 2 == 0)\n",
        encoding="utf-8",
    )
    path, reward = write(tmp_path / "in.parquet", pool()), f"{tmp_path}/mine.py"
    with pytest.raises(ValueError, match=r"in.parquet, row \d+ has the truth '\d*[13579]', which scores 0"):
        hold_out(HoldOutPlan((path,), 20, reward=reward), tmp_path / "out")
    manifest = hold_out(HoldOutPlan((path,), 20, reward=reward, skip_bad_rows=True), tmp_path / "out")
    held = read(tmp_path / "out")
    assert len(held["trusted"]) == 20 and all(row["extra_info"]["index"] % 2 == 0 for row in held["trusted"])
    assert manifest["ungraded_rows_skipped"] == 100 - 20 - len(held["train"]) > 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"trusted": 0}, "--trusted 0 must be at least 1"),
        ({"trusted": 97}, "--trusted 97 asks for more than the 96 problems .* ask for at most 96"),
        ({"trusted": 90, "audit": 7}, "--audit 7 asks for more than the 6 problems"),
        ({"prompt_key": "question"}, "has no column 'question' .*--prompt-key"),
        ({"files": ("none.parquet",)}, "none.parquet is not a readable parquet file"),
        ({"files": ()}, "names no parquet file"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(tmp_path, plan, message):
    path = write(tmp_path / "in.parquet", pool())
    with pytest.raises(ValueError, match=message):
        hold_out(HoldOutPlan(**({"files": (path,), "trusted": 5} | plan)), tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.parquet"}


def test_a_file_without_rows_and_files_of_other_columns_are_refused(tmp_path):
    path = write(tmp_path / "in.parquet", pool())
    with pytest.raises(ValueError, match="empty.parquet has no rows"):
        hold_out(HoldOutPlan((write(tmp_path / "empty.parquet", []),), 5), tmp_path / "out")
    pq.write_table(pq.read_table(path).drop_columns(["note"]), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="differ in their columns"):
        hold_out(HoldOutPlan((path, f"{tmp_path}/other.parquet"), 5), tmp_path / "out")


@given(st.dictionaries(st.text("abc", max_size=2), st.integers(1, 40), min_size=1, max_size=5), st.data())
def test_shares_add_up_and_nearly_are_in_proportion(sizes, data):
    num = data.draw(st.integers(0, sum(sizes.values())))
    shares = share_out(num, sizes, sizes)
    assert sum(shares.values()) == num and all(shares[name] <= sizes[name] for name in sizes)
    if num >= len(sizes):
        assert min(shares.values()) >= 1
    exact = {name: num * size / sum(sizes.values()) for name, size in sizes.items()}
    assert all(abs(shares[name] - exact[name]) <= len(sizes) for name in sizes)


def test_the_command_writes_the_files_and_prints_what_is_in_them(tmp_path):
    path = write(tmp_path / "in.parquet", [*pool(), *pool()])
    arguments = ["hold-out", path, "--trusted", "20", "--audit", "10", "--output", f"{tmp_path}/out"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {
        "train.parquet",
        "trusted.parquet",
        "audit.parquet",
        "manifest.json",
    }
    assert "geometry" in done.output and "copies_of_held_out_problems 30" in done.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "remove it or choose another --output" in again.output
