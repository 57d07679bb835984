# SPDX-License-Identifier: Apache-2.0
r"""One spelling for each answer: Unicode and LaTeX that say the same are written the same.

Nothing here computes. What changes a value (a sign, a subscript, a repeating decimal, a unit) is kept; what only
changes the look (sizes, fonts, spaces, delimiters) is not. Words stay marked as `\text{...}`, so that a unit is not
read as a product of letters.

    spell("5\u221a7\u00b0")  # "5\\sqrt{7}\\degree"
    flatten(r"\textbf{(B)}")  # "(B)"
"""

import re
import unicodedata
from itertools import groupby

MAX_PASSES = 12
"""Of unwrapping: deeper nesting than this is left as it is, and equal to nothing but itself."""

# Minus signs that Unicode does not call dashes; every dash (category Pd) is one too.
MINUS_SIGNS = "\u2212\u2796\u02d7\u00ad"
# Between two digits a long dash may be a minus or a range, so it is neither.
RANGE_DASH = re.compile("(?<=[0-9])\\s?[\u2013\u2014\u2015]\\s?(?=[0-9])")
CHARACTERS = {
    **dict.fromkeys("\u00d7\u22c5\u00b7\u2219\u2217\u2715\u2a2f\u2022", "*"),
    **dict.fromkeys("\u00f7\u2044\u2215", "/"),
    **dict.fromkeys("\u00b0\u00ba\u02da", r"\degree "),
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u2264": r"\le ",
    "\u2a7d": r"\le ",
    "\u2265": r"\ge ",
    "\u2a7e": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u221e": r"\infty ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2216": r"\setminus ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u2300": r"\emptyset ",
    "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}",
    "\u2115": r"\mathbb{N}",
    "\u211a": r"\mathbb{Q}",
    "\u2102": r"\mathbb{C}",
    "\u221a": r"\sqrt ",
    "\u221b": r"\sqrt[3]",
    "\u221c": r"\sqrt[4]",
    "\u2220": r"\angle ",
    "\u230a": r"\lfloor ",
    "\u230b": r"\rfloor ",
    "\u2308": r"\lceil ",
    "\u2309": r"\rceil ",
    "\u2795": "+",
    "\u2026": r"\ldots ",
    "\u22ef": r"\ldots ",
    "\u2032": "'",
    "\u2019": "'",
    **dict.fromkeys("\u201c\u201d", '"'),
}
# A line or a dot over digits, as combining characters, repeats them.
OVERLINED = re.compile("(?:\\d[\u0304\u0305])+")
DOTTED = re.compile("(\\d)\u0307")
UNICODE_ROOT = re.compile("([\u221a\u221b\u221c])\\s*(\\d+(?:\\.\\d+)?|[a-zA-Z])")

# Commands that only change the look.
LOOKS = re.compile(
    r"\\(?:(?:left|right)(?![a-zA-Z])\s*\.?|(?:middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|"
    r"ensuremath|mathstrut|strut|centering|large|Large|huge|bf|rm|it|tt|sf)(?![a-zA-Z])|"
    r"(?:[hv]space|[hv]?phantom|color)\*?\s*\{[^{}]*\})"
)
SPACES = re.compile(r"\\(?:[,;:> ]|q?quad(?![a-zA-Z])|(?:thin|med|thick|en)space(?![a-zA-Z]))|~")
# Pieces with one meaning and one spelling here; each is tried in this order.
SAME = [
    (r"\\!", ""),
    (r"\\[()\[\]]|(?<!\\)\$", " "),  # delimiters of formulas
    (r"\\(?:d|t|c|x)frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:dbinom|tbinom)(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq(?![a-zA-Z])|\\not\s*=|!=", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:cdot|times|ast)(?![a-zA-Z])", "*"),
    (r"\\div(?![a-zA-Z])", "/"),
    (r"\*\*", "^"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),
    (r"\\(?:l|c|)dots[a-z]?(?![a-zA-Z])|\.\.\.", r"\\ldots "),
    (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\lbrack(?![a-zA-Z])", "["),
    (r"\\rbrack(?![a-zA-Z])", "]"),
    (r"\\[lr]?vert(?![a-zA-Z])|\\mid(?![a-zA-Z])", "|"),
    (r"\\colon(?![a-zA-Z])", ":"),
    (r"\\(?:backslash|smallsetminus)(?![a-zA-Z])", r"\\setminus "),
    (r"\\(?:varepsilon)(?![a-zA-Z])", r"\\epsilon "),
    (r"\\varphi(?![a-zA-Z])", r"\\phi "),
    (
        r"\\(?:textdegree|degrees)(?![a-zA-Z])|\^\s*(?:\\(?:circ|degree)(?![a-zA-Z])|\{\s*\\(?:circ|degree)\s*\})",
        r"\\degree ",
    ),
    (r"(?<=\d)\s*\\circ(?![a-zA-Z])", r"\\degree "),
    (r"(?<=\d)\^(?:o|\{o\})(?![a-zA-Z])", r"\\degree "),
    (r"\\ang\s*\{([^{}]*)\}", r"\1\\degree "),
    (r"\\num\s*\{([^{}]*)\}", r"\1"),
    (r"\\%|(?<=\d)\s*(?:percent|per cent|pct)(?![a-zA-Z])", "%"),
    (r"\\text\{\s*(?:percent|per cent)\s*\}", "%"),
    (r"(?<=[a-z])\.(?=\s)", ""),  # of abbreviations: sq. ft
    (r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3}(?!\d))", ""),  # thousands
    (r"(?<!\\frac)(?<!\\binom)(?<!\})\{\s*\}", ""),
]
SAME_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in SAME]
LINES = re.compile(r"\\begin")
NEW_LINE = r"\newline "
OLD_FONT = re.compile(r"\{\s*\\(?:rm|bf|it|tt|sf)\s+([^{}\\]*)\}")
COLOURED = re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}\s*(?=\{)")
SI_QUANTITY = re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
WRAPPER = re.compile(
    r"\\(?P<font>text|textbf|textit|textrm|textnormal|textsf|texttt|textup|emph|mbox|hbox|underline|boxed|fbox|"
    r"mathrm|mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|bm|operatorname\*?)\s*\{(?P<inside>[^{}]*)\}"
)
LETTER_FONTS = {"mathbf", "mathit", "mathsf", "mathtt", "mathnormal", "boldsymbol", "bm", "underline"}
WORD_INSIDE = re.compile(r"[A-Za-z][A-Za-z .,'/\-]*")
QUOTED = re.compile(r"(?P<quote>[\"'`])(?P<inside>[^\"'`]*)(?P=quote)")
MARKED_WORD = re.compile(r"\\text\{([^{}]*)\}")
SEPARATOR = re.compile(r"(?:and|or)", re.IGNORECASE)


def spell(text: str) -> str:
    r"""Return the answer in ASCII LaTeX without anything that changes the look alone; words as `\text{...}`."""
    if not LINES.search(text):
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # escaped twice
    text = text.replace("\\\\", NEW_LINE)
    text = COLOURED.sub("", OLD_FONT.sub(r"\\text{\1}", SPACES.sub(" ", to_ascii(text))))
    text = LOOKS.sub("", SI_QUANTITY.sub(r"\1\\text{ \2}", text))
    for pattern, replacement in SAME_COMPILED:
        text = pattern.sub(replacement, text)
    for _ in range(MAX_PASSES):
        text, num_changed = WRAPPER.subn(_unwrap, text)
        if not num_changed:
            break
    text = MARK.sub(r"\\text{\1}", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = quoted["inside"] if (quoted := QUOTED.fullmatch(text)) else text
    return text.removesuffix(NEW_LINE.strip()).rstrip(".\\ ").strip()


def flatten(text: str) -> str:
    """Return the spelling with words no longer marked, for comparison as text."""
    text = MARKED_WORD.sub(r" \1 ", spell(text))
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def squeeze_spaces(text: str) -> str:
    """Return the text with white space left only between two letters or digits, and there as one space."""
    return re.sub(r"(?<!\w) | (?!\w)", "", re.sub(r"\s+", " ", text.strip()))


# Words that are done with, between passes: the wrapper around them could otherwise be found again.
MARK = re.compile("\x02([^\x02\x03]*)\x03")


def _unwrap(match: re.Match[str]) -> str:
    r"""What a font command is replaced by: a marked word, a function's name as a command, or its contents alone."""
    font, inside = match["font"], MARK.sub(r" \1 ", match["inside"])
    word = " ".join(inside.split())
    if font.startswith("operatorname"):
        return f"\\{word} " if word.isalpha() else inside
    if not WORD_INSIDE.fullmatch(word):
        return f" {inside} " if font not in LETTER_FONTS else inside
    if SEPARATOR.fullmatch(word):
        return f" {word.lower()} "
    if len(word) == 1 and (font in LETTER_FONTS or (font == "mathrm" and word in "ei")):
        return word
    return f"\x02{word}\x03"


def to_ascii(text: str) -> str:
    r"""Return the text with Unicode spelled in LaTeX: every dash as a minus sign, and line breaks as spaces."""
    text = text.replace("\x02", " ").replace("\x03", " ")
    text = RANGE_DASH.sub(r"\\text{ to }", text)
    text = OVERLINED.sub(lambda match: rf"\overline{{{re.sub(r'[^0-9]', '', match.group())}}}", text)
    text = UNICODE_ROOT.sub(
        lambda match: f"{CHARACTERS[match[1]].strip()}{{{match[2]}}}", DOTTED.sub(r"\\dot{\1}", text)
    )
    return "".join(_spell_run(shift, "".join(run)) for shift, run in groupby(text, key=_shift))


def _shift(character: str) -> str:
    """ "^" for superscripts, "_" for subscripts, else nothing."""
    if character < "\x80" or character in CHARACTERS:
        return ""
    decomposition = unicodedata.decomposition(character)
    return "^" if decomposition.startswith("<super>") else "_" if decomposition.startswith("<sub>") else ""


def _spell_run(shift: str, run: str) -> str:
    if not shift:
        return "".join(character if " " <= character < "\x7f" else _spell_character(character) for character in run)
    return f"{shift}{{{''.join(map(_spell_character, unicodedata.normalize('NFKC', run)))}}}"


def _spell_character(character: str) -> str:
    category = unicodedata.category(character)
    if character in CHARACTERS:
        return CHARACTERS[character]
    if character in MINUS_SIGNS or category == "Pd":
        return "-"
    if category in ("Zs", "Zl", "Zp", "Cc"):
        return " "
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if category == "Cf" or "\ufe00" <= character <= "\ufe0f":  # joiners, text directions and the like have no look
        return ""
    if category == "Sc" and character != "$":
        return f"\\currency{{{unicodedata.name(character).split()[0].lower()}}}"
    plain = unicodedata.normalize("NFKC", character)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        numerator, _, denominator = plain.partition("\u2044")
        return rf"\frac{{{numerator}}}{{{denominator}}}" if denominator else character
    if plain != character:
        return "".join(map(_spell_character, plain)) if len(plain) < 20 else plain
    name = unicodedata.name(character, "")
    if name.startswith("GREEK ") and " LETTER " in name and " WITH " not in name:
        letter = "lambda" if character in "\u039b\u03bb" else name.rpartition(" ")[2].lower()
        return f"\\{letter if 'SMALL' in name else letter.capitalize()} "
    return character
