"""JSON from files nobody vouches for.

Knows that a file may be huge, deeply nested, ambiguous or not JSON at all, and answers every case with a CheckpointError;
knows no field names.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from saccade.base.errors import CheckpointError

MAX_JSON_BYTES = 16 << 20  # the largest published one, tokenizer.json, has 11 MB
_MAX_NUMBER_DIGITS = 400  # float64 has no longer decimal integer; also keeps the integer parser linear
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON's escapes can spell these; nothing can print or store them


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError naming the file when it is absent, too large or not a strict object."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if status.st_size > max_bytes:
            raise CheckpointError(f"{path} has {status.st_size} bytes; at most {max_bytes} are read from such a file")
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """One strict JSON object: no NaN or Infinity, no key twice or half a character. `where` names it in errors."""

    def refuse_constant(literal: str) -> NoReturn:
        raise CheckpointError(f"{where} holds {literal}, which is not JSON")

    def parse_integer(digits: str) -> int:
        if len(digits) > _MAX_NUMBER_DIGITS:
            raise CheckpointError(f"{where} holds a number of {len(digits)} digits")
        return int(digits)

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where} holds the key {twice!a} twice in one object")
        if halves := [key for key in result if _HALF_CHARACTER.search(key)]:
            raise CheckpointError(f"{where} holds the key {halves[0]!a}, which is not Unicode text")
        return result

    try:
        value = json.loads(text, parse_constant=refuse_constant, parse_int=parse_integer, object_pairs_hook=unique_keys)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply") from None
    except ValueError as error:  # malformed JSON and malformed UTF-8
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a {type(value).__name__} where an object is expected")
    return value


def printable(value: object) -> str:
    """A name from a file, for an error line: plain names as they are, others escaped and shortened."""
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() and value else ascii(value)
    return text if len(text) <= 200 else text[:197] + "..."
