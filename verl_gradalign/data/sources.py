# SPDX-License-Identifier: Apache-2.0
"""The data sets that `prepare` knows: where each comes from, what its columns are, and which rule checks its answers.

A source turns a row of its data set into a question and its right answer. Every question is asked with the same
closing instruction within a rule, whatever wording its data set came with, so that answers arrive in one form.

    problem = SOURCES["math500"].read(row)
    SOURCES["math500"].prompt(problem.question), problem.truth
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from verl_gradalign.data.chats import HOLD_OUT_INSTEAD, Turn
from verl_gradalign.data.countdown import CountdownProblem
from verl_gradalign.data.math_answers import ANSWER_MARK, find_last_boxed
from verl_gradalign.data.rows import Row
from verl_gradalign.data.schema import make_row
from verl_gradalign.data.values import COMMAS, as_text, is_empty

# By rule. GSM8K's and the boxed one are verl's own wording, so that results compare with its examples.
INSTRUCTIONS = {
    "last_number": f'Let\'s think step by step and output the final answer after "{ANSWER_MARK}".',
    "math": "Let's think step by step and output the final answer within \\boxed{}.",
    "countdown": "Let's think step by step and output the final expression within \\boxed{}.",
}
# The form that they ask for.
ANSWER_FORMS = {"last_number": ANSWER_MARK + " {}", "math": "\\boxed{{{}}}", "countdown": "\\boxed{{{}}}"}
# What DAPO-Math-17k wraps around each problem. It asks for "Answer: ..." instead of a box.
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

TWO_NUMBERS = re.compile(r"\d[^\d]*[A-Za-z]{2}[^\d]*\d")
THOUSANDS = re.compile(r"[^\d,]*\d{1,3}(?:,\d{2})*(?:,\d{3})+(?:\.\d+)?[^\d,]*")  # 1,00,000 is Indian for 100,000
YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)")


# Columns of what a prompt shows besides text; `make_row` has no place for it.
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "decoded_image")


class ReadProblem(NamedTuple):
    """What a source reads from a row: what is asked, what its reward is computed with, and the turns before."""

    question: str
    truth: str
    context: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Source:
    """One data set.

    `train_split` is what training and trusted problems are drawn from, `test_split` what test problems are. A `year`
    keeps the rows of that year only, where a row tells its year (see `year_of`). Without `hub_id` it is generated.
    """

    name: str
    read_text: Callable[[Row], ReadProblem]
    hub_id: str | None
    data_source: str
    train_split: str = "train"
    test_split: str = "test"
    hub_config: str | None = None
    rule: str = "math"
    ability: str = "math"
    year: int | None = None

    def read(self, row: Row) -> ReadProblem:
        """Return the row's problem. Raises: ValueError with place and remedy for what cannot be asked or graded."""
        shown = [column for column in row.values if str(column).lower() in MEDIA and not is_empty(row.values[column])]
        if shown:
            why = f"{row.place} asks about what is in its column {shown[0]!r}, which prepared files have no place for"
            raise ValueError(f"{why}; {HOLD_OUT_INSTEAD}")
        return self.read_text(row)

    def prompt(self, question: str) -> str:
        """Return the question followed by the instruction that says where the answer is looked for."""
        return f"{question} {INSTRUCTIONS[self.rule]}"

    @property
    def answer_form(self) -> str:
        """How the prompt asks for the answer, to be formatted with it."""
        return ANSWER_FORMS[self.rule]

    def row(self, problem: ReadProblem, **extra_info: Any) -> dict[str, Any]:
        """Return one of its problems as a row of verl's schema."""
        prompt = self.prompt(problem.question)
        context = [turn._asdict() for turn in problem.context]
        truth = problem.truth
        return make_row(self.data_source, prompt, self.ability, truth, context, family=self.name, **extra_info)


def year_of(row: Row) -> int | None:
    """Return the year in the row's column `year`, else in its `url` (".../2022_AMC_12A_..."); None without either.

    A data set of one year may do without both: its rows are then all taken to be of it.
    Raises: ValueError naming the place if the column is there and holds no year.
    """
    if not row.has("year", "url"):
        return None
    value = row.text("year", "url")
    found = YEAR.search(value)
    if found is None:
        raise ValueError(f"{row.place} has no year in its year or url ({value!r}); fill in the year")
    return int(found.group())


def _read_gsm8k(row: Row) -> ReadProblem:
    question, solution = row.text("question"), row.text("answer")
    _, mark, tail = solution.rpartition(ANSWER_MARK)
    if not mark or not tail.strip():
        remedy = f'end the answer with "{ANSWER_MARK} <number>"'
        raise ValueError(f'{row.place} has no answer after "{ANSWER_MARK}"; {remedy}')
    truth = row.cleaned(tail.strip(), "answer")
    if TWO_NUMBERS.search(truth):
        raise ValueError(f"{row.place} has several numbers as its answer ({truth!r}); give the one that counts")
    if "," in truth:
        if not THOUSANDS.fullmatch(truth):
            why = f"{row.place} has the answer {truth!r}, where a comma separates no thousands"
            raise ValueError(f"{why}; write the number with a decimal point")
        row.repairs.add(COMMAS)
    return ReadProblem(question, truth.replace(",", ""))


def _read_math(row: Row) -> ReadProblem:
    """A problem with its answer, or with a solution that ends in a box (MATH has no column for the answer)."""
    question = row.text("problem", "question")
    if row.has("answer"):
        return ReadProblem(question, row.answer("answer"))
    truth = find_last_boxed(row.text("solution"))
    if truth is None:
        raise ValueError(f"{row.place} has no answer in \\boxed{{}} in its solution; add a column answer")
    return ReadProblem(question, row.cleaned(truth, "solution"))


def _read_dapo(row: Row) -> ReadProblem:
    """DAPO-Math-17k's chat with a ground truth, or its later editions with plain text and an answer."""
    *context, asked = row.turns("prompt")
    question = asked.content.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER).strip()
    if not question:
        raise ValueError(f"{row.place} has an empty 'prompt'; fill it in or remove the row")
    reward_model = row.inner("reward_model") if row.has("reward_model") else None
    truth = reward_model.answer("ground_truth") if reward_model else row.answer("answer", "solution")
    return ReadProblem(question, truth, tuple(context))


def _read_webinstruct(row: Row) -> ReadProblem:
    return ReadProblem(row.text("question"), row.answer("answer"))


def _read_choice(row: Row) -> ReadProblem:
    options = row.value("options")
    if not isinstance(options, Sequence) or isinstance(options, str) or not 1 < len(options) <= 26:
        raise ValueError(f"{row.place} has no list of 2 to 26 options; give MMLU-Pro's own files")
    by_letter = {chr(ord("A") + n): row.choice(option, "options") for n, option in enumerate(options)}
    truth = row.text("answer")
    if truth not in by_letter:
        raise ValueError(f"{row.place} has answer {truth!r}, which is not the letter of an option; mend the row")
    listed = "\n".join(f"{letter}. {option}" for letter, option in by_letter.items())
    question = f"{row.text('question')}\n{listed}\nAnswer with the letter of the right option."
    return ReadProblem(question, truth)


def _read_countdown(row: Row) -> ReadProblem:
    numbers = row.value("nums", "numbers")
    try:
        numbers = json.loads(numbers) if isinstance(numbers, str) else numbers
        problem = CountdownProblem(tuple(sorted(int(as_text(n, "nums")[0]) for n in numbers)), int(row.text("target")))
    except (TypeError, ValueError) as error:
        why = f"{row.place} is not a Countdown problem ({error}); give a list of whole numbers and a target"
        raise ValueError(why) from error
    return ReadProblem(problem.question, problem.truth)


GSM8K = "openai/gsm8k"
MATH = "DigitalLearningGmbH/MATH-lighteval"
MATH500 = "HuggingFaceH4/MATH-500"
DAPO = "BytedTsinghua-SIA/DAPO-Math-17k"
WEB = "TIGER-Lab/WebInstruct-verified"
AMC = "AI-MO/aimo-validation-amc"  # AMC 12 of 2022 and 2023, distinguished by url
MMLU = "TIGER-Lab/MMLU-Pro"
GENERATED = ("generated", "generated")  # what a request without @SPLIT draws from, for train and for test

SOURCES = {
    source.name: source
    for source in (
        Source("gsm8k", _read_gsm8k, GSM8K, GSM8K, hub_config="main", rule="last_number"),
        Source("math", _read_math, MATH, MATH),
        Source("math500", _read_math, MATH500, MATH500, train_split="test"),
        Source("dapo", _read_dapo, DAPO, "math_dapo", test_split="train"),
        Source("webinstruct", _read_webinstruct, WEB, WEB, ability="general"),
        Source("amc22", _read_math, AMC, "amc22", test_split="train", year=2022),
        Source("amc23", _read_math, AMC, "amc23", test_split="train", year=2023),
        Source("aime24", _read_math, "HuggingFaceH4/aime_2024", "aime24", test_split="train", year=2024),
        Source("aime25", _read_math, "math-ai/aime25", "aime25", train_split="test", year=2025),
        Source("mmlu_pro", _read_choice, MMLU, MMLU, train_split="test", ability="general"),
        Source("countdown", _read_countdown, None, "countdown", *GENERATED, rule="countdown", ability="countdown"),
    )
}
