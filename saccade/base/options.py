"""Options are declared once, as fields of a frozen dataclass with a help line, a unit and bounds; flags and checks follow from them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from saccade.base.errors import OptionError

T = TypeVar("T")


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its help line and inclusive bounds. None is always allowed where it is the default."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


def check_values(options: Any) -> None:
    """Raises OptionError naming the first field of dataclass `options` that is not what its annotation says, or outside its
    bounds (NaN is outside all)."""
    hints = _hints(typing.cast(Hashable, type(options)))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not _is_one(value, hints[field.name]):
            raise OptionError(f"{field.name} is {value!r}; {_wanted(hints[field.name])}")
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if value is None or (low is None and high is None):
            continue
        if not (low is None or value >= low) or not (high is None or value <= high):
            bounds = (
                f"at least {low:g}"
                if high is None
                else f"{low:g} to {high:g}"
                if low is not None
                else f"at most {high:g}"
            )
            raise OptionError(f"{field.name} is {value!r}; it must be {bounds}")


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    """By field, of a dataclass."""
    return typing.get_type_hints(kind)


def _is_one(value: object, hint: Any) -> bool:
    """Whether a value is what an annotation of these files says: a plain type, one of several, Literal, or tuple[X, ...]."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_one(value, arm) for arm in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is_one(item, arguments[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def _wanted(hint: Any) -> str:
    """What an annotation asks for, as the end of an error."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _wanted(next(arm for arm in arguments if arm is not type(None)))
    if origin is typing.Literal:
        return f"use one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"it must be a list, each {_WORDS.get(arguments[0], f'a {arguments[0].__name__}')}"
    return f"it must be {_WORDS[hint]}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `name`, or the list of all when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """Dataclass `kind` from keywords. Raises OptionError for an unknown name, naming the nearest known one."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise OptionError(f"option {name!r} is unknown{suggestion(name, known)}")
    return kind(**values)
