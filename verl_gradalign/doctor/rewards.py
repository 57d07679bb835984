# SPDX-License-Identifier: Apache-2.0
"""Rewards, tried as a run computes them: verl's own reward manager, called with answers to problems of every source.

    trial = RewardTrial(verl_config, tokenizer)
    report([grade(frame, positions, trial, threshold, findings)], trial, threshold, findings)
    trial.close()

Each source's own truth is given as the answer, in the forms in which models write one; then a wrong answer, and none.
What comes back is looked at as verl uses it. Nothing is sent to a model. A function of the user's runs in this process.
"""

import asyncio
import concurrent.futures
import contextlib
import copy
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from ray import cloudpickle
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager
from verl.trainer.ppo.v1.replay_buffer import FILTER_GROUPS_REWARD_METRIC

from verl_gradalign.doctor.files import Frame
from verl_gradalign.findings import Findings

AREA = "reward"
FUNCTION = "reward.custom_reward_function"
FORMS = ("{}", "\\boxed{{{}}}", "#### {}", "Answer: {}", "<answer>{}</answer>", "={}")
"""In which models write an answer; a row is graded as right if one of them is."""
WRONG = "I do not know"
RUNS_CODE = ("codecontests", "apps", "codeforces", "taco")
"""Data sources whose default reward runs programs; they are not tried."""
MAX_SOURCES, ROWS_OF_SOURCE = 40, 16
MAX_CALL_S, MAX_AREA_S = 20.0, 10.0
TIME = "time"
"""The kind of fault of a function that does not return."""
LOW_SHARE = 0.5
"""Of the rows whose own truth is graded as right, below which a grader is suspected."""
MAX_WRONG_SHARE = 0.1
RETURNS = "return a finite number, or a dictionary with one under 'score'"


class _DaemonThreads(concurrent.futures.ThreadPoolExecutor):
    """Threads that a function which never returns does not keep the program alive with."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            # A call that was given up in the meantime wants no result.
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as error:
                    # A function that ends the program ends no more than its own call.
                    future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

        threading.Thread(target=work, daemon=True).start()
        return future


class _TextTokenizer:
    """Stands in where no tokenizer is at hand: a token for each character."""

    eos_token_id, pad_token_id = 0, 0

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(int(i)) for i in ids if int(i))


class RewardTrial:
    """verl's reward manager in a thread with an event loop, as in its reward workers.

    Threads matter: what works in a program's main thread only, as signals do, fails here as it does there.
    """

    def __init__(self, verl_config: DictConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = verl_config, tokenizer or _TextTokenizer()
        self.forms = list(FORMS)
        """The one that was right last comes first."""
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_DaemonThreads())
        threading.Thread(target=self._run, daemon=True).start()
        if verl_config.reward.reward_manager.name == "remote":  # the same, each call in a process of Ray
            self._config = copy.deepcopy(verl_config)
            self._config.reward.reward_manager.name = "naive"
        self._manager = self._wait(self._build())
        known = self._manager.tokenizer
        if known.decode(known.encode("#### 1", add_special_tokens=False)) != "#### 1":
            self._manager.tokenizer = _TextTokenizer()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _build(self) -> Any:
        return load_reward_manager(self._config, self._tokenizer)

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=MAX_CALL_S)

    def close(self) -> None:
        """End the thread, and with it calls that have not returned."""

        def end() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_soon(self._loop.stop)

        self._loop.call_soon_threadsafe(end)

    @property
    def is_own(self) -> bool:
        return bool(OmegaConf.select(self._config, f"{FUNCTION}.path"))

    @property
    def filter_metric(self) -> str | None:
        """What algorithm.filter_groups looks up in the results; None if it needs nothing of them."""
        metric = OmegaConf.select(self._config, "algorithm.filter_groups.metric")
        is_on = OmegaConf.select(self._config, "algorithm.filter_groups.enable")
        return str(metric) if is_on and metric != FILTER_GROUPS_REWARD_METRIC else None

    def __call__(self, row: Mapping[str, Any], answer: str) -> dict[str, Any]:
        """Return what verl's manager returns for an answer to a row. Raises whatever the function raises."""
        result: dict[str, Any] = self._wait(self._manager.run_single(self._as_verl_gives_it(row, answer)))
        return result

    def _as_verl_gives_it(self, row: Mapping[str, Any], answer: str) -> DataProto:
        tokenizer = self._manager.tokenizer
        ids = list(tokenizer.encode(answer, add_special_tokens=False))
        ids = ids or [tokenizer.eos_token_id or 0]  # a rollout has one token at least
        tensors = {"prompts": torch.zeros(1, 1, dtype=torch.int64), "responses": torch.tensor([ids])}
        tensors["attention_mask"] = torch.ones(1, 1 + len(ids), dtype=torch.int64)
        # What the function changes is its own copy, as in a worker.
        values = copy.deepcopy(dict(row)) | {"extra_info": copy.deepcopy(row.get("extra_info") or {})}
        values["extra_info"] |= {"global_steps": 1}
        values |= {"__num_turns__": 2, "raw_prompt": values.get("prompt")}
        columns = {key: _one(value) for key, value in values.items()}
        return DataProto(batch=TensorDict(tensors, batch_size=1), non_tensor_batch=columns)


def _one(value: Any) -> np.ndarray:
    """Return an array that holds one thing, whatever it is."""
    array = np.empty(1, dtype=object)
    array[0] = value
    return array


@dataclass
class Graded:
    """What the answers to the rows of an area brought."""

    area: str
    num_sources: int = 0
    faults: dict[str, tuple[str, str, list[str]]] = field(default_factory=dict)
    """What is wrong, the remedy and the places, by the kind of fault."""
    num_results: int = 0
    not_finite: list[str] = field(default_factory=list)
    keys: Counter[tuple[str, ...]] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)
    """Data sources that verl has no reward function for."""
    num_rows: int = 0
    num_wrong: int = 0
    """Rows whose wrong answer was graded as right."""
    scores: set[float] = field(default_factory=set)
    of_source: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Rows whose truth could be tried, and those graded as right, by source."""

    def fault(self, kind: str, what: str, remedy: str, place: str) -> None:
        """Note a fault; of one kind the first is shown, as texts differ from row to row."""
        self.faults.setdefault(kind, (re.sub(r" at 0x[0-9a-f]+", "", what), remedy, []))[2].append(place)

    @property
    def truths(self) -> tuple[int, int]:
        """Rows whose truth could be tried, and those graded as right."""
        return sum(num for num, _ in self.of_source.values()), sum(right for _, right in self.of_source.values())


def grade(frame: Frame, positions: np.ndarray, trial: RewardTrial, threshold: float, findings: Findings) -> Graded:
    """Return what the rewards of an area's rows are; `report` makes findings of it."""
    by_source, until = _rows_by_source(frame, positions), time.monotonic() + MAX_AREA_S
    graded = Graded(frame.area, len(by_source))
    for source in list(by_source)[:MAX_SOURCES]:
        if not trial.is_own and source in RUNS_CODE:
            findings.add(AREA, "note", f"{frame.area}: data source {source} runs programs; its reward was not tried")
            continue
        _try_source(frame, source, by_source[source], trial, threshold, graded, until)
        if TIME in graded.faults:  # each further call might take as long
            break
    return graded


def _rows_by_source(frame: Frame, positions: np.ndarray) -> dict[str, list[int]]:
    """Return some positions of each data source, spread over the rows."""
    if "data_source" not in frame.columns:
        return {"(none)": _spread(positions)}
    column = frame.table.data.column("data_source").combine_chunks().dictionary_encode()
    names = [str(name) for name in column.dictionary.to_pylist()]
    code_of = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)[positions]
    codes = dict.fromkeys(code_of[np.sort(np.unique(code_of, return_index=True)[1])].tolist())
    return {names[code] if code >= 0 else "None": _spread(positions[code_of == code]) for code in codes}


def _spread(positions: np.ndarray) -> list[int]:
    places = np.unique(np.linspace(0, len(positions) - 1, min(ROWS_OF_SOURCE, len(positions))).astype(int))
    return [int(p) for p in positions[places]]


def _try_source(
    frame: Frame,
    source: str,
    positions: Sequence[int],
    trial: RewardTrial,
    threshold: float,
    seen: Graded,
    until: float,
) -> None:
    """Try rows of one source, until something is wrong with it or the time is over; one row at least."""
    for number, position in enumerate(positions):
        if number and time.monotonic() > until:
            return
        row = frame.row(position)
        truths = truths_of(row.get("reward_model"))
        place = f"{frame.place(position)} (data source {source!r})"
        right_form = None
        for form in list(trial.forms) if truths else ():
            is_right = False
            for truth in truths[:3]:
                score = _try(row, form.format(truth), "own truth", place, trial, seen)
                if score is None:
                    return
                is_right = is_right or score > threshold
            if is_right:
                right_form = form
                break
        if right_form is not None:
            trial.forms.sort(key=lambda form: form != right_form)  # most likely the next row's too
        if truths:
            num, num_right = seen.of_source.get(source, (0, 0))
            seen.of_source[source] = (num + 1, num_right + (right_form is not None))
        wrong = _try(row, (right_form or FORMS[1]).format(WRONG), "wrong answer", place, trial, seen)
        empty = None if wrong is None else _try(row, "", "empty answer", place, trial, seen)
        if wrong is None or empty is None:
            return
        seen.num_rows += 1
        seen.num_wrong += wrong > threshold


def truths_of(reward_model: Any) -> list[str]:
    """Return a row's truth as texts that could be an answer; none for a truth of parts that are not named so."""
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    if isinstance(truth, Mapping):
        truth = next((truth[key] for key in ("target", "answer", "ground_truth") if key in truth), None)
    values = truth if isinstance(truth, list | tuple | np.ndarray) else [truth]
    return [str(value) for value in values if isinstance(value, str | int | float) and str(value).strip()]


def _try(row: Mapping[str, Any], answer: str, kind: str, place: str, trial: RewardTrial, seen: Graded) -> float | None:
    """Return the score of an answer; None, with a fault, if verl could not use what comes back, or nothing does."""
    try:
        result = trial(row, answer)
    except concurrent.futures.TimeoutError:
        what = f"the reward of the {kind} takes more than {MAX_CALL_S:.0f} s, and a rollout waits for it"
        seen.fault(TIME, what, "make the reward function quicker, or give it a time limit of its own", place)
        return None
    except Exception as error:
        if not trial.is_own and isinstance(error, NotImplementedError):  # verl's way to say so
            seen.unknown.append(str(row.get("data_source")))
        elif isinstance(error, KeyError) and error.args == ("score",):
            seen.fault("key", "the reward function returns a dictionary without 'score'", RETURNS, place)
        else:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            remedy = "mend the reward function, or the ground truth of this source"
            seen.fault(type(error).__name__, f"the reward of the {kind} fails: {text}", remedy, place)
        return None
    if trouble := unusable(result):
        seen.fault("result", f"the reward function returns {trouble}", RETURNS, place)
        return None
    score = float(result["reward_score"])
    seen.num_results += 1
    seen.keys[tuple(sorted(map(str, result["reward_extra_info"])))] += 1
    if not math.isfinite(score):
        seen.not_finite.append(f"{place}: {score} for the {kind}")
    seen.scores.add(score)
    return score


def unusable(result: Mapping[str, Any]) -> str:
    """Return what verl cannot do with a result of its reward manager, "" if it can use it."""
    score = result["reward_score"]
    if score is None:
        return "nothing (None)"
    try:
        torch.zeros(1)[-1] = score  # what verl's agent loop does
        float(score)
    except Exception as error:
        return f"{score!r:.80} of type {type(score).__name__} ({' '.join(str(error).split())[:120]})"
    try:
        cloudpickle.dumps(dict(result))
    except Exception as error:
        return f"what cannot be sent to another process ({' '.join(str(error).split())[:120]})"
    for key, value in result["reward_extra_info"].items():
        if value is None or isinstance(value, str):
            continue
        try:
            float(np.mean([value]))  # what verl's validation does
        except Exception:
            return f"{value!r:.80} of type {type(value).__name__} under {key!r}, of which verl takes means"
    return ""


def report(areas: Sequence[Graded], trial: RewardTrial, threshold: float, findings: Findings) -> None:
    """Add findings on the rewards of all areas; what is wrong in several of them is said once."""
    _say_faults(areas, findings)
    _say_scores(areas, threshold, findings)
    known = {keys for graded in areas for keys in graded.keys}
    if len(known) > 1:
        first, second = (", ".join(keys) for keys in sorted(known)[:2])
        text = f"the reward function returns other keys for other answers ({first}; {second})"
        findings.add(AREA, "warning", text, "return the same keys always")
    if (metric := trial.filter_metric) and any(metric not in keys for keys in known):
        text = f"algorithm.filter_groups.metric={metric}: the reward function does not return it"
        remedy = f"set algorithm.filter_groups.metric={FILTER_GROUPS_REWARD_METRIC}"
        others = sorted({key for keys in known for key in keys})
        findings.add(AREA, "error", text, f"{remedy}, or to one of {', '.join(others)}" if others else remedy)


def _say_faults(areas: Sequence[Graded], findings: Findings) -> None:
    for kind in dict.fromkeys(kind for graded in areas for kind in graded.faults):
        having = [graded for graded in areas if kind in graded.faults]
        what, remedy, places = having[0].faults[kind]
        more = [f"{len(places) - 1} more data sources"] if len(places) > 1 else []
        more += [f"the {graded.area}" for graded in having[1:]]
        others = f" (so do {', '.join(more)})" if more else ""
        # One that asks a judge may be slow, and right.
        findings.add(AREA, "warning" if kind == TIME else "error", f"{places[0]}: {what}{others}", remedy)
    if unknown := list(dict.fromkeys(source for graded in areas for source in graded.unknown)):
        where = " and ".join(graded.area for graded in areas if graded.unknown)
        text = f"{where}: verl has no reward function for data source {', '.join(unknown[:10])}"
        findings.add(AREA, "error", text, f"name yours in {FUNCTION}.path and .name")
    for graded in [graded for graded in areas if graded.not_finite][:1]:
        num, of = (sum(counts) for counts in zip(*((len(g.not_finite), g.num_results) for g in areas), strict=True))
        text = f"{graded.not_finite[0]}; {num} of {of} rewards tried are not finite. Such groups are never kept"
        findings.add(AREA, "error" if num == of else "warning", text, "return 0.0 where a response cannot be graded")


def _say_scores(areas: Sequence[Graded], threshold: float, findings: Findings) -> None:
    """Say how often the own truth, and how often a wrong answer, scores above the threshold."""
    above = f"above gradalign.success_threshold={threshold:g}"
    usable = [graded for graded in areas if graded.num_rows and any(map(math.isfinite, graded.scores))]
    suspected = [
        (graded.area, source, num, num_right)
        for graded in usable
        for source, (num, num_right) in graded.of_source.items()
        if num_right < LOW_SHARE * num
    ]
    if suspected:
        shown = "; ".join(f"{area}, {source}: {right} of {num} rows" for area, source, num, right in suspected[:6])
        seen = sorted({score for graded in usable for score in graded.scores if math.isfinite(score)})
        scores = ", ".join(f"{score:g}" for score in seen[:5])
        forms = "as text, boxed, after ####, after Answer: and in <answer>"
        text = f"the own truth ({forms}) seldom scores {above}: {shown}. Scores seen: {scores}"
        remedy = "grade some right answers by hand: compare the form that your prompts ask for with what is read"
        findings.add(AREA, "warning", text, remedy)
    wrong = [graded for graded in usable if graded.num_wrong > MAX_WRONG_SHARE * graded.num_rows]
    if wrong:
        shown = ", ".join(f"{graded.num_wrong} of {graded.num_rows} rows of the {graded.area}" for graded in wrong)
        text = f"{WRONG!r} scores {above} in {shown}"
        findings.add(AREA, "warning", text, "see whether the reward tells right from wrong")
    for graded in usable:
        num, right = graded.truths
        share = f"the own truth scores {above} in {right} of {num} rows" if num else "the truths are no texts to try"
        known = f"{graded.num_sources - len(set(graded.unknown))} of {graded.num_sources} data sources"
        text = f"{graded.area}: {known} have a reward function that runs; {share}"
        findings.add(AREA, "ok", f"{text}, a wrong answer in {graded.num_wrong} of {graded.num_rows}")
