"""Flags from a dataclass, with a help that people can read."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

Options = TypeVar("Options")
_WORDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "True|False"}


def command_line(
    options: type[Options], arguments: Sequence[str], prog: str | None = None, description: str | None = None
) -> Options:
    """Flags → an instance of the dataclass `options`; prints help or a usage error and exits as flags do.

    tyro shows a flag that may be left out as `{None}|PATH (default: None)`; here it is `PATH`: its text says what
    happens without it.
    """
    shown = tyro.cli(_shown(options), args=arguments, prog=prog, description=description, use_underscores=True)
    return _as(options, shown)


def _as(options: type[Options], shown: Any) -> Options:
    """The instance of `options` with the values of `shown`."""
    values = {field.name: getattr(shown, field.name) for field in dataclasses.fields(shown)}
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            values[name] = _as(type(value).__bases__[0], value)
    return options(**values)


def _shown(options: type[Any]) -> type[Any]:
    """A subclass whose optional fields are shown by the words of what they take."""
    hints = typing.get_type_hints(options, include_extras=True)
    annotations: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        kind, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        words = _words(kind)
        if dataclasses.is_dataclass(kind):
            inner = _shown(typing.cast(type[Any], kind))
            annotations[field.name] = Annotated[inner, *extras] if extras else inner
            defaults[field.name] = dataclasses.field(default_factory=inner)
        elif field.default is None and words is not None:
            annotations[field.name] = Annotated[hint, tyro.conf.arg(metavar=words, help_behavior_hint="")]
            defaults[field.name] = None
    body = {"__annotations__": annotations, "__doc__": options.__doc__, "__module__": options.__module__, **defaults}
    return dataclasses.dataclass(frozen=True)(type(options.__name__, (options,), body))


def _words(hint: Any) -> str | None:
    """What to write for a value of an optional type; None where tyro's own words will do."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    (kind, *more) = [part for part in typing.get_args(hint) if part is not type(None)]
    if more:
        return None
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    if typing.get_origin(kind) is tuple:
        word = _WORDS[typing.get_args(kind)[0]]
        return f"{word} [{word} …]"
    return _WORDS.get(kind)
