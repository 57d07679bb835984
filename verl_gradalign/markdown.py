# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], is_right: bool = False) -> str:
    """Return a table, one line per row; `is_right` aligns all columns but the first to the right, for numbers."""
    rule = ["---", *(["---:" if is_right else "---"] * (len(header) - 1))]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in (header, rule, *rows))
