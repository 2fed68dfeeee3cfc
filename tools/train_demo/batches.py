"""Training and held-out batches: subjects of the tasks, questions about them, and tokens, ready for `Network`.

Every batch follows from (seed, index, split) and the tasks' weights, so a run can resume anywhere. Conversations about one
subject are packed as a tree: the system turn and the media stand once, and each conversation continues from there without seeing
the others. Letters: B trees, L tokens (right padded), N slices of a group, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from saccade.checkpoints.config import PreprocessingConfig, VisionConfig
from saccade.evals.questions import Turn
from saccade.evals.scenes import Clip, Scene, page
from saccade.evals.tasks import MEDIA, TASKS, Subject, ask, draw_medium, tasks_about
from saccade.geometry import Grid, Span, token_positions
from tools.train_demo.dense import DenseTargets, dense_targets
from tools.train_demo.talk import chat, describe

UNITS_PER_BATCH = 480  # merged units the tower sees in a batch; sets how many trees there are
BRANCH_TOKENS = 110  # tokens of conversation that grow on one tree
TEXT_TREES = 4  # without media, in every batch
DESCRIBED = ("shapes", "appearing", "moving")  # media that are described, beside their tasks
EASY_SHARE = 0.3  # of the batches and text turns whose task has a harder kind, those that are of the easier
PAGE = "page"  # pages of text for the dense heads alone

# How much of each task there is at the start; training follows the errors from there (`train.Balance`).
START_WEIGHTS: dict[str, float] = {
    **dict.fromkeys(TASKS, 1.0),
    "form": 2.5,
    "chart": 2.5,
    "when": 2.5,
    "direction": 2.0,
    "words": 1.5,
    "table": 1.0,
    "sum": 2.0,
    "copy": 2.0,
    "describe": 0.5,
    "chat": 0.15,
    PAGE: 0.5,
}
TOKEN_WEIGHTS = {
    "box": 0.5,
    "describe": 0.5,
    "copy": 0.3,
    "sort": 0.2,
    "sum": 0.5,
    "chat": 0.1,
}  # of every answer token of the task; 1 for others

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASK = "<|im_end|>\n<|im_start|>assistant\n"
ASK_AGAIN = "\n<|im_start|>user\n"


@dataclass(frozen=True)
class MediaGroup:
    """Slices of one size. frames: [N, 2, 3, H, W] uint8, or [N, 1, 3, H, W] for pictures; N = B' trees x slices_per_tree."""

    frames: Tensor
    slices_per_tree: int
    dense: DenseTargets

    @property
    def grid(self) -> tuple[int, int]:
        return self.frames.shape[-2] // 14, self.frames.shape[-1] // 14


@dataclass(frozen=True)
class Question:
    """A turn's place in the batch: its answer tokens (with the closing one) are token_ids[row, start:end]."""

    turn: Turn
    row: int
    start: int
    end: int


@dataclass(frozen=True)
class Batch:
    """token_ids, branch, is_media, is_answer, token_weights: [B, L]; positions: [3, B, L]. branch: 0 the shared trunk, -1
    padding. token_weights: of the tokens' losses.

    Trees without media come last, so the groups' slices fill the media places in order.
    """

    kind: str
    groups: tuple[MediaGroup, ...]
    token_ids: Tensor
    positions: Tensor
    branch: Tensor
    is_media: Tensor
    is_answer: Tensor
    token_weights: Tensor
    questions: tuple[Question, ...]

    def attention_bias(self) -> Tensor:
        """[B, 1, L, L] float32: 0 towards the trunk and the earlier tokens of the own branch, else -inf."""
        same = (self.branch[:, :, None] == self.branch[:, None, :]) | (self.branch[:, None, :] == 0)
        length = self.branch.shape[1]
        allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
        return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf")).unsqueeze(1)


def patch_rows(frames: Tensor, vision: VisionConfig, preprocessing: PreprocessingConfig) -> Tensor:
    """frames: [N, 2, 3, H, W] uint8, or [N, 1, ...] for a picture, shown twice. Returns [N, P, 1176] float32 in block order."""
    count, _, channels, height, width = frames.shape
    mean = torch.tensor(preprocessing.image_mean).view(3, 1, 1)
    std = torch.tensor(preprocessing.image_std).view(3, 1, 1)
    x = ((frames.float() / 255 - mean) / std).expand(-1, vision.temporal_patch_size, -1, -1, -1)
    p, m, f = vision.patch_size, vision.spatial_merge_size, vision.factor
    x = x.reshape(count, vision.temporal_patch_size, channels, height // f, m, p, width // f, m, p)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(count, -1, vision.patch_values)


# --- trees of tokens -------------------------------------------------------------------------------------------------


@dataclass
class _Tree:
    token_ids: list[int]
    branch: list[int]
    is_answer: list[bool]
    spans: list[Span]
    questions: list[tuple[Turn, int, int]]


class Packer:
    """Turns conversations into token trees."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_second: float) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_second = tokens_per_second
        self.image_pad, self.video_pad, self.start, self.end = (
            tokenizer.token_to_id(t) for t in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def tree(self, media: Sequence[tuple[Grid, float]], conversations: Sequence[Sequence[Turn]]) -> _Tree:
        """media: grids with seconds per grid (0: a picture)."""
        ids, spans = self.encode(SYSTEM), []
        for grid, second_per_grid in media:
            ids.append(self.start)
            spans.append(Span(len(ids), grid, second_per_grid))
            ids += [self.video_pad if second_per_grid else self.image_pad] * grid.num_tokens(2)
            ids.append(self.end)
        tree = _Tree(ids, [0] * len(ids), [False] * len(ids), spans, [])
        for number, turns in enumerate(conversations, 1):
            for index, turn in enumerate(turns):
                asked = self.encode((ASK_AGAIN if index else "") + turn.question + ASK)
                answer = self.encode(turn.answer + "<|im_end|>")
                start = len(tree.token_ids) + len(asked)
                tree.questions.append((turn, start, start + len(answer)))
                tree.token_ids += asked + answer
                tree.is_answer += [False] * len(asked) + [True] * len(answer)
                tree.branch += [number] * (len(asked) + len(answer))
        return tree

    def positions(self, tree: _Tree) -> Tensor:
        """[3, L]: the trunk's, then each branch counting on from the trunk's end."""
        trunk_length = tree.branch.count(0)
        trunk, following = token_positions(trunk_length, tree.spans, 2, self.tokens_per_second)
        branches = torch.tensor(tree.branch[trunk_length:], dtype=torch.int64)
        starts = torch.searchsorted(branches, branches)  # index of each branch's first token
        offsets = torch.arange(len(branches)) - starts + following
        return torch.cat([trunk, offsets.expand(3, -1)], dim=1)

    def batch(self, kind: str, groups: tuple[MediaGroup, ...], trees: Sequence[_Tree]) -> Batch:
        shape = (len(trees), max(len(t.token_ids) for t in trees))
        token_ids, branch = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
        is_answer, is_media = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        positions = torch.zeros((3, *shape), dtype=torch.int64)
        for row, tree in enumerate(trees):
            length = len(tree.token_ids)
            token_ids[row, :length] = torch.tensor(tree.token_ids)
            branch[row, :length] = torch.tensor(tree.branch)
            is_answer[row, :length] = torch.tensor(tree.is_answer)
            positions[:, row, :length] = self.positions(tree)
            for span in tree.spans:
                is_media[row, span.start : span.start + span.grid.num_tokens(2)] = True
        questions = tuple(Question(turn, row, a, b) for row, tree in enumerate(trees) for turn, a, b in tree.questions)
        token_weights = torch.ones(shape)
        for q in questions:
            token_weights[q.row, q.start : q.end] = TOKEN_WEIGHTS.get(q.turn.task, 1.0)
        return Batch(kind, groups, token_ids, positions, branch, is_media, is_answer, token_weights, questions)


# --- drawing batches -------------------------------------------------------------------------------------------------


class BatchSource:
    """Batches of a split, each of one medium; `weights()` gives the tasks' at the time."""

    def __init__(self, packer: Packer, seed: int, weights: Callable[[], Mapping[str, float]], *, test: bool) -> None:
        self.packer, self.seed, self.weights, self.test = packer, seed, weights, test

    def __call__(self, index: int, kind: str | None = None) -> Batch:
        """Batch `index`, of a medium by the tasks' weights or of the given one."""
        rng = np.random.default_rng((self.seed, int(self.test), index))
        weights = self.weights()
        if kind is None:
            # A batch of a medium with several tasks teaches them all: it need not come as often as they together.
            shares = {medium: sum(weights[task] for task in tasks_about(medium)) ** 0.5 for medium in MEDIA}
            kind = _choose(rng, {**shares, PAGE: weights[PAGE]})
        if kind == PAGE:
            groups, trees = self._pages(rng), []
        else:
            groups, trees = self._media(rng, kind, weights)
        text = {task: weights[task] for task in (*tasks_about(None), "chat")}
        trees += [self.packer.tree([], self._conversations(rng, None, text)) for _ in range(TEXT_TREES)]
        return self.packer.batch(kind, groups, trees)

    def _media(
        self, rng: np.random.Generator, kind: str, weights: Mapping[str, float]
    ) -> tuple[tuple[MediaGroup, ...], list[_Tree]]:
        sizes = MEDIA[kind].sizes if rng.random() < EASY_SHARE else MEDIA[kind].large or MEDIA[kind].sizes
        size = sizes[int(rng.integers(len(sizes)))]
        height, width = size[:2]
        slices = size[2] // 2 if len(size) > 2 else 1 + (kind == "pair")
        count = max(2, UNITS_PER_BATCH * 784 // (height * width * slices))
        subjects = [draw_medium(kind, rng, size, test=self.test) for _ in range(count)]
        shares = {task: weights[task] for task in tasks_about(kind)}
        if kind in DESCRIBED:
            shares["describe"] = weights["describe"]
        trees = [self.packer.tree(_grids(subject), self._conversations(rng, subject, shares)) for subject in subjects]
        if isinstance(subjects[0], Clip):
            return (_clip_group([one for one in subjects if isinstance(one, Clip)]),), trees
        return tuple(_picture_group(side) for side in zip(*subjects, strict=True)), trees  # type: ignore[arg-type]

    def _pages(self, rng: np.random.Generator) -> tuple[MediaGroup, ...]:
        height, width = (int(28 * rng.integers(5, 9)) for _ in range(2))
        return (_picture_group([page(rng, height, width) for _ in range(UNITS_PER_BATCH * 784 // (height * width))]),)

    def _conversations(
        self, rng: np.random.Generator, subject: Subject | None, shares: Mapping[str, float]
    ) -> list[list[Turn]]:
        """Different questions about the subject, each a conversation of its own, until the tree is full or they repeat."""
        turns: dict[str, Turn] = {}
        room, tries = BRANCH_TOKENS, 24
        while room > 0 and tries > 0:
            tries -= 1
            turn = self._turn(rng, subject, _choose(rng, shares))
            if turn is None:
                continue
            key = turn.task if turn.task == "describe" else turn.question  # one description is enough
            if key not in turns:
                turns[key] = turn
                room -= len(self.packer.encode(turn.question + turn.answer)) + 6
        return [[turn] for turn in turns.values()]

    def _turn(self, rng: np.random.Generator, subject: Subject | None, task: str) -> Turn | None:
        if task == "chat":
            return chat(rng)
        if task == "describe":
            return None if subject is None else describe(rng, subject)
        return ask(task, rng, subject, test=self.test, hard=rng.random() >= EASY_SHARE)


def _choose(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    values = np.asarray(list(shares.values()))
    return list(shares)[int(rng.choice(len(values), p=values / values.sum()))]


def _grids(subject: Subject) -> list[tuple[Grid, float]]:
    if isinstance(subject, Clip):
        frames, height, width = subject.frames.shape[:3]
        return [(Grid(frames // 2, height // 14, width // 14), 1.0)]
    return [(Grid(1, scene.pixels.shape[0] // 14, scene.pixels.shape[1] // 14), 0.0) for scene in subject]


def _picture_group(scenes: Sequence[Scene]) -> MediaGroup:
    frames = (
        torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).unsqueeze(1).contiguous()
    )
    return MediaGroup(frames, 1, dense_targets([scene.things for scene in scenes], *frames.shape[-2:]))


def _clip_group(clips: Sequence[Clip]) -> MediaGroup:
    frames = torch.from_numpy(np.concatenate([one.frames for one in clips])).permute(0, 3, 1, 2)
    frames = frames.unflatten(0, (-1, 2)).contiguous()
    shown = [things for one in clips for things in one.things[1::2]]  # a slice is judged by its second frame
    return MediaGroup(frames, len(clips[0].things) // 2, dense_targets(shown, *frames.shape[-2:]))


def training_batches(source: BatchSource, first_step: int, rank: int, workers: int) -> Iterator[Batch]:
    """A worker's batch of every step."""
    step = first_step
    while True:
        yield source(workers * step + rank)
        step += 1
