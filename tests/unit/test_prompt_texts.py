# SPDX-License-Identifier: Apache-2.0
"""Prompts are compared by their words, whatever the column's type and however rows were selected."""

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.integration.prompt_texts import normalised, prompt_texts

WORDS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)
TURNS = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": WORDS}), max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.lists(TURNS, min_size=1, max_size=6))
def test_a_prompt_is_the_words_of_all_its_messages(rows):
    if not any(rows):
        return  # a column without any message has no type
    table = datasets.Dataset.from_dict({"prompt": rows})
    expected = [normalised(" ".join(message["content"] for message in row)) for row in rows]
    assert list(prompt_texts(table, "prompt")) == expected


def test_case_width_and_white_space_do_not_count():
    assert normalised("  What is\n１２?") == normalised("what IS 12?")


def test_texts_and_messages_with_parts_are_read_too():
    assert list(prompt_texts(datasets.Dataset.from_dict({"q": ["One  two", "three"]}), "q")) == ["one two", "three"]
    parts = [[{"role": "user", "content": [{"type": "text", "text": "Find x"}]}]]
    (text,) = prompt_texts(datasets.Dataset.from_dict({"prompt": parts}), "prompt")
    assert "find x" in text


def test_selected_rows_are_those_that_are_read():
    table = datasets.Dataset.from_dict({"q": ["a", "b", "c"]}).select([2, 0])
    assert list(prompt_texts(table, "q")) == ["c", "a"]


def test_a_row_without_a_prompt_is_named():
    with pytest.raises(ValueError, match="row 2 has no q"):
        list(prompt_texts(datasets.Dataset.from_dict({"q": ["a", None, "c"]}), "q"))
