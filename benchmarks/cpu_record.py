"""One measurement of benchmarks/cpu.py, and the file of all of them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """Seconds of one answer by one system, and what this machine could do in the same minute."""

    system: str
    media: str  # picture or video
    version: str
    threads: int
    tokens_in: int
    tokens_out: int
    load_s: float
    vision_s: float  # the tower alone
    prefill_s: float
    token_s: float  # of one decoded token, the first excepted
    total_s: float  # with preprocessing, tokenization and everything else
    token_bytes: int  # of weights and cache that a decoded token reads
    peak_memory_bytes: int
    bytes_per_s: float  # the fastest torch read a gigabyte
    integer_operations_per_s: float | None  # of oneDNN's int8 product with 1024 rows
    load_average: float
    date: str
    outside_kernels: float | None = None  # share of a decoded token's time outside the decoder's step and the head
    batch_tokens_per_s: float | None = None  # eight requests decoding together, without a picture

    @property
    def first_token_s(self) -> float:
        return self.total_s - self.token_s * (self.tokens_out - 1)

    @property
    def read_bytes_per_s(self) -> float:
        return self.token_bytes / self.token_s


def read(path: Path) -> list[Record]:
    return [Record(**record) for record in json.loads(path.read_text())["records"]] if path.exists() else []


def processor_of(path: Path) -> str | None:
    """Whose measurements the file holds; None where there is no file."""
    return str(json.loads(path.read_text())["machine"]["processor"]) if path.exists() else None


def write(path: Path, machine: dict[str, Any], preset: str, records: list[Record]) -> None:
    content = {"machine": machine, "preset": preset, "records": [dataclasses.asdict(record) for record in records]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def medians(records: list[Record]) -> dict[str, Record]:
    """One record for each system, each of its numbers the median over rounds."""
    out = {}
    for system in dict.fromkeys(record.system for record in records):
        rounds = [record for record in records if record.system == system]
        columns = {
            field.name: [getattr(record, field.name) for record in rounds] for field in dataclasses.fields(Record)
        }
        numbers = {
            name: statistics.median(values)
            for name, values in columns.items()
            if all(isinstance(value, int | float) for value in values)
        }
        out[system] = dataclasses.replace(rounds[-1], **numbers)
    return out
