"""What a quantized model and its source are asked to be compared: the shipped questions, given pictures, or given samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Conversation = Sequence[Mapping[str, Any]]


def shipped(has_answers: bool) -> list[Conversation]:
    """Questions about pictures that no calibration has seen, followed by their right answers where these are wanted."""
    from saccade.demo import questions

    asked = [question for question in questions() if question.images]
    return [
        [*question.messages, {"role": "assistant", "content": question.answer}] if has_answers else question.messages
        for question in asked
    ]


def chosen(images: Sequence[str], question: str, samples: str | None, has_answers: bool) -> list[Conversation]:
    """Of the three, what was asked for. Raises OptionError or MediaError for samples that cannot be read."""
    from saccade.api import messages_for
    from saccade.quantize.samples import conversations_of

    if samples is not None:
        return conversations_of(samples)
    if images:
        return [messages_for(question, [image]) for image in images]
    return shipped(has_answers)
