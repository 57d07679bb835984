# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the application they are registered with, and how results and refusals are shown."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

F = TypeVar("F", bound=Callable[..., None])
BAD_INPUT_EXIT_CODE = 2
FAILED_RUN_EXIT_CODE = 1

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Train with verl on the problems whose policy gradient points along a trusted one."""


def command(
    *examples: str, ends: str = "Exit code: 0 done, 2 bad input.", takes_commands: bool = False
) -> Callable[[F], F]:
    """Return what registers a function as a command: examples and exit codes below its help, refusals as messages.

    `takes_commands`: options that it does not know belong to another program's command line, its argument.
    """
    indented = (f"  {example}".replace("\n", "\n  ") for example in examples)
    epilog = "\n\n".join(["\nExamples:", *indented, f"{ends}\n"])
    settings = {"ignore_unknown_options": takes_commands}
    return lambda function: app.command(epilog=epilog, context_settings=settings)(refusals_as_messages()(function))


@contextmanager
def refusals_as_messages() -> Iterator[None]:
    """Print what a user can fix (ValueError, OSError; exit code 2) or a failed run (RuntimeError; 1) as one message."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # typer's own ways to end
        raise
    except (ValueError, OSError, RuntimeError) as error:
        say(Console(stderr=True), f"error: {error}", style="red")
        code = FAILED_RUN_EXIT_CODE if isinstance(error, RuntimeError) else BAD_INPUT_EXIT_CODE
        raise typer.Exit(code) from None


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is: paths and messages may hold what rich takes for markup, and are not broken into lines."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def numbers_table(header: Sequence[str], rows: Iterable[Sequence[str]], **style: Any) -> Table:
    """Return a table for a terminal, all columns but the first aligned to the right."""
    table = Table(*header, **style)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def whole_numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    """Return the numbers of an option. Raises: ValueError if they are none."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text} are not whole numbers; write for example {option} {example}") from None
