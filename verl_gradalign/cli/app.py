# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the application they are registered with, and how a refusal is shown."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

__all__ = ["app", "refusals_as_messages"]

BAD_INPUT_EXIT_CODE = 2
FAILED_RUN_EXIT_CODE = 1

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Train with verl on the problems whose policy gradient points along a trusted one."""


@contextmanager
def refusals_as_messages() -> Iterator[None]:
    """Print what a user can fix (ValueError, OSError; exit code 2) or a failed run (RuntimeError; 1) as one message."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        code = FAILED_RUN_EXIT_CODE if isinstance(error, RuntimeError) else BAD_INPUT_EXIT_CODE
        raise typer.Exit(code) from None
