"""Flags from dataclasses: every option is declared once, as a field, and becomes a flag here."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from saccade.base.errors import OptionError

T = TypeVar("T")
Command = Callable[..., None]

MODEL_HELP = "checkpoint folder, hub id, or demo"

# The spellings of the reference benchmark's script, accepted beside ours.
ALIASES = {
    "max_tokens": ["--max_length", "--max_new_tokens"],
    "min_tokens": ["--min_length"],
    "quantization": ["--quant_type"],
    "temperature": ["--temperature"],
    "top_p": ["--top_p"],
    "top_k": ["--top_k"],
    "repetition_penalty": ["--repetition_penalty"],
}


def flags(kind: type, *, without: tuple[str, ...] = (), **changed_defaults: Any) -> Callable[[Command], Command]:
    """A decorator that adds a flag for every field of dataclass `kind` but those `without`; `gather` makes an instance of them."""

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(kind)
        for field in reversed(dataclasses.fields(kind)):
            if field.name in without:
                continue
            name = "--" + field.name.replace("_", "-")
            names = list(dict.fromkeys([name, *ALIASES.get(field.name, []), field.name]))
            default = changed_defaults.get(field.name, field.default)
            keywords: dict[str, Any] = {"help": field.metadata.get("help", ""), "default": default}
            value_type, is_multiple = _value_type(hints[field.name])
            if value_type is bool:
                names = [name if default is False else f"{name}/--no-{name[2:]}", field.name]
                keywords["is_flag"] = True
            else:
                keywords |= {"type": value_type, "multiple": is_multiple, "show_default": default not in (None, ())}
            command = click.option(*names, **keywords)(command)
        return command

    return decorate


def script_options(kind: type, *, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """As `flags`, in the spelling of msModelSlim's scripts: underscores, and booleans as the literals True and False.

    A boolean named in `_BARE` is a bare flag there too.
    """

    def literal(ctx: click.Context, parameter: click.Parameter, value: str) -> bool:
        return value == "True"

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(kind)
        for field in reversed(dataclasses.fields(kind)):
            if field.name in without:
                continue
            names = [f"--{field.name}", f"--{field.name.replace('_', '-')}", field.name]
            keywords: dict[str, Any] = {"help": field.metadata.get("help", ""), "default": field.default}
            value_type, _ = _value_type(hints[field.name])
            if value_type is bool and field.name in _BARE:
                keywords["is_flag"] = True
            elif value_type is bool:
                keywords |= {
                    "type": click.Choice(["True", "False"]),
                    "callback": literal,
                    "default": str(field.default),
                }
            else:
                keywords["type"] = value_type
            keywords["show_default"] = "is_flag" not in keywords and field.default is not None
            command = click.option(*dict.fromkeys(names), **keywords)(command)
        return command

    return decorate


_BARE = ("mindie_format",)


def gather(kind: type[T], values: dict[str, Any]) -> T:
    """Takes the fields of `kind` out of a command's keywords."""
    return kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def require_places(*files: Path | str | None) -> None:
    """Raises OptionError for a file that could not be written at the end of the long work, as far as that can be told before it."""
    for file in (Path(file) for file in files if file):
        folder = file.absolute().parent
        if not folder.is_dir():
            raise OptionError(f"{file} cannot be written: {folder} is no folder; make it first")
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise OptionError(f"{file} cannot be written: permission denied; choose another place")


def _value_type(hint: Any) -> tuple[Any, bool]:
    """The type of a flag's value, and whether the flag may be given several times."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _value_type(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return arguments[0], True
    if origin is typing.Literal:
        return click.Choice(arguments), False
    return hint, False
