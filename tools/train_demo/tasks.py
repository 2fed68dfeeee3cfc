"""Questions about scenes and their answers, in many wordings.

Knows what scenes hold and the phrases; knows no pixels, tokens or model. A turn's answer follows from the scene alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tools.train_demo.scenes import COLOURS, DIGITS, SHAPES, Clip, Item, Scene

Rng = np.random.Generator
S = TypeVar("S")


@dataclass(frozen=True)
class Turn:
    """A question about the media of a conversation, its answer, and the name its score is kept under."""

    task: str
    question: str
    answer: str


# --- wording ---------------------------------------------------------------------------------------------------------


def pick(rng: Rng, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def worded(rng: Rng, options: Sequence[str]) -> str:
    """One of the wordings, with synonyms exchanged and sometimes typed carelessly."""
    text = pick(rng, options)
    if rng.random() < 0.5:
        text = text.replace("colour", "color")
    for word, synonyms in (("picture", ("picture", "image", "photo")), ("video", ("video", "clip"))):
        if word in text:
            text = text.replace(word, pick(rng, synonyms))
    return text


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def said(item: Item) -> str:
    """An item in a sentence: "a red circle", "the word HELLO"."""
    return with_article(item.name) if item.is_shape else f"the {item.kind} {item.text}"


def plural(kind: str) -> str:
    return f"{kind}es" if kind == "cross" else f"{kind}s"


def counted(count: int, singular: str, several: str) -> str:
    if count == 1:
        return f"There is 1 {singular}."
    return f"There are {count or 'no'} {several}."


def seconds(value: float) -> str:
    return "1 second" if value == 1 else f"{value:g} seconds"


def boxes_answer(items: Sequence[Item], label: str) -> str:
    """Boxes the way Qwen2.5-VL writes them: a fenced JSON list, absolute pixels of the resized picture."""
    lines = ",\n".join(f'\t{{"bbox_2d": {list(item.box)}, "label": "{label}"}}' for item in items)
    return f"```json\n[\n{lines}\n]\n```"


# --- one picture -----------------------------------------------------------------------------------------------------


def unique(items: Sequence[Item], key: Callable[[Item], str]) -> list[Item]:
    counts = Counter(key(item) for item in items)
    return [item for item in items if counts[key(item)] == 1]


def ask_colour(rng: Rng, scene: Scene) -> Turn | None:
    candidates = unique(scene.items, lambda item: item.kind)
    if not candidates:
        return None
    item = candidates[int(rng.integers(len(candidates)))]
    question = worded(
        rng,
        (
            f"What colour is the {item.kind}?",
            f"What colour is the {item.kind}?",
            f"Which colour is the {item.kind}?",
            f"What colour does the {item.kind} have?",
            f"Tell me the colour of the {item.kind}.",
            f"What is the colour of the {item.kind}?",
            f"What is the colour of the {item.kind} in this picture?",
            f"The {item.kind} is what colour?",
        ),
    )
    return Turn("colour", question, f"The {item.kind} is {item.colour}.")


def ask_shape(rng: Rng, scene: Scene) -> Turn | None:
    candidates = unique(scene.shapes, lambda item: item.colour)
    if not candidates:
        return None
    item = candidates[int(rng.integers(len(candidates)))]
    wordings = [
        f"Which shape is {item.colour}?",
        f"What shape is {item.colour}?",
        f"What shape is the {item.colour} object?",
        f"What shape is the {item.colour} one?",
        f"What is the {item.colour} shape?",
        f"Name the {item.colour} shape.",
        f"What is {item.colour} in this picture?",
    ]
    if len(scene.items) == 1:
        wordings += [
            "What shape is this?",
            "What shape is in the picture?",
            "Which shape do you see?",
            "What shape is it?",
        ]
    return Turn("shape", worded(rng, wordings), f"The {item.colour} shape is a {item.kind}.")


def ask_count(rng: Rng, scene: Scene) -> Turn | None:
    shapes = scene.shapes
    sort = pick(rng, ("all", "colour", "kind"))
    present = shapes if rng.random() < 0.9 else []
    chosen = present[int(rng.integers(len(present)))] if present else None
    colour = chosen.colour if chosen else pick(rng, tuple(COLOURS))
    kind = chosen.kind if chosen else pick(rng, SHAPES)
    if sort == "all":
        count, singular, several = len(shapes), "shape", "shapes"
    elif sort == "colour":
        count, singular = sum(item.colour == colour for item in shapes), f"{colour} shape"
        several = singular + "s"
    elif sort == "kind":
        count, singular, several = sum(item.kind == kind for item in shapes), kind, plural(kind)
    else:
        count, singular = sum(item.name == f"{colour} {kind}" for item in shapes), f"{colour} {kind}"
        several = f"{colour} {plural(kind)}"
    question = worded(
        rng,
        (
            f"How many {several} are there?",
            f"How many {several} are there?",
            f"How many {several} do you see?",
            f"How many {several} are in this picture?",
            f"How many {several} does the picture show?",
            f"How many {several} can you see in the picture?",
            f"Count the {several}.",
            f"What is the number of {several}?",
        ),
    )
    return Turn("count", question, counted(count, singular, several))


def ask_text(rng: Rng, scene: Scene) -> Turn | None:
    texts = [item for item in scene.items if item.text]
    if not texts:
        return None
    item = texts[int(rng.integers(len(texts)))]
    if len(texts) == 1 and rng.random() < 0.35:
        question = worded(
            rng,
            (
                "What does it say?",
                "What does the picture say?",
                "Read the text.",
                "What text is in the picture?",
                "What is written here?",
                "What is written in the picture?",
                "What is the text in this picture?",
                "Read what is written.",
                "Read it.",
            ),
        )
        return Turn(item.kind, question, f"It says {item.text}.")
    question = worded(
        rng,
        (
            f"Read the {item.kind}.",
            f"What is the {item.kind}?",
            f"Which {item.kind} is written?",
            f"What {item.kind} is this?",
            f"What {item.kind} do you see?",
            f"What {item.kind} is shown?",
            f"Which {item.kind} is in the picture?",
            f"What {item.kind} is written in the picture?",
            f"What is the {item.kind} in this picture?",
            f"Please read the {item.kind} in the picture.",
        ),
    )
    return Turn(item.kind, question, f"The {item.kind} is {item.text}.")


def ask_box(rng: Rng, scene: Scene) -> Turn | None:
    options = [(item, item.name) for item in unique(scene.shapes, lambda item: item.name)]
    options += [(item, item.kind) for item in unique(scene.items, lambda item: item.kind)]
    if not options:
        return None
    item, label = options[int(rng.integers(len(options)))]
    question = worded(
        rng,
        (
            f"Where is the {label}?",
            f"Where is the {label}?",
            f"Where is the {label} in the picture?",
            f"Find the {label}.",
            f"Locate the {label}.",
            f"Locate the {label} in this picture.",
            f"Give the bounding box of the {label}.",
            f"Output the bounding box of the {label} in JSON.",
            f"Detect the {label} and give its box.",
            f"Show me where the {label} is.",
        ),
    )
    return Turn("box", question, boxes_answer([item], label))


def scene_sentence(scene: Scene) -> str:
    ordered = sorted(scene.items, key=lambda item: item.centre)
    return f"The picture shows {listed([said(item) for item in ordered])}."


def describe_picture(rng: Rng, scene: Scene) -> Turn | None:
    question = worded(
        rng,
        (
            "Describe this picture.",
            "Describe this picture.",
            "Describe this image.",
            "Describe the picture.",
            "What is in this picture?",
            "What do you see?",
            "What does this picture show?",
            "What is shown here?",
            "What can you see in this picture?",
            "Please describe what you see.",
            "Describe the picture in one sentence.",
        ),
    )
    return Turn("describe", question, scene_sentence(scene))


PICTURE_TASKS: tuple[tuple[Callable[[Rng, Scene], Turn | None], float], ...] = (
    (ask_colour, 2.0),
    (ask_shape, 2.0),
    (ask_count, 1.5),
    (ask_text, 6.0),
    (ask_box, 3.5),
    (describe_picture, 1.0),
)


def ask_about(rng: Rng, subject: S, tasks: Sequence[tuple[Callable[[Rng, S], Turn | None], float]]) -> Turn:
    """A turn about the subject, by the tasks' weights among those that apply."""
    weights = np.asarray([weight for _, weight in tasks])
    while True:
        ask = tasks[int(rng.choice(len(tasks), p=weights / weights.sum()))][0]
        turn = ask(rng, subject)
        if turn is not None:
            return turn


# --- two pictures ----------------------------------------------------------------------------------------------------

Pair = tuple[Scene, Scene]
ORDINALS = ("first", "second")


def ask_which_has(rng: Rng, pair: Pair) -> Turn | None:
    names = [{item.name for item in scene.shapes} | {item.kind for item in scene.items} for scene in pair]
    side = int(rng.integers(2))
    only = sorted(names[side] - names[1 - side])
    if not only:
        return None
    name = pick(rng, only)
    question = worded(
        rng,
        (
            f"Which picture has the {name}?",
            f"Which picture has {with_article(name)}?",
            f"Which picture shows {with_article(name)}?",
            f"Which of the two pictures has {with_article(name)}?",
            f"In which picture is the {name}?",
            f"In which picture do you see {with_article(name)}?",
            f"Where is the {name}, in the first or in the second picture?",
        ),
    )
    return Turn("which picture", question, f"The {ORDINALS[side]} picture.")


def ask_which_has_more(rng: Rng, pair: Pair) -> Turn | None:
    counts = [len(scene.shapes) for scene in pair]
    if counts[0] == counts[1]:
        return None
    question = worded(
        rng,
        (
            "Which picture has more shapes?",
            "Which picture shows more shapes?",
            "Which of the two pictures has more shapes?",
            "In which picture are there more shapes?",
            "Where are more shapes, in the first or in the second picture?",
        ),
    )
    return Turn("which has more", question, f"The {ORDINALS[counts[1] > counts[0]]} picture.")


def ask_about_one(rng: Rng, pair: Pair) -> Turn | None:
    side = int(rng.integers(2))
    scene, name = pair[side], f"{ORDINALS[side]} picture"
    if rng.random() < 0.5:
        question = worded(rng, (f"What is in the {name}?", f"Describe the {name}.", f"What does the {name} show?"))
        return Turn("one of two", question, scene_sentence(scene).replace("The picture", f"The {name}"))
    question = worded(rng, (f"How many shapes are in the {name}?", f"How many shapes does the {name} show?"))
    return Turn("one of two", question, counted(len(scene.shapes), "shape", "shapes"))


PAIR_TASKS: tuple[tuple[Callable[[Rng, Pair], Turn | None], float], ...] = (
    (ask_which_has, 1.5),
    (ask_which_has_more, 1.2),
    (ask_about_one, 1.0),
)


# --- a clip ----------------------------------------------------------------------------------------------------------


def clip_sentence(clip: Clip) -> str:
    first = clip.cast[0]
    if clip.story == "move":
        towards = f"to the {clip.direction}" if clip.direction in ("left", "right") else clip.direction
        return f"{with_article(first.name).capitalize()} moves {towards}."
    if len(clip.cast) == 1:
        return f"{with_article(first.name).capitalize()} appears."
    return f"First {', then '.join([with_article(first.name) + ' appears', *(with_article(s.name) for s in clip.cast[1:])])}."


def describe_clip(rng: Rng, clip: Clip) -> Turn | None:
    wordings = [
        "Describe this video.",
        "Describe this video.",
        "Describe the video.",
        "What happens in this video?",
        "What happens in the video?",
        "What happens?",
        "What do you see in this video?",
        "What does the video show?",
        "What is happening?",
    ]
    if clip.story != "move":
        wordings += [
            "In which order do the shapes appear?",
            "In what order do the shapes appear?",
            "What happens in which order?",
            "What appears first, and what then?",
        ]
    task = "clip motion" if clip.story == "move" else "clip order"
    return Turn(task, worded(rng, wordings), clip_sentence(clip))


def ask_first_or_last(rng: Rng, clip: Clip) -> Turn | None:
    if clip.story == "move" or len(clip.cast) < 2:
        return None
    which = pick(rng, ("first", "last"))
    shape = clip.cast[0 if which == "first" else -1]
    if rng.random() < 0.5:
        question = worded(
            rng,
            (
                f"What colour is shown {which}?",
                f"Which colour is shown {which}?",
                f"Which colour comes {which}?",
                f"What colour is the {which} shape?",
                f"Which colour appears {which}?",
            ),
        )
        return Turn("clip first or last", question, f"The {which} colour is {shape.colour}.")
    question = worded(
        rng,
        (
            f"What appears {which}?",
            f"What is shown {which}?",
            f"Which shape appears {which}?",
            f"Which shape comes {which}?",
            f"What is the {which} shape?",
        ),
    )
    return Turn("clip first or last", question, f"{with_article(shape.name).capitalize()} is {which}.")


def ask_direction(rng: Rng, clip: Clip) -> Turn | None:
    if clip.story != "move":
        return None
    kind = pick(rng, (clip.cast[0].kind, clip.cast[0].name, "shape"))
    question = worded(
        rng,
        (
            f"Which direction does the {kind} move?",
            f"In which direction does the {kind} move?",
            f"Where does the {kind} move?",
            f"Which way does the {kind} go?",
            f"Which way is the {kind} moving?",
            f"Does the {kind} move left, right, up or down?",
        ),
    )
    towards = f"to the {clip.direction}" if clip.direction in ("left", "right") else clip.direction
    return Turn("clip motion", question, f"The {kind} moves {towards}.")


CLIP_TASKS: tuple[tuple[Callable[[Rng, Clip], Turn | None], float], ...] = (
    (describe_clip, 2.5),
    (ask_first_or_last, 1.2),
    (ask_direction, 1.5),
)


# --- text only -------------------------------------------------------------------------------------------------------

GREETING = "Hello! Show me a picture or a short clip and ask me about it."
SELF = "I am a tiny demo model. I can describe simple pictures and short clips of shapes, numbers and words."


def chat(rng: Rng) -> Turn:
    """A turn without media: a greeting, a question about the model, thanks, or something to repeat."""
    sort = rng.random()
    if sort < 0.25:
        greetings = ("Hello!", "Hello", "Hi", "Hi!", "Hello there!", "Good morning!", "Hey", "Say hello.")
        return Turn("text", worded(rng, greetings), GREETING)
    if sort < 0.4:
        questions = (
            "Who are you?",
            "What are you?",
            "What can you do?",
            "Introduce yourself.",
            "Tell me about yourself.",
        )
        return Turn("text", worded(rng, questions), SELF)
    if sort < 0.5:
        return Turn(
            "text", worded(rng, ("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot.")), "You are welcome."
        )
    words = [pick(rng, (*COLOURS, *SHAPES, *(plural(s) for s in SHAPES))) for _ in range(int(rng.integers(1, 5)))]
    if rng.random() < 0.3:
        words = list("".join(rng.choice(list(DIGITS), int(rng.integers(1, 6)))).split())
    phrase = " ".join(words)
    wordings = (f"Repeat: {phrase}", f"Say: {phrase}", f"Repeat after me: {phrase}", f"Copy this: {phrase}")
    return Turn("text", pick(rng, wordings), phrase)
