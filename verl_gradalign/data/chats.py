# SPDX-License-Identifier: Apache-2.0
"""Prompts as the turns of a chat: from text, from lists of messages as verl has them, and from such lists as JSON text.

All turns are kept: the last one is what is asked, those before it (a system turn, earlier questions and answers) are
its context. What is no such chat is refused.

    read_turns([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}], "prompt")
"""

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from verl_gradalign.data.values import (
    JSON_TEXT,
    PARTS,
    SEVERAL_TURNS,
    SYSTEM_TURNS,
    as_text,
    is_empty,
    parse_json_text,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
SETS_THE_SCENE = ("system", "developer")
# A list of messages (or one) as JSON or Python writes it.
LOOKS_LIKE_A_CHAT = re.compile(
    r"""\s*(?:array\()?\[?\s*\{(?=.*["'](?:role|from)["'])(?=.*["'](?:content|value)["'])""", re.DOTALL
)


class Turn(NamedTuple):
    """One message of a chat."""

    role: str
    content: str


def read_turns(value: Any, column: str) -> tuple[tuple[Turn, ...], set[str]]:
    """Return the turns of a prompt, the user's question last, and the names of the repairs.

    Raises: ValueError with the reason and remedy, as what follows "<place> has".
    """
    repairs: set[str] = set()
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) and LOOKS_LIKE_A_CHAT.match(value):
        value = _read_chat_text(value, column)
        repairs.add(JSON_TEXT)
    if not isinstance(value, list | tuple):
        text, of_text = as_text(value, column)
        return (Turn("user", text),), of_text
    turns = []
    for message in value:
        turn, of_turn = _read_turn(message, column)
        turns.append(turn)
        repairs |= of_turn
    if not any(turn.role == "user" for turn in turns):
        raise ValueError(f"an empty {column!r}: none of its {len(turns)} messages is the user's; add what is asked")
    if turns[-1].role != "user":
        why = f"a {column!r} that ends with a message of the {turns[-1].role}, not with what the user asks"
        raise ValueError(f"{why}; leave out what follows the question")
    roles = [turn.role for turn in turns[:-1]]
    repairs |= {SYSTEM_TURNS} if any(role in SETS_THE_SCENE for role in roles) else set()
    repairs |= {SEVERAL_TURNS} if any(role not in SETS_THE_SCENE for role in roles) else set()
    return tuple(turns), repairs


def _read_chat_text(text: str, column: str) -> Any:
    chat = parse_json_text(text)
    if chat is None:
        try:
            chat = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            chat = None
    if not isinstance(chat, list):
        why = f"in {column!r} text that looks like a chat and is no list of messages in JSON ({text.strip()[:60]!r})"
        raise ValueError(f"{why}; write it as JSON, or as a list of objects with role and content")
    return chat


def _names(keys: Iterable[Any]) -> str:
    """Return the names of keys as a message can be printed: half of a character cannot be."""
    return ", ".join(map(str, keys)).encode("utf-8", "backslashreplace").decode()


def _read_turn(message: Any, column: str) -> tuple[Turn, set[str]]:
    remedy = "write each message as an object with role and content"
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        keys = f" with {_names(message)}" if isinstance(message, Mapping) else ""
        raise ValueError(f"in {column!r} a message that is {type(message).__name__}{keys}; {remedy}")
    if message["role"] not in ROLES:
        raise ValueError(f"in {column!r} a message of role {message['role']!r}; use one of {', '.join(ROLES)}")
    if more := sorted(str(k) for k, v in message.items() if k not in ("role", "content") and not is_empty(v)):
        raise ValueError(f"in {column!r} a message with {_names(more)}, which would be lost; {remedy} alone")
    content, repairs = message["content"], set()
    content = content.tolist() if hasattr(content, "tolist") else content
    if isinstance(content, list | tuple):
        content, repairs = _join_parts(content, column), {PARTS}
    text, of_text = as_text(content, f"{column}.content")
    return Turn(message["role"], text), repairs | of_text


def _join_parts(parts: Any, column: str) -> str:
    """The text of a content that is a list of parts, if all of them are text."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if isinstance(part, str):
            texts.append(part)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            why = f"in {column!r} a part of type {kind}, which prepared files have no place for"
            raise ValueError(f"{why}; {HOLD_OUT_INSTEAD}")
    return "".join(texts)


HOLD_OUT_INSTEAD = "hold problems out of the file as it is, with verl-gradalign hold-out"
