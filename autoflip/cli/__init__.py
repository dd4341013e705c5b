"""The command line. Every mistake of a user is one line on stderr and a non-zero exit, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from autoflip.cli.errors import Stopped, UsageMistake

__all__ = ["Stopped", "UsageMistake", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (failed), 2 (usage or configuration), 130 (Ctrl-C).

    With the environment variable ``AUTOFLIP_DEBUG=1`` errors keep their traceback.

    Args:
        arguments: what follows ``autoflip``; None: those of the process.
    """
    import typer

    from autoflip.cli.commands import app

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± is no reason to fail after an hour
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="autoflip", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (Stopped, KeyboardInterrupt, typer.Abort) as stop:
        print(f"autoflip: stopped{'; ' + str(stop) if str(stop) else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("AUTOFLIP_DEBUG") == "1":
            raise
        line, code = _describe(error)
        print(f"autoflip: error: {' '.join(line.split())}", file=sys.stderr)
        return code


def _describe(error: Exception) -> tuple[str, int]:
    import typer

    # typer vendors click since 0.16 or so; its own BadParameter leads to the right ClickException
    click_error = typer.BadParameter.__mro__[2]
    if isinstance(error, click_error):
        line = error.format_message()  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        return (f"{line.rstrip('.')} (see {context.command_path} --help)" if context is not None else line), 2
    if isinstance(error, UsageMistake):
        return str(error), 2
    from autoflip.ops.backend import BackendError

    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    if isinstance(error, (ValueError, OSError, BackendError)) or type(error).__module__.startswith("autoflip."):
        return str(error) or type(error).__name__, 1
    return f"internal error, {type(error).__name__}: {str(error)[:400]} (AUTOFLIP_DEBUG=1 shows where)", 1
