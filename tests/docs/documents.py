# SPDX-License-Identifier: Apache-2.0
"""What the documentation holds: commands, Python blocks and links, as they stand on the pages.

for command in commands_of(Path("README.md")):
    print(command.place, command.text)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELLS = ("bash", "console", "sh", "shell")
# What a line begins with that is a command, variables before it included.
STARTS = re.compile(r"(?:[A-Z_]+=\S+ +)*(?:verl-gradalign|python3?|make|pip|bash|pytest|recipes/\S+\.sh)(?: |$)")
INLINE = re.compile(r"(?:[A-Z_]+=\S+ +)*(?:verl-gradalign|python3?|make|pip install|bash|pytest|recipes/\S+\.sh) +\S")
YOUR_OVERRIDES = re.compile(r"<your overrides>|(?<= )\.\.\.(?= |$)")


@dataclass(frozen=True)
class Command:
    """A command that a reader may copy; `is_inline` if it is mentioned within a sentence."""

    page: Path
    line: int
    text: str
    is_inline: bool = False

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Block:
    """A fenced or indented block, its indentation taken off. `language` is empty for an indented one."""

    line: int
    language: str
    lines: tuple[str, ...]


def documentation() -> list[Path]:
    """Return all pages that tell somebody what to type."""
    folders = (ROOT / "recipes", ROOT / "configs")
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(p for f in folders for p in f.rglob("*.md"))]


def commands_of(page: Path) -> list[Command]:
    """Return a page's commands: those of blocks, then those within sentences."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in blocks_of(text):
        if block.language and block.language not in SHELLS:
            continue
        for number, line in _joined(block):
            stripped = line.removeprefix("$ ").strip()
            if STARTS.match(stripped) or (block.language and stripped and not stripped.startswith("#")):
                found.append(Command(page, number, _without_comment(stripped)))
    for number, span in _code_spans(text):
        if INLINE.match(span):
            found.append(Command(page, number, span, is_inline=True))
    return found


def python_blocks(page: Path) -> list[str]:
    """Return a page's Python blocks, in order."""
    text = page.read_text(encoding="utf-8")
    return ["\n".join(block.lines) + "\n" for block in blocks_of(text) if block.language == "python"]


def links_of(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures that lie in the repository, `#section` included."""
    text = page.read_text(encoding="utf-8")
    for block in blocks_of(text):
        text = text.replace("\n".join(block.lines), "")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def sections_of(page: Path) -> set[str]:
    """Return the names that a page's headings are linked by, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def blocks_of(text: str) -> Iterator[Block]:
    """Yield a page's fenced blocks, and its indented ones, in order."""
    lines = text.splitlines()
    place = 0
    while place < len(lines):
        start, fence = place, re.match(r"( *)```(\w*)", lines[place])
        place += 1
        if fence:
            while place < len(lines) and not lines[place].strip().startswith("```"):
                place += 1
            yield Block(start + 2, fence[2] or "text", tuple(lines[start + 1 : place]))
            place += 1
        elif lines[start].startswith("    ") and lines[start].strip():
            while place < len(lines) and (lines[place].startswith("    ") and lines[place].strip()):
                place += 1
            yield Block(start + 1, "", tuple(lines[start:place]))


def _joined(block: Block) -> Iterator[tuple[int, str]]:
    """Yield a block's lines with their numbers, those that end in a backslash joined with what follows."""
    joined, first = "", block.line
    for number, line in enumerate(block.lines, start=block.line):
        first = first if joined else number
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1].rstrip() + " "
            continue
        yield first, joined
        joined = ""
    if joined:
        yield first, joined


def _without_comment(line: str) -> str:
    return re.sub(r"\s+# .*$", "", line)


def _code_spans(text: str) -> Iterator[tuple[int, str]]:
    """Yield `code` within sentences, line breaks taken for spaces, with the number of its line."""
    kept = text.splitlines()
    for block in blocks_of(text):
        for number in range(block.line - 1, block.line - 1 + len(block.lines)):
            kept[number] = ""
    prose = re.sub(r"^ *```.*$", "", "\n".join(kept), flags=re.MULTILINE)
    for match in re.finditer(r"`([^`]+)`", prose):
        yield prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split())
