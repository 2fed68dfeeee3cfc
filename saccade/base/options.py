"""Options are declared once, as fields of a frozen dataclass with a help line, a unit and bounds; flags and checks follow from them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from saccade.base.errors import OptionError

T = TypeVar("T")


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its help line and inclusive bounds. None is always allowed where it is the default."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


def check_bounds(options: Any) -> None:
    """Raises OptionError naming the first field of dataclass `options` outside its bounds (NaN is outside all)."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if value is None or (low is None and high is None):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise OptionError(f"{field.name} is {value!r}; it must be a number")
        if not (low is None or value >= low) or not (high is None or value <= high):
            bounds = (
                f"at least {low:g}"
                if high is None
                else f"{low:g} to {high:g}"
                if low is not None
                else f"at most {high:g}"
            )
            raise OptionError(f"{field.name} is {value!r}; it must be {bounds}")


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
