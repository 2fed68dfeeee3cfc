"""The house's floors: a file imports only from lower floors, or from files printed above it in its own folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "saccade"

# From the ground up. A folder's files are printed in the order in which they may import each other;
# rooms on one floor are blind to each other unless they are files of one folder.
FLOORS: list[dict[str, list[str]]] = [
    {"base": ["errors", "options", "meter", "ranks"]},
    {"schemes": ["scheme", "packing", "affine", "parts", "loading"]},
    {
        "kernels": [
            "record",
            "reference",
            "library",
            "ordered",
            "cpu_pack",
            "cpu_linear",
            "cpu_small",
            "cpu_attention",
            "cpu_decoder",
            "cpu",
            "triton_common",
            "triton_rows",
            "triton_cuts",
            "triton_heads",
            "triton_sampling",
            "triton_attention",
            "triton_linear",
            "triton_decoder",
            "triton_kernels",
            "choose",
        ]
    },
    {
        "checkpoints": [
            "json_file",
            "config",
            "shards",
            "shard_writer",
            "stored",
            "ascend",
            "compressed_tensors",
            "awq_gptq",
            "writing",
            "formats",
            "hub",
            "presets",
            "noise",
            "stand_in",
            "describe",
        ],
    },
    {"geometry": []},
    {
        "inputs": ["prompt", "options", "media", "video", "pixels", "chat"],
        "model": ["key_fold", "sharding", "layers", "vision", "language", "qwen2_5_vl"],
    },
    {
        "grounding": [],
        "quantize": [
            "report",
            "report_page",
            "recipe",
            "calibration",
            "forward",
            "fold",
            "rounding",
            "observers",
            "objectives",
            "trials",
            "outlier_suppression",
            "iterative_smooth",
            "exact_format",
            "pipeline",
            "drawn_samples",
            "samples",
            "statistics",
            "steps",
            "clip",
            "gptq",
            "ranges",
            "learned_scale",
            "smoothing",
            "rotation",
            "best_recipe",
            "plan",
            "stream",
            "state",
            "job",
            "kept",
            "source",
            "pairs",
            "round_linear",
            "run",
            "best",
        ],
        "engine": [
            "options",
            "lookup",
            "sampling",
            "device_sampling",
            "blocks",
            "request",
            "scheduler",
            "batch",
            "graphs",
            "runner",
            "workers",
            "engine",
        ],
    },
    {"outputs": [], "planning": []},
    {"api": [], "drawing": []},
    {"scoring": []},
    {
        "evals": [
            "item",
            "metrics",
            "statistics",
            "drawing",
            "scenes",
            "questions",
            "tasks",
            "dataset",
            "outliers",
            "run",
            "report",
        ],
        "demo": [],
        "bench": ["options", "work", "machine", "model", "against", "measure"],
        "doctor": [],
        "follower": [],
        "verify": [
            "options",
            "samples",
            "basis",
            "layers",
            "schema",
            "weights",
            "sensitivity",
            "verification",
            "after",
        ],
    },
    {
        "cli": [
            "flags",
            "held_out",
            "ask",
            "inspect",
            "quantize",
            "doctor",
            "bench",
            "verify",
            "eval",
            "demo",
            "commands",
            "__main__",
        ]
    },
]


def module_files() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("")
        if relative.name != "__init__" or relative.parts[0] == "demo":
            names.append(".".join(part for part in relative.parts if part != "__init__"))
    return names


def place_of(module: str) -> tuple[int, str, int]:
    """(floor, room, place within the room) of a module named without the package."""
    room, _, file = module.partition(".")
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            if file and file not in rooms[room]:
                raise AssertionError(f"saccade/{module.replace('.', '/')}.py has no place in FLOORS")
            return floor, room, rooms[room].index(file) if file else 0
    raise AssertionError(f"saccade/{module.replace('.', '/')} stands on no floor")


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it, named without the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "saccade" and rest and (PACKAGE / rest.replace(".", "/")).with_suffix(".py").exists():
                found.add(rest)
            elif package == "saccade" and rest and "." not in rest and (PACKAGE / rest / "__init__.py").exists():
                found.add(rest) if rest == "demo" else None
    return found


def file_of(module: str) -> Path:
    path = PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("module", module_files())
def test_a_file_imports_only_from_below(module: str) -> None:
    floor, room, place = place_of(module)
    for imported in imports_of(file_of(module)):
        other_floor, other_room, other_place = place_of(imported)
        is_below = other_floor < floor or (other_room == room and other_place < place)
        assert is_below, f"{module} (floor {floor}) imports {imported} (floor {other_floor})"


def test_every_room_in_the_list_exists() -> None:
    known = set(module_files())
    for rooms in FLOORS:
        for room, files in rooms.items():
            for name in [f"{room}.{file}" for file in files] or [room]:
                assert name in known, f"FLOORS lists {name}, which is not there"


def test_nothing_heavy_is_imported_for_help() -> None:
    """The program's own help may import click and nothing of torch."""
    top = [
        node
        for name in ("__init__", "commands")
        for node in ast.parse((PACKAGE / "cli" / f"{name}.py").read_text()).body
    ]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] in {"torch", "numpy", "PIL", "rich", "av", "tokenizers"}}
    assert {name for name in names if name.startswith("saccade")} == {
        "saccade",
        "saccade.base.errors",
        "saccade.cli.commands",
    }
