# SPDX-License-Identifier: Apache-2.0
"""GSM8K's own JSON lines as a parquet file verl trains on, in the same schema as the tasks.

It reads local files and downloads nothing. Answers are checked by `verl_gradalign.data.rewards.compute_score`.

    write_gsm8k("gsm8k/train.jsonl", "data/gsm8k/train.parquet", split="train")
    write_gsm8k("gsm8k/test.jsonl", "data/gsm8k/test.parquet", split="test", max_rows=256)
"""

import json
from pathlib import Path
from typing import Any

from verl_gradalign.data.rewards import ANSWER_MARK, GSM8K_DATA_SOURCE
from verl_gradalign.data.tasks import make_row, write_rows

__all__ = ["INSTRUCTION", "write_gsm8k"]

# verl's own wording, so that results compare with its examples.
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'


def write_gsm8k(jsonl_path: str | Path, output_path: str | Path, split: str, max_rows: int | None = None) -> Path:
    """Write GSM8K's lines {"question": ..., "answer": ...} as rows of verl's schema, and return the parquet's path.

    The prompt is the question followed by INSTRUCTION; the ground truth is what follows "####", commas removed.
    `max_rows` keeps the first lines only; blank lines are passed over.

    Raises: ValueError naming file and line if a line is not such an object or its answer lacks "####", if no line is
        left, or if max_rows is below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1; leave it out to keep every row")
    rows: list[dict[str, Any]] = []
    with Path(jsonl_path).open(encoding="utf-8") as lines:
        for line_number, line in enumerate(lines, start=1):
            if max_rows is not None and len(rows) == max_rows:
                break
            if not line.strip():
                continue
            question, answer = _parse_line(line, f"{jsonl_path}, line {line_number}")
            prompt = f"{question} {INSTRUCTION}"
            rows.append(make_row(GSM8K_DATA_SOURCE, prompt, "math", answer, len(rows), split, "gsm8k", False))
    if not rows:
        raise ValueError(f"{jsonl_path} holds no problems; download GSM8K's {split}.jsonl again")
    return write_rows(rows, Path(output_path))


def _parse_line(line: str, place: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}); mend the line or download the file again") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("question", "answer")):
        raise ValueError(f'{place} lacks a text "question" or "answer"; give GSM8K\'s own JSON lines')
    _, mark, tail = record["answer"].rpartition(ANSWER_MARK)
    answer = tail.strip().replace(",", "")
    if not mark or not answer:
        raise ValueError(f'{place} has no answer after "{ANSWER_MARK}"; end the answer with "{ANSWER_MARK} <number>"')
    return record["question"], answer
