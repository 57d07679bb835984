# SPDX-License-Identifier: Apache-2.0
"""GSM8K's own JSON lines as a parquet file verl trains on, every row in its place.

It reads local files and downloads nothing. For trusted sets, mixtures and a manifest, use `verl-gradalign prepare`.
Answers are checked by `verl_gradalign.data.rewards.compute_score`.

    write_gsm8k("gsm8k/train.jsonl", "data/gsm8k/train.parquet", split="train")
    write_gsm8k("gsm8k/test.jsonl", "data/gsm8k/test.parquet", split="test", max_rows=256)
"""

from itertools import islice
from pathlib import Path

from verl_gradalign.data.rows import read_file
from verl_gradalign.data.sources import INSTRUCTIONS, SOURCES
from verl_gradalign.data.tasks import make_row, write_rows

__all__ = ["INSTRUCTION", "write_gsm8k"]

INSTRUCTION = INSTRUCTIONS["last_number"]


def write_gsm8k(jsonl_path: str | Path, output_path: str | Path, split: str, max_rows: int | None = None) -> Path:
    """Write GSM8K's lines {"question": ..., "answer": ...} as rows of verl's schema, and return the parquet's path.

    The prompt is the question followed by INSTRUCTION; the ground truth is what follows "####", commas removed.
    `max_rows` keeps the first lines only; blank lines are passed over.

    Raises: ValueError naming file and line if a line is not such an object or its answer lacks "####", if no line is
        left, or if max_rows is below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1; leave it out to keep every row")
    source = SOURCES["gsm8k"]
    rows = []
    for index, row in enumerate(islice(read_file(Path(jsonl_path)), max_rows)):
        question, truth = source.read(row)
        prompt = source.prompt(question)
        rows.append(make_row(source.data_source, prompt, source.ability, truth, index, split, source.name, False))
    if not rows:
        raise ValueError(f"{jsonl_path} holds no problems; download GSM8K's {split}.jsonl again")
    return write_rows(rows, Path(output_path))
