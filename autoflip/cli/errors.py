"""What ends a command early."""

__all__ = ["Stopped", "UsageMistake"]


class UsageMistake(ValueError):
    """An option or a configuration is wrong: exit code 2."""


class Stopped(Exception):  # noqa: N818  (it is no error)
    """The user pressed Ctrl-C; the message says how to go on."""
