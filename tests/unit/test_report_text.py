# SPDX-License-Identifier: Apache-2.0
"""Text from outside is shown as text: in the page, in figures, whatever it holds."""

import html
import re

import numpy as np
import pytest

from verl_gradalign.log.figures import composition_over_time, curves, interval_over_time, score_against_success, thinned
from verl_gradalign.report.pictures import picture
from verl_gradalign.report.visible_text import short, shown, visible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("a\x00b\x1bc\x7f", "a\u2400b\u241bc\u2421"),
        ("one\r\ntwo\rthree", "one\ntwo\u240dthree"),
        ("\x85\x9b", "[U+0085][U+009B]"),
        ("left \u202egnirts\u202c", "left [U+202E]gnirts[U+202C]"),
        ("\u2066x\u2069\u200f\u061c", "[U+2066]x[U+2069][U+200F][U+061C]"),
        ("pass\u200bword\ufeff", "pass[U+200B]word[U+FEFF]"),
        ("\U000e0041", "[U+E0041]"),
        ("\ud800\udfff\uffff", "\ufffd\ufffd\ufffd"),
        ("Z" + "\u0301" * 500, "Z" + "\u0301" * 3),
        (
            "\u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \U0001f600",
            "\u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \U0001f600",
        ),
    ],
)
def test_what_cannot_be_seen_is_shown_as_a_sign(text, expected):
    assert visible(text) == expected
    visible(text).encode("utf-8")


def test_no_character_of_unicode_is_left_that_could_not_be_written():
    everything = "".join(map(chr, range(0x110000)))
    seen = visible(everything)
    seen.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", seen)


def test_a_long_text_is_cut_and_says_so():
    text = shown("x" * 1_000_000, 3000)
    assert (text.is_cut, text.num_shown, text.length, len(text.text)) == (True, 3000, 1_000_000, 3000)
    signs = shown("\u202e" * 1000, 3000)
    assert signs.is_cut and signs.num_shown == 375 and signs.text == "[U+202E]" * 375
    whole = shown("\u202e", 3000)
    assert not whole.is_cut and whole.text == "[U+202E]"


def test_a_name_stays_on_its_line():
    assert short("a\nb\tc") == "a b c"
    assert short("n" * 500).endswith("...") and len(short("n" * 500)) == 80


HOSTILE = ["$\\frac{1}{0}$", "_hidden", "<script>alert(1)</script>", "100% & \u202e", "\u4f60\u597d", "x" * 300, "$"]


def svg_of(figure):
    import base64

    return base64.b64decode(picture(figure, "", "").src.split(",", 1)[1]).decode("utf-8")


def test_names_in_figures_are_neither_mathematics_nor_markup():
    steps = np.arange(1, 11)
    share = np.full(10, 1 / len(HOSTILE))
    for figure in (
        curves("t $x_1$", "u $y$", {name: (steps, share) for name in HOSTILE}),
        composition_over_time(steps, {name: (share, share) for name in HOSTILE}, "$c$"),
    ):
        text = html.unescape(svg_of(figure))
        for name in ("$\\frac{1}{0}$", "_hidden", "\u4f60\u597d", "100% &"):
            assert name in text
        assert "<script>" not in svg_of(figure)
    assert "$s$" in svg_of(score_against_success(share, share, share > 1, "$s$"))


@pytest.mark.parametrize("size", [0, 1, 2, 5, 30_000])
def test_figures_are_drawn_of_nothing_and_of_much_and_stay_small(size):
    random = np.random.default_rng(0)
    values = random.random(size)
    values[: size // 3] = np.nan
    steps = np.arange(size)
    figures = [
        score_against_success(random.random(size), values, values > 0.5),
        composition_over_time(steps, {"a": (values, values), "b": (1 - values, 1 - values)}),
        composition_over_time(steps, {}),
        interval_over_time("title", "times", steps, values + 1, values, values + 2, 1.0),
        curves("title", "share", {"a": (steps, values), "b": (steps, values)}),
        curves("title", "correlation", {"a": (steps, values)}),
        curves("title", "share", {}),
    ]
    for figure in figures:
        assert len(svg_of(figure)) < 250_000


def test_equal_figures_give_equal_files():
    steps = np.arange(50)
    first, second = (svg_of(curves("t", "u", {"a": (steps, steps)})) for _ in range(2))
    assert first == second


def test_thinned_curves_keep_their_mean_and_ends():
    steps, values = np.arange(10_001.0), np.sin(np.arange(10_001.0) / 500)
    x, y = thinned(steps, values, 400)
    assert len(x) == 400 and abs(y.mean() - values.mean()) < 1e-3
    assert x[0] < 25 and x[-1] > 9_975
