# SPDX-License-Identifier: Apache-2.0
"""Figures as part of an HTML file: an image in the address of the image, which can neither act nor load anything."""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["Picture", "picture"]

# Text stays text: small, sharp, and in scripts that matplotlib's own font lacks. Equal figures give equal files.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "verl-gradalign", "font.family": "DejaVu Sans"}
NO_DATE = {"Date": None, "Creator": None}
RASTER_DPI = 110
# Of a path's coordinates, a hundredth of a point is enough; the digits after it are half of the file.
PATH = re.compile(rb' d="[^"]*"')
DIGITS = re.compile(rb"(\.\d\d)\d+")


@dataclass(frozen=True)
class Picture:
    """An image and what is said of it."""

    src: str
    alt: str
    caption: str
    is_wide: bool = True


def picture(figure: Figure, alt: str, caption: str, is_wide: bool = True) -> Picture:
    """Return a figure as a picture."""
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts may have it
        figure.savefig(file, format="svg", dpi=RASTER_DPI, metadata=NO_DATE)
    drawing = PATH.sub(lambda path: DIGITS.sub(rb"\1", path[0]), file.getvalue())
    src = "data:image/svg+xml;base64," + base64.b64encode(drawing).decode("ascii")
    return Picture(src, alt, caption, is_wide)
