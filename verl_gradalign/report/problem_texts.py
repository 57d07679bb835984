# SPDX-License-Identifier: Apache-2.0
"""Prompts, answers and responses of a few problems: from the log's samples, else from the train files.

texts = problem_texts(reader, about, problem_ids)
texts[17].prompt, texts[17].responses[0].text
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from verl_gradalign.report.reader import LogReader
from verl_gradalign.report.run import key_of
from verl_gradalign.report.tallies import texts_of

MAX_RESPONSES = 4
BATCH_ROWS = 2048


class Response(NamedTuple):
    """A sampled response."""

    step: int
    text: str
    reward: float
    num_tokens: int | None


@dataclass
class ProblemText:
    """What is known of a problem's text. None: not known."""

    prompt: str | None = None
    answer: str | None = None
    origin: str | None = None
    """The train file that prompt and answer were read from; None: the log."""
    responses: list[Response] = field(default_factory=list)


def problem_texts(reader: LogReader, about: Mapping[str, Any], problem_ids: Sequence[int]) -> dict[int, ProblemText]:
    """Return the texts of the problems, with each the best and the worst response of its last two sampled steps."""
    texts = {int(problem_id): ProblemText() for problem_id in problem_ids}
    if not texts:
        return texts
    for rows in reader.batches("samples", having=pa.array(sorted(texts), pa.int64())):
        known = rows.select(["step", "problem_id", "reward", "num_tokens"]).to_pylist()
        columns = (texts_of(rows[name]) for name in ("prompt", "answer", "response"))
        for row, prompt, answer, response in zip(known, *columns, strict=True):
            text = texts[row["problem_id"]]
            text.prompt = text.prompt if prompt is None else prompt  # the newest that is known
            text.answer = text.answer if answer is None else answer
            if response is not None:
                reward = float("nan") if row["reward"] is None else row["reward"]
                text.responses.append(Response(row["step"], response, reward, row["num_tokens"]))
            if len(text.responses) > 8 * MAX_RESPONSES:
                text.responses = _newest_extremes(text.responses)
    for text in texts.values():
        text.responses = _newest_extremes(text.responses)
    unknown = {problem_id for problem_id, text in texts.items() if text.prompt is None}
    for problem_id, prompt, answer, origin in _rows_of_train_files(about, unknown):
        texts[problem_id].prompt, texts[problem_id].answer, texts[problem_id].origin = prompt, answer, origin
    return texts


def _newest_extremes(responses: Sequence[Response]) -> list[Response]:
    """Return the best and the worst response of the two newest steps."""
    chosen: list[Response] = []
    for step in sorted({response.step for response in responses}, reverse=True)[:2]:
        mine = sorted((r for r in responses if r.step == step), key=lambda r: -r.reward)
        chosen += [mine[0], mine[-1]] if len(mine) > 1 else mine
    return chosen


def _rows_of_train_files(about: Mapping[str, Any], wanted: set[int]) -> Iterator[tuple[int, str, str, str]]:
    """Yield (problem_id, prompt, answer, file) of the problems that the train files, as they are now, still have."""
    files = key_of(about, "config.data.train_files", []) if wanted else []
    prompt_key = key_of(about, "config.data.prompt_key", "prompt")
    ids = count()
    try:
        for name in [files] if isinstance(files, str) else list(files):
            path = Path(str(name)).expanduser()
            for row, problem_id in zip(_rows_of(path, prompt_key), ids, strict=False):
                if problem_id in wanted:
                    read = json.loads(row) if isinstance(row, str) else row.to_pylist()[0]
                    yield problem_id, *_texts_of_row(read, prompt_key), str(path)
    except (OSError, ValueError, pa.ArrowException):
        return  # without its number of rows, those of later files have unknown ids


def _rows_of(path: Path, prompt_key: str) -> Iterator[str | pa.RecordBatch]:
    """Yield every row of a file, not yet read: a line of JSON, or a batch of one row."""
    if path.suffix != ".parquet":
        with path.open(encoding="utf-8", errors="replace") as lines:
            yield from lines
        return
    file = pq.ParquetFile(path)
    columns = [name for name in (prompt_key, "reward_model") if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
        yield from (batch.slice(row, 1) for row in range(len(batch)))


def _texts_of_row(row: Mapping[str, Any], prompt_key: str) -> tuple[str, str]:
    prompt = row.get(prompt_key)
    if isinstance(prompt, list):
        prompt = "\n\n".join(str(m.get("content")) if isinstance(m, Mapping) else str(m) for m in prompt)
    answer = row.get("reward_model")
    return str(prompt), str(answer.get("ground_truth", "") if isinstance(answer, Mapping) else "")
