"""Saccade runs Qwen2.5-VL: a picture or a video and a question become an answer.

The public names are resolved on first use, so that `import saccade` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.api import LLM as LLM
    from saccade.base.errors import SaccadeError as SaccadeError
    from saccade.engine.options import SamplingParams as SamplingParams
    from saccade.inputs.options import MediaLimits as MediaLimits
    from saccade.inputs.options import MediaOptions as MediaOptions
    from saccade.outputs import RequestOutput as RequestOutput

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "saccade.api",
    "MediaLimits": "saccade.inputs.options",
    "MediaOptions": "saccade.inputs.options",
    "RequestOutput": "saccade.outputs",
    "SaccadeError": "saccade.base.errors",
    "SamplingParams": "saccade.engine.options",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
