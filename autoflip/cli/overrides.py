"""From command-line options to a checked configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoflip.cli.errors import UsageMistake

__all__ = ["load_config", "overrides_of"]


def overrides_of(**options: Any) -> list[str]:
    """Turn options into ``section.key=value`` overrides; keys are written ``section__key``, None is left out."""

    def text(value: Any) -> str:
        return json.dumps(str(value), ensure_ascii=False) if isinstance(value, (str, Path)) else str(value)

    return [f"{key.replace('__', '.')}={text(value)}" for key, value in options.items() if value is not None]


def load_config(path: Path | None, overrides: list[str]) -> Any:
    """Return the checked configuration; whatever is wrong with it is a mistake of usage."""
    from autoflip import fed

    try:
        return fed.Config.load(path, overrides=overrides)
    except FileNotFoundError as error:
        raise UsageMistake(f"there is no configuration file {path}") from error
    except (ValueError, OSError) as error:
        raise UsageMistake(str(error)) from error
