"""What the model is shown for calibration: a folder of pictures, conversations in a JSONL file, or a set drawn here.

A folder's pictures are asked about in turn with a few questions; conversations are taken as they are, answers included, because
answers are what a served model writes. As captions alone starve what the model does with text (of the published int4 models,
those calibrated on captions lost most in text tasks), texts are mixed into pictures that come without conversations.
The drawn set (`drawn_samples.py`) wants no file and no network; pictures and questions of one's own task are better.
Knows files, chat templates and pixels; knows no weights.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from saccade.base.errors import MediaError, OptionError, PromptError, SaccadeError
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.options import MediaOptions
from saccade.inputs.prompt import Prompt
from saccade.quantize.drawn_samples import drawn

BUILTIN = "builtin"
NUM_BUILTIN = 48
MAX_LINES = 100_000
READ = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's names of what inputs/media.py reads
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXT_SHARE = 3  # a text for so many pictures
_MEDIA_KEYS = ("image", "video", "image_url", "video_url", "url", "path")  # whose values are or hold paths
_APART = ("image", "images", "video", "videos")  # where other tools' files have media
TURN, HEADER = "<|im_start|>", "assistant\n"

QUESTIONS = (
    "Please describe this picture in detail.",
    "What text can be read in this picture?",
    "How many objects are there, and where are they?",
    "Which colours do you see? Answer in one sentence.",
)
TEXTS = (
    ("What is 17 plus 25?", "17 plus 25 is 42."),
    (
        "Sort these words: pear, apple, fig, plum.",
        "apple, fig, pear, plum",
    ),
    (
        "Write one sentence about the sea.",
        "The sea was calm in the morning, and the boats came home before the wind rose.",
    ),
    ("Translate to French: good morning, my friend.", "Bonjour, mon ami."),
    ('Return JSON with the keys "name" and "age".', '{"name": "Ada", "age": 36}'),
    (
        "Explain why the sky is blue.",
        "Air scatters short waves of light more than long ones, so blue light reaches us from all of the sky.",
    ),
    ("Count from one to ten.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
    ("Complete the code: def add(a, b):", "    return a + b"),
    ("Sort these numbers: 8 3 5", "3 5 8"),
    ("Repeat this: 4 9 1 7", "4 9 1 7"),
    ("58 - 23 = ?", "35"),
    ("Is seven an even number?", "No, seven is an odd number."),
)


@dataclass(frozen=True)
class Samples:
    """Prompts in order; `notes` say what was passed over; `digest` is of all that the prompts are made of.

    num_answered: how many tokens at each prompt's end are an answer, the last one before it included, which calls for it.
    """

    prompts: tuple[Prompt, ...]
    num_answered: tuple[int, ...]
    notes: tuple[str, ...]
    digest: str

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


Conversation = Sequence[Mapping[str, Any]]


def load_samples(source: str, tokenizer: ChatTokenizer, count: int | None, seed: int, max_pixels: int) -> Samples:
    """`source`: a folder, a .jsonl file, or "builtin". Raises OptionError, MediaError or PromptError."""
    check_source(source)
    notes: list[str] = []
    conversations = list(_conversations(source, count, seed, notes))
    options = MediaOptions(max_pixels=max_pixels)
    prompts, num_answered = [], []
    for where, conversation in conversations:
        is_answered = conversation[-1].get("role") == "assistant"
        try:
            prompt = tokenizer.build(conversation, defaults=options, add_generation_prompt=not is_answered)
        except SaccadeError as error:
            raise type(error)(f"{where}{error}") from error
        prompts.append(prompt)
        num_answered.append(_num_answered(prompt, tokenizer) if is_answered else 0)
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr(prompt.token_ids).encode())
        for medium in prompt.media:
            digest.update(medium.key)
    return Samples(tuple(prompts), tuple(num_answered), tuple(notes), digest.hexdigest())


def _num_answered(prompt: Prompt, tokenizer: ChatTokenizer) -> int:
    """The last turn's tokens after its header, and the header's last."""
    turn = prompt.token_ids[::-1].index(tokenizer.added_tokens[TURN])  # tokens behind the last turn's start
    return turn - len(tokenizer.encode(HEADER)) + 1


def conversations_of(source: str) -> list[Conversation]:
    """All of a `source` as `load_samples` takes it. Raises OptionError, MediaError or PromptError."""
    check_source(source, "samples")
    return [conversation for _, conversation in _conversations(source, None, 0, [])]


def check_source(source: str, option: str = "calibration") -> None:
    """Raises OptionError at once, naming the option, for a source that is none."""
    path = Path(source)
    if source == BUILTIN or path.is_dir() or (path.is_file() and path.suffix == ".jsonl"):
        return
    fact = "is no folder of pictures and no .jsonl file" if path.exists() else "does not exist"
    raise OptionError(f"{option} {source!r} {fact}; give one, or {BUILTIN}")


def _conversations(source: str, count: int | None, seed: int, notes: list[str]) -> Iterator[tuple[str, Conversation]]:
    """Each with what an error about it begins with: where it stands, if no message names it."""
    if source == BUILTIN:
        yield from (("", conversation) for conversation in _drawn(NUM_BUILTIN if count is None else count, seed))
    elif Path(source).is_dir():
        pictures = _chosen(_pictures(Path(source), notes), count, seed)
        for number, path in enumerate(pictures):
            yield "", _asked(str(path), QUESTIONS[number % len(QUESTIONS)])
            if number % TEXT_SHARE == 0:
                yield "", _text(number // TEXT_SHARE)
    else:
        yield from _chosen(_lines(Path(source)), count, seed)


def _chosen(everything: Sequence[Any], count: int | None, seed: int) -> Sequence[Any]:
    """`count` of them, drawn by the seed, in their own order."""
    if count is None or count >= len(everything):
        return everything
    return [everything[i] for i in sorted(random.Random(seed).sample(range(len(everything)), count))]


def _pictures(folder: Path, notes: list[str]) -> list[Path]:
    """By name. What is no picture is passed over with a note; what says it is one and is not, refused."""
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            notes.append(f"{path.name} is not a file: passed over")
            continue
        try:
            with Image.open(path) as opened:
                kind = opened.format
            if kind in READ:
                found.append(path)
            else:
                notes.append(
                    f"{path.name} is a picture of a kind that is not read, {kind}: passed over; save it as PNG or JPEG"
                )
        except UnidentifiedImageError as error:
            if path.suffix.lower() in PICTURE_SUFFIXES:
                raise MediaError(f"{path} is not a picture that can be read; repair or remove it") from error
            notes.append(f"{path.name} is not a picture: passed over")
        except (OSError, Image.DecompressionBombError) as error:
            raise MediaError(f"{path} cannot be read: {error}") from error
    if not found:
        raise OptionError(f"{folder} holds no picture; put some into it (about 30 are advised), or use {BUILTIN}")
    return found


def _lines(path: Path) -> Sequence[tuple[str, Conversation]]:
    """Each line: {"messages": [...]} or the list alone; media paths are relative to the file."""
    conversations: list[tuple[str, Conversation]] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n")[:MAX_LINES], start=1):  # JSON's texts may hold other ends of lines
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{where} is not JSON: {error}") from error
        messages = entry.get("messages") if isinstance(entry, dict) else entry
        if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
            raise PromptError(f'{where} holds no "messages", a list of turns')
        if isinstance(entry, dict) and (apart := [key for key in entry if key in _APART]):
            raise PromptError(
                f'{where} has {apart[0]!r} beside "messages"; media stand in a turn\'s content, as '
                '{"type": "image", "image": "photo.jpg"}'
            )
        conversations.append((f"{where}: ", [_placed(turn, path.parent) for turn in messages]))
    if not conversations:
        raise OptionError(f"{path} holds no conversation")
    return conversations


def _placed(turn: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The turn with relative media paths taken from the file's folder."""
    content = turn.get("content")
    if not isinstance(content, list):
        return turn
    parts = [
        {key: _from(value, folder) if key in _MEDIA_KEYS else value for key, value in part.items()}
        if isinstance(part, dict)
        else part
        for part in content
    ]
    return {**turn, "content": parts}


def _from(value: Any, folder: Path) -> Any:
    """A path, the path in {"url": ...}, or those of a video's frames; what is no path stays."""
    if isinstance(value, list):
        return [_from(frame, folder) for frame in value]
    if isinstance(value, dict) and "url" in value:
        return {**value, "url": _from(value["url"], folder)}
    is_path = isinstance(value, str) and "://" not in value and not value.startswith("data:")
    return str(folder / value) if is_path else value


def _asked(picture: Any, question: str) -> Conversation:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def _text(number: int) -> Conversation:
    question, answer = TEXTS[number % len(TEXTS)]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _drawn(count: int, seed: int) -> Iterator[Conversation]:
    for number in range(count):
        if number % (TEXT_SHARE + 1) == TEXT_SHARE:
            yield _text(number // (TEXT_SHARE + 1))
        else:
            sample = drawn(seed * 1_000_003 + number - number // (TEXT_SHARE + 1))
            yield [*_asked(sample.picture, sample.question), {"role": "assistant", "content": sample.answer}]
