"""What an answer is worth: from 0 (wrong) to 1 (right), by the metric an item names.

Knows questions, answers and where pictures were resized; knows no model. Every metric takes the item, the answer's text and
the receipts of the item's media, and looks at all answers that count as right.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from saccade.evals.item import Item
from saccade.grounding import Box, find_boxes, overlap
from saccade.inputs.prompt import MediaReceipt

Media = Sequence[MediaReceipt]
Metric = Callable[[Item, str, Media], float]

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
MIN_OVERLAP = 0.5  # intersection over union from which a box counts as found
VQA_VOTES = 3  # annotators who must agree for full credit

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_ARTICLES = ("a", "an", "the")


# --- text ------------------------------------------------------------------------------------------------------------


def exact(item: Item, text: str, media: Media) -> float:
    """Equal text; case, outer space and a final full stop aside."""
    return float(_plain(text) in {_plain(right) for right in _right_answers(item)})


def contains(item: Item, text: str, media: Media) -> float:
    """A right answer stands in the text as whole words, case aside."""
    words = text.casefold()
    return float(any(re.search(rf"(?<!\w){re.escape(_plain(right))}(?!\w)", words) for right in _right_answers(item)))


def anls(item: Item, text: str, media: Media) -> float:
    """Average normalised Levenshtein similarity of one answer (DocVQA, arXiv:1905.13648): 1 - distance / longer length.

    Below ANLS_THRESHOLD it counts 0. Case and repeated space aside; the best of the right answers counts.
    """
    found = _spaced(text)
    best = max(_similarity(found, _spaced(right)) for right in _right_answers(item))
    return best if best >= ANLS_THRESHOLD else 0.0


def choice(item: Item, text: str, media: Media) -> float:
    """The letter of the right choice, alone or before its text ("B", "(B)", "B. a cat", "The answer is B."), or its text.

    The item's answer is the letter; the choice's text is among `accepted`.
    """
    said = text.strip()
    letter = re.match(r"\(?([A-Za-z])\)?(?:[.:)]\s|[.:)]?$)", said) or re.search(
        r"(?i:answer(?:\s+is)?:?)\s*\(?([A-Z])\b", said
    )
    if letter is not None:
        return float(letter[1].casefold() == item.answer.strip().casefold())
    return float(_plain(said) in {_plain(right) for right in item.accepted})


def vqa(item: Item, text: str, media: Media) -> float:
    """VQAv2's soft accuracy (arXiv:1612.00837): min(1, votes / 3), averaged over leaving out each annotator in turn.

    Votes are the item's `accepted`, one per annotator, repeats included; with three or fewer, one vote suffices. Case,
    punctuation, articles and spelled-out numbers up to ten aside.
    """
    votes = [_vqa_plain(vote) for vote in item.accepted or (item.answer,)]
    said = _vqa_plain(text)
    if len(votes) <= VQA_VOTES:
        return float(said in votes)
    total = votes.count(said)
    shares = [min(1.0, (total - (vote == said)) / VQA_VOTES) for vote in votes]
    return sum(shares) / len(shares)


def _right_answers(item: Item) -> tuple[str, ...]:
    return (item.answer, *item.accepted)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def _spaced(text: str) -> str:
    return " ".join(text.split()).casefold()


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    return 1.0 if longer == 0 else 1.0 - _levenshtein(a, b) / longer


def _levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _vqa_plain(text: str) -> str:
    text = re.sub(r"['’]|(?<=\d),(?=\d)", "", text.casefold())
    text = re.sub(r"[^\w\s.]|(?<!\d)\.|\.(?!\d)", " ", text)
    kept = [word for word in text.split() if word not in _ARTICLES]
    return " ".join(str(_NUMBER_WORDS.index(word)) if word in _NUMBER_WORDS else word for word in kept)


# --- numbers ---------------------------------------------------------------------------------------------------------


def number(item: Item, text: str, media: Media) -> float:
    """The only number of the text equals the right one; "1,000", "1000." and "1e3 km" are equal."""
    found = only_number(text)
    return float(found is not None and found in {only_number(right) for right in _right_answers(item)})


def relaxed(item: Item, text: str, media: Media) -> float:
    """ChartQA's relaxed accuracy (arXiv:2203.10244): a number within 5 % of the right one; other answers exactly, as `exact`.

    "12 %" is 0.12 on both sides. A right answer of 0 has no 5 %: it must be given exactly.
    """
    return float(any(_is_close(text, right) for right in _right_answers(item)) or exact(item, text, media) > 0)


def _is_close(text: str, right: str) -> bool:
    found, wanted = _whole_number(text), _whole_number(right)
    if found is None or wanted is None or wanted == 0:
        return False
    return abs(found - wanted) <= RELAXED_TOLERANCE * abs(wanted)


def _whole_number(text: str) -> float | None:
    """The number a text is, with a currency sign, a percent sign or a final full stop at most."""
    bare = text.strip().removesuffix(".").strip().lstrip("$€£¥").strip()
    share = bare.endswith("%")
    bare = bare.removesuffix("%").strip()
    if not _NUMBER.fullmatch(bare):
        return None
    value = float(bare.replace(",", ""))
    return value / 100 if share else value


def only_number(text: str) -> float | None:
    """The number of a text that holds one and no other, else None. Digits within a word ("B12") are none."""
    found = re.findall(rf"(?<![\w.])(?:{_NUMBER.pattern})(?!\w)", text)
    if len(found) != 1:
        return None
    value = float(found[0].replace(",", ""))
    return value if math.isfinite(value) else None


# --- structure -------------------------------------------------------------------------------------------------------


def json_equality(item: Item, text: str, media: Media) -> float:
    """The same JSON value, bare or in a fence: order of keys and spelling of numbers aside, true is not 1."""
    found = _parse(text)
    return float(found is not None and found in [_parse(right) for right in _right_answers(item)])


def _parse(text: str) -> str | None:
    """A canonical spelling of the JSON in `text`, None if there is none."""
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    try:
        return json.dumps(_numbers_as_floats(json.loads(fenced[1] if fenced else text)), sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _numbers_as_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers_as_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers_as_floats(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def box(item: Item, text: str, media: Media) -> float:
    """As many boxes as the right answer has, each with intersection over union of 0.5 or more with the one it is matched to."""
    found, wanted = find_boxes(text, media), right_boxes(item, media)
    overlaps = match_boxes(found, wanted)
    return float(bool(wanted) and len(found) == len(wanted) and min(overlaps) >= MIN_OVERLAP)


def mean_overlap(item: Item, text: str, media: Media) -> float:
    """Mean intersection over union of the matched boxes; a box missing or too many counts 0. Reported beside `box`."""
    found, wanted = find_boxes(text, media), right_boxes(item, media)
    return sum(match_boxes(found, wanted)) / max(len(wanted), len(found), 1)


def asks_for_boxes(item: Item) -> bool:
    return item.metric in ("box", "picture_box")


def right_boxes(item: Item, media: Media) -> list[Box]:
    """The boxes of the right answer, which is in the pixels the model speaks in, or for `picture_box` in the picture's own."""
    if item.metric == "picture_box":
        media = [replace(receipt, model_size=receipt.original_size) for receipt in media]
    return find_boxes(item.answer, media)


def model_answer(item: Item, media: Media) -> str:
    """The right answer as a perfect model would write it: for `picture_box` with its boxes in the pixels the model speaks in."""
    if item.metric != "picture_box":
        return item.answer
    written = []
    for found in right_boxes(item, media):
        (width, height), (model_width, model_height) = (
            media[found.picture].original_size,
            media[found.picture].model_size,
        )
        scales = (model_width / width, model_height / height) * 2
        corners = [round(value * scale) for value, scale in zip(found.xyxy, scales, strict=True)]
        written.append(f'\t{{"bbox_2d": {corners}, "label": {json.dumps(found.label, ensure_ascii=False)}}}')
    return "```json\n[\n" + ",\n".join(written) + "\n]\n```"


def match_boxes(found: Sequence[Box], wanted: Sequence[Box]) -> list[float]:
    """For each wanted box the overlap with the found one it is matched to, 0 without one.

    Pairs of equal label (case aside) in one picture, the largest overlap first, each box once.
    """
    pairs = [
        (overlap(a, b), i, j)
        for i, a in enumerate(found)
        for j, b in enumerate(wanted)
        if a.picture == b.picture and a.label.casefold() == b.label.casefold()
    ]
    overlaps = [0.0] * len(wanted)
    free_found, free_wanted = set(range(len(found))), set(range(len(wanted)))
    for value, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1:])):
        if i in free_found and j in free_wanted:
            overlaps[j] = value
            free_found.remove(i)
            free_wanted.remove(j)
    return overlaps


METRICS: dict[str, Metric] = {
    "exact": exact,
    "contains": contains,
    "anls": anls,
    "choice": choice,
    "vqa": vqa,
    "number": number,
    "relaxed": relaxed,
    "json": json_equality,
    "box": box,
    "picture_box": box,
}


def score(item: Item, text: str, media: Media) -> float:
    """What the answer is worth by the item's own metric."""
    return METRICS[item.metric](item, text, media)
