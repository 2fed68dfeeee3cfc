"""From what a user calls a model to a folder on this machine.

Knows local folders, the packaged demo, Hugging Face and ModelScope; knows nothing of what is in the folder, except that
only configuration, text and safetensors are ever fetched: no pickles, no code.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Literal, get_args

from saccade.base.errors import CheckpointError, OptionError

Source = Literal["huggingface", "modelscope"]

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "model"
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.jinja")

_HUB_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


def resolve(model: str | os.PathLike[str], source: Source = "huggingface", revision: str | None = None) -> Path:
    """The folder of `model`: "demo", a local folder (for one called demo write ./demo), or a hub id such as org/name.

    A hub id is downloaded, or taken from the hub's cache. Raises CheckpointError saying what to do when there is no such
    folder, no such model, or no network; OptionError for an unknown source.
    """
    if source not in get_args(Source):
        raise OptionError(f"source {source!r} is unknown; use {' or '.join(get_args(Source))}")
    if str(model) == "":
        raise CheckpointError(
            f"the model's name is empty; pass a folder, a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or {DEMO}"
        )
    if revision is not None and (str(model) == DEMO or os.path.isdir(os.path.expanduser(model))):
        raise OptionError(f"revision {revision!r} is of a hub id, and {model} is a folder; leave it out")
    if str(model) == DEMO:
        if not DEMO_FOLDER.is_dir():
            raise CheckpointError(f"this installation lacks the demo model ({DEMO_FOLDER}); install saccade again")
        return DEMO_FOLDER
    path = Path(os.path.expanduser(model))  # unlike Path.expanduser, leaves an unknown ~user as it is
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; pass the folder it is in, {path.parent}")
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{path} does not exist{_nearest_sibling(path)}; pass a folder, a hub id such as "
            f"Qwen/Qwen2.5-VL-3B-Instruct, or {DEMO}"
        )
    return _from_modelscope(model, revision) if source == "modelscope" else _from_huggingface(model, revision)


def _from_huggingface(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # imported late: it costs a good part of a second
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(FETCHED)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model} asks for its terms to be accepted on its page; then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {model} here and no model {model} on huggingface.co (or it is private: `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision}; leave it out for the newest") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(_offline(model, f"hf download {model} --local-dir {Path(model).name}")) from error
    except Exception as error:  # the HTTP library beneath, and so its family of errors, differs between versions
        fact = f"downloading {model} failed ({type(error).__name__}: {_first_line(error)})"
        raise CheckpointError(f"{fact}; try again, finished files are kept") from error


def _from_modelscope(model: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            "ModelScope's package is not installed; run `pip install saccade[modelscope]`, or leave out the source"
        ) from error
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(FETCHED)))
    except Exception as error:  # the package documents no family of errors
        how = f"modelscope download --model {model} --local_dir {Path(model).name}"
        raise CheckpointError(f"{_offline(model, how)} ({type(error).__name__}: {_first_line(error)})") from error


def _offline(model: str, command: str) -> str:
    """The error of a machine that cannot reach a hub."""
    switch = (
        "HF_HUB_OFFLINE is set"
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        else "the hub cannot be reached"
    )
    return (
        f"there is no folder {model} here{_nearest_sibling(Path(model))}, it is not in the download cache, and {switch}; "
        f"on a machine with network run `{command}`, copy that folder here and pass its path, or try {DEMO}"
    )


def _nearest_sibling(path: Path) -> str:
    """A hint at a folder of a similar name beside `path`, if there is one."""
    try:
        siblings = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (there is {path.parent / close[0]})" if close else ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
