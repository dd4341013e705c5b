"""The configuration of a federated run: frozen dataclasses, read from TOML, checked before anything starts."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from autoflip.explore import SIGNALS
from autoflip.fed import presets
from autoflip.fed.data import canonical
from autoflip.fed.sections import CHOICES, METHOD_NAMES, RANGES, Data, Explore, Fed, Model, Prune, Server, Train, Wire

__all__ = ["Config", "ConfigError"]


class ConfigError(ValueError):
    """A configuration key or value is wrong; the message names it, what was wanted and what is near."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; equal configurations give equal results on one machine.

    Example:
        >>> Config.load(overrides=["fed.rounds=3", "prune.density=0.2"]).prune.density
        0.2
    """

    fed: Fed = field(default_factory=Fed)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    server: Server = field(default_factory=Server)
    explore: Explore = field(default_factory=Explore)
    prune: Prune = field(default_factory=Prune)
    wire: Wire = field(default_factory=Wire)

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            section = getattr(self, name)
            if not isinstance(section, kind):
                raise ConfigError(
                    f"{name} is a {type(section).__name__}; wanted fed.sections.{kind.__name__}(...), or "
                    f"Config.from_dict({{{name!r}: {{...}}}}) for plain values"
                )
            typed = {k: _typed(f"{name}.{k}", getattr(section, k), hint) for k, hint in get_type_hints(kind).items()}
            object.__setattr__(self, name, dataclasses.replace(section, **typed))  # 1 and 1.0 are the same run
        if self.fed.against == self.fed.method == Fed.against:  # nobody asked: it is the default
            object.__setattr__(self, "fed", dataclasses.replace(self.fed, against="none"))

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, overrides: Iterable[str] = ()) -> Config:
        """Read a TOML file, then apply ``section.key=value`` overrides; both are optional.

        What neither sets comes from the data set's preset, then from the defaults.

        Raises:
            ConfigError: unknown key, wrong type, value out of range, or no valid TOML.
            FileNotFoundError: ``path`` does not exist.
        """
        given: dict[str, dict[str, Any]] = {}
        if path is not None:
            try:
                parsed = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"config {path} is not valid TOML: {error}") from error
            for section, values in parsed.items():
                if not isinstance(values, Mapping):
                    raise ConfigError(f"config {path}: {section!r} stands outside a section; write it under [fed], ...")
                for key, value in values.items():
                    given.setdefault(section, {})[key] = value
        for override in overrides:
            section, key, value = _split(override, cls)
            given.setdefault(section, {})[key] = value
        return cls.from_dict(given)

    @classmethod
    def from_dict(cls, given: Mapping[str, Mapping[str, Any]]) -> Config:
        """Build from nested mappings ``{"fed": {"rounds": 3}}``; raises ConfigError as :meth:`load` does."""
        sections = get_type_hints(cls)
        for section, values in given.items():
            if section not in sections:
                raise ConfigError(f"unknown config section {section!r}{_nearest(section, sections)}")
            known = {f.name for f in dataclasses.fields(sections[section])}
            for key in values:
                if key not in known:
                    near = _nearest(f"{section}.{key}", [f"{s}.{k}" for s, k in _keys(cls)])
                    raise ConfigError(f"unknown config key '{section}.{key}'{near}")
        told = given.get("fed", {})
        if "against" in told and told["against"] == told.get("method", Fed.method):
            raise ConfigError(f"fed.against={told['against']!r} is the method itself; write fed.against=none")
        name = given.get("data", {}).get("name", Data.name)
        preset = {}
        if isinstance(name, str):  # a preset must not hang on how the name is spelt
            name = canonical(name)
            given = {**given, "data": {**given.get("data", {}), "name": name}}
            preset = presets.PRESETS.get(name, {})
        built = {}
        for section, kind in sections.items():
            built[section] = kind(**{**preset.get(section, {}), **given.get(section, {})})
        config = cls(**built)
        config.check()
        return config

    def check(self) -> None:
        """Raise ConfigError unless every value is in its range; :meth:`load` and ``fed.run`` call this."""
        for path, choices in CHOICES.items():
            value = self._at(path)
            if value not in choices:
                raise ConfigError(f"{path}={value!r}; wanted one of {', '.join(choices)}{_nearest(value, choices)}")
        for path, (good, wanted) in RANGES.items():
            value = self._at(path)
            if not good(value):
                raise ConfigError(f"{path}={value!r} is out of range; wanted a number in {wanted}")
        if self.prune.block and (len(self.prune.block) != 2 or min(self.prune.block) < 1):
            raise ConfigError(f"prune.block={list(self.prune.block)}; wanted [rows, columns], or [] for single weights")
        most = {"int8": 127, "int4": 7}.get(self.wire.values, 0)
        if self.wire.levels > most:
            wanted = f"0 to {most}" if most else "0: only int8 and int4 have levels"
            raise ConfigError(f"wire.levels={self.wire.levels} with wire.values={self.wire.values}; wanted {wanted}")
        for path, value, names in (
            ("fed.method", self.fed.method, METHOD_NAMES),
            ("fed.against", self.fed.against, (*METHOD_NAMES, "none")),
            ("explore.signal", self.explore.signal, SIGNALS),
        ):
            if value not in names:
                raise ConfigError(f"{path}={value!r}; wanted one of {', '.join(names)}{_nearest(value, names)}")
        if self.fed.timeout and not self.fed.processes:
            raise ConfigError("fed.timeout needs fed.processes of 1 or more: who works in this process cannot be ended")
        if self.fed.against == self.fed.method:
            raise ConfigError(f"fed.against={self.fed.against!r} is the method itself; write fed.against=none")

    def _at(self, path: str) -> Any:
        section, key = path.split(".")
        return getattr(getattr(self, section), key)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return nested dicts of plain values, every key present."""
        nested = dataclasses.asdict(self)
        nested["prune"]["block"] = list(self.prune.block)
        return nested

    def fingerprint(self) -> str:
        """Return 32 hex digits that change with every value but ``data.root``, where the data happens to lie."""
        told = self.as_dict()
        del told["data"]["root"]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    def to_toml(self) -> str:
        """Return TOML text that :meth:`load` reads back to an equal configuration."""
        lines = []
        for section, values in self.as_dict().items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
            lines.append("")
        return "\n".join(lines)


def _keys(cls: type) -> list[tuple[str, str]]:
    return [(name, f.name) for name, kind in get_type_hints(cls).items() for f in dataclasses.fields(kind)]


def _nearest(word: object, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _split(override: str, cls: type) -> tuple[str, str, Any]:
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"override {override!r}; wanted section.key=value, for example fed.rounds=50")
    text = text.strip()
    kind = get_type_hints(get_type_hints(cls).get(section, object)).get(key)
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    if kind is str and not isinstance(value, str):
        value = text  # a folder may be called 1_000 or 2026-12-01
    if kind is float and value is text:
        with contextlib.suppress(ValueError):  # .5 and 1. are none of TOML's numbers
            value = float(text)
    return section, key, value


def _typed(path: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float, os.PathLike)) and not isinstance(value, bool):
        value = str(value)
    if kind == tuple[int, ...]:
        if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            return tuple(value)
        raise ConfigError(f"{path}={value!r}; wanted a list of whole numbers such as [4, 1]")
    if not isinstance(value, kind) or isinstance(value, bool) or value != value:
        wanted = {"int": "a whole number", "float": "a number", "str": "text"}[kind.__name__]
        raise ConfigError(f"{path}={value!r}; wanted {wanted}")
    if kind is str and any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"{path}={value!r} is not UTF-8, as config.toml is; give the folder another name or a link")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        escaped = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
