# SPDX-License-Identifier: Apache-2.0
"""Units and the words that stand behind numbers: which of them are the same, and which change the number."""

import re
from fractions import Fraction

# Spellings by unit; a plural "s" is taken off before.
SPELLINGS = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre cms",
    "m": "meter metre",
    "km": "kilometer kilometre kms",
    "in": "inch inche ins",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "s": "second sec",
    "ms": "millisecond",
    "min": "minute",
    "h": "hour hr",
    "d": "day",
    "week": "wk",
    "month": "",
    "year": "yr",
    "mg": "milligram",
    "g": "gram gm",
    "kg": "kilogram kgs kilo",
    "lb": "pound lbs",
    "oz": "ounce",
    "ml": "milliliter millilitre mL",
    "L": "liter litre l",
    "gal": "gallon",
    "mph": "",
    "kmh": "kph kmph",
    "N": "newton",
    "J": "joule",
    "kJ": "kilojoule",
    "W": "watt",
    "kW": "kilowatt",
    "V": "volt",
    "Pa": "pascal",
    "kPa": "kilopascal",
    "Hz": "hertz",
    "K": "kelvin",
    "mol": "mole",
    "rad": "radian",
    "degree": "deg",
    "cent": "\u00a2",
    "dollar": "usd",
    "euro": "eur",
    "rupee": "inr",
    "yen": "jpy",
    "unit": "",
    "people": "person",
    "acre": "",
    "hectare": "ha",
}
NAMES = {spelling: unit for unit, spellings in SPELLINGS.items() for spelling in (unit, *spellings.split())}
LETTERS = set("mgshLlNJWVK")
"""Units of one letter that are told from variables by the space before them; other letters are only in `\\text{}`."""
SCALES = {
    "half": Fraction(1, 2),
    "dozen": Fraction(12),
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}
# Words that make another number of the one before them; what they mean is not worked out.
CHANGING = set(
    "than more less fewer below above under over minus plus negative squared cubed point factorial mod not half "
    "halves third quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth score gross to or and "
    "is are was were no none nor wrong incorrect approximately about through between except if when where but".split()
)


def canonical_word(word: str) -> str:
    """Return the unit's own name: `Centimeters` is cm. Words that are no known unit lose a plural s alone."""
    if word in NAMES:
        return NAMES[word]
    lower = word.lower()
    singular = lower[:-1] if len(lower) > 2 and lower.endswith("s") and not lower.endswith("ss") else lower
    return NAMES.get(lower) or NAMES.get(singular) or singular


def canonical_unit(text: str) -> str:
    r"""Return one name for what stands behind a number: `square inches`, `sq in` and `in^2` are all in^2.

    "" for nothing, and for `units`, which names none.
    """
    text = re.sub(r"\b(?:square|sq)\.?\s+([A-Za-z]+)", r"\1^2", re.sub(r"[{}]", "", text))
    text = re.sub(r"\b(?:cubic|cu)\.?\s+([A-Za-z]+)", r"\1^3", text)
    text = re.sub(r"\s+per\s+", "/", f" {text} ")
    text = re.sub(r"[A-Za-z]+", lambda match: canonical_word(match.group()), text)
    text = re.sub(r"[\s.]+", "", text)
    text = {"mi/h": "mph", "km/h": "kmh"}.get(text, text)
    return "" if re.fullmatch(r"unit(?:\^\d)?", text) else text


def do_units_agree(left: str, right: str) -> bool:
    """Return whether two units can be the same: equal, or one of them left out, or degrees of an unnamed scale."""
    is_degree = left.startswith("degree") and right.startswith("degree") and "degree" in (left, right)
    return not left or not right or left == right or is_degree
