"""What the demo model is taught to say besides its tasks: descriptions of scenes and clips, a greeting, who it is.

Knows the phrases; knows no pixels and no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from saccade.evals.drawing import Rng
from saccade.evals.questions import Turn, pick
from saccade.evals.scenes import Clip, Scene

GREETING = "Hello! Show me a picture or a short clip and ask me about it."
SELF = (
    "I am a tiny demo model. I can read simple pictures and short clips of shapes, numbers, words, charts and tables."
)
WELCOME = "You are welcome."

DESCRIBE_PICTURE = ("Describe this picture.", "What is in this picture?", "Describe this image.", "What do you see?")
DESCRIBE_CLIP = ("Describe this video.", "What happens in this video?", "Describe this clip.", "What happens?")


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def describe(rng: Rng, subject: tuple[Scene, ...] | Clip) -> Turn | None:
    """Shapes from left to right, or what happens in a clip; None about anything else."""
    if isinstance(subject, Clip):
        return Turn("describe", pick(rng, DESCRIBE_CLIP), clip_sentence(subject), "exact")
    shapes = sorted(subject[0].shapes, key=lambda shape: shape.centre)
    if len(subject) > 1 or not shapes:
        return None
    said = listed([with_article(shape.name) for shape in shapes])
    return Turn("describe", pick(rng, DESCRIBE_PICTURE), f"The picture shows {said}.", "exact")


def clip_sentence(clip: Clip) -> str:
    names = [with_article(shape.name) for shape in clip.cast]
    if clip.direction is None and len(clip.cast) > 1:
        return f"First {names[0]} appears, {', '.join(f'then {name}' for name in names[1:])}."
    towards = f"to the {clip.direction}" if clip.direction in ("left", "right") else clip.direction
    return f"{names[0].capitalize()} moves {towards}."


def chat(rng: Rng) -> Turn:
    """A turn without media that is no task: a greeting, a question about the model, thanks."""
    asked, answer = pick(
        rng,
        (
            (("Hello!", "Hello", "Hi", "Hi!", "Hello there!", "Good morning!", "Hey", "Say hello."), GREETING),
            (("Who are you?", "What are you?", "What can you do?", "Introduce yourself."), SELF),
            (("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot."), WELCOME),
        ),
    )
    return Turn("chat", pick(rng, asked), answer, "exact")
