"""Training and held-out batches: scenes, questions about them, and tokens, ready for `Network`.

Every batch follows from (seed, index, split) alone, so a run can resume anywhere. Conversations about one medium are packed
as a tree: the system turn and the media stand once, and each conversation continues from there without seeing the others.
Letters: B trees, L tokens (right padded), N slices of a group, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from saccade.checkpoints.config import PreprocessingConfig, VisionConfig
from saccade.geometry import Grid, Span, token_positions
from tools.train_demo.dense import DenseTargets, dense_targets
from tools.train_demo.scenes import Clip, Scene, clip, page, picture
from tools.train_demo.tasks import CLIP_TASKS, PAIR_TASKS, PICTURE_TASKS, Turn, ask_about, chat

Kind = Literal["picture", "page", "pair", "clip"]
Split = Literal["train", "held out"]

PICTURE_SIZES = ((112, 112), (112, 140), (140, 112), (140, 140), (112, 168), (168, 112), (168, 168))
PAIR_SIZES = ((112, 112), (112, 140), (140, 112))
CLIP_SIZES = ((112, 112), (112, 140), (140, 112))
UNITS_PER_BATCH = 560  # merged units the tower sees in a picture batch; sets how many trees there are
UNITS_PER_OTHER_BATCH = 800  # these have less text beside them
BRANCH_TOKENS = 320  # tokens of conversation that grow on one tree

TEXT_SHARE = 0.55  # of pictures that hold a number or a word

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
    """token_ids, branch, is_media, is_answer: [B, L]; positions: [3, B, L]. branch: 0 the shared trunk, -1 padding.

    Trees without media come last, so the groups' slices fill the media places in order.
    """

    kind: Kind
    groups: tuple[MediaGroup, ...]
    token_ids: Tensor
    positions: Tensor
    branch: Tensor
    is_media: Tensor
    is_answer: Tensor
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

    def tree(
        self, media: Sequence[tuple[Grid, float]], conversations: Sequence[Sequence[Turn]], before: str = ""
    ) -> _Tree:
        """media: grids with seconds per grid (0: a picture). `before` is text between the user header and the media."""
        ids, spans = self.encode(SYSTEM + before), []
        for grid, second_per_grid in media:
            ids.append(self.start)
            spans.append(Span(len(ids), grid, second_per_grid))
            ids += [self.video_pad if second_per_grid else self.image_pad] * grid.num_tokens(2)
            ids.append(self.end)
        tree = _Tree(ids, [0] * len(ids), [False] * len(ids), spans, [])
        for number, turns in enumerate(conversations, 1):
            for index, turn in enumerate(turns):
                question = "" if before else turn.question
                asked = self.encode((ASK_AGAIN if index else "") + question + ASK)
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

    def batch(self, kind: Kind, groups: tuple[MediaGroup, ...], trees: Sequence[_Tree]) -> Batch:
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
        return Batch(kind, groups, token_ids, positions, branch, is_media, is_answer, questions)


# --- drawing batches -------------------------------------------------------------------------------------------------


class BatchSource:
    """Batch `index` of a split. Held-out scenes differ by seed and hold combinations never drawn for training."""

    def __init__(self, packer: Packer, seed: int, split: Split) -> None:
        self.packer = packer
        self.seed = seed
        self.held_out = split == "held out"

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, int(self.held_out), index))

    def __call__(self, kind: Kind, index: int) -> Batch:
        rng = self.rng(index)
        if kind == "picture":
            return self.pictures(rng)
        if kind == "page":
            return self.pages(rng)
        if kind == "pair":
            return self.pairs(rng)
        return self.clips(rng)

    def pictures(self, rng: np.random.Generator) -> Batch:
        weights = np.asarray([(112 * 112 / (h * w)) ** 0.8 for h, w in PICTURE_SIZES])
        height, width = PICTURE_SIZES[int(rng.choice(len(PICTURE_SIZES), p=weights / weights.sum()))]
        count = UNITS_PER_BATCH * 784 // (height * width)
        scenes = [self.picture(rng, height, width) for _ in range(count)]
        grid = Grid(1, height // 14, width // 14)
        trees = [self._grow(rng, [(grid, 0.0)], scene, PICTURE_TASKS) for scene in scenes]
        trees.append(self.packer.tree([], [[chat(rng)] for _ in range(7)]))
        return self.packer.batch("picture", (_picture_group(scenes),), trees)

    def picture(self, rng: np.random.Generator, height: int, width: int) -> Scene:
        return picture(rng, height, width, text_share=TEXT_SHARE, held_out=self.held_out)

    def pages(self, rng: np.random.Generator) -> Batch:
        """Pages for the dense targets only; the conversation beside them is small talk."""
        height, width = (int(28 * rng.integers(5, 9)) for _ in range(2))
        scenes = [page(rng, height, width) for _ in range(UNITS_PER_OTHER_BATCH * 784 // (height * width))]
        small_talk = [self.packer.tree([], [[chat(rng)] for _ in range(4)]) for _ in range(2)]
        return self.packer.batch("page", (_picture_group(scenes),), small_talk)

    def pairs(self, rng: np.random.Generator) -> Batch:
        sizes = [PAIR_SIZES[int(rng.integers(len(PAIR_SIZES)))] for _ in range(2)]
        count = UNITS_PER_OTHER_BATCH * 784 // sum(h * w for h, w in sizes) * 2 // 3
        sides = [[self.picture(rng, h, w) for _ in range(count)] for h, w in sizes]
        media = [(Grid(1, h // 14, w // 14), 0.0) for h, w in sizes]
        trees = [self._grow(rng, media, (a, b), PAIR_TASKS) for a, b in zip(*sides, strict=True)]
        return self.packer.batch("pair", tuple(_picture_group(side) for side in sides), trees)

    def clips(self, rng: np.random.Generator) -> Batch:
        height, width = CLIP_SIZES[int(rng.integers(len(CLIP_SIZES)))]
        num_frames = int(rng.choice([4, 6]))
        count = max(2, UNITS_PER_OTHER_BATCH * 784 // (height * width * num_frames // 2))
        clips = [clip(rng, height, width, num_frames, held_out=self.held_out) for _ in range(count)]
        trees = []
        for one in clips:
            grid = Grid(num_frames // 2, height // 14, width // 14)
            trees.append(self._grow(rng, [(grid, one.second_per_grid)], one, CLIP_TASKS))
        return self.packer.batch("clip", (_clip_group(clips),), trees)

    def _grow(self, rng: np.random.Generator, media: list[tuple[Grid, float]], subject: object, tasks: tuple) -> _Tree:  # type: ignore[type-arg]
        """Conversations about the subject, mostly of one turn, until the tree is full; one tree in twenty asks before it shows."""
        if rng.random() < 0.05:
            turn = ask_about(rng, subject, tasks)
            return self.packer.tree(media, [[turn]], before=turn.question)
        conversations: list[list[Turn]] = []
        room = BRANCH_TOKENS
        while room > 0:
            turns = [ask_about(rng, subject, tasks) for _ in range(int(rng.choice([1, 2, 3], p=[0.8, 0.12, 0.08])))]
            conversations.append(turns)
            room -= sum(
                8 + (len(turn.question) + len(turn.answer)) // (2 if turn.task == "box" else 4) for turn in turns
            )
        return self.packer.tree(media, conversations)


def _picture_group(scenes: Sequence[Scene]) -> MediaGroup:
    frames = (
        torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).unsqueeze(1).contiguous()
    )
    return MediaGroup(frames, 1, dense_targets([scene.items for scene in scenes], *frames.shape[-2:]))


def _clip_group(clips: Sequence[Clip]) -> MediaGroup:
    frames = torch.from_numpy(np.concatenate([one.frames for one in clips])).permute(0, 3, 1, 2)
    frames = frames.unflatten(0, (-1, 2)).contiguous()
    shown = [items for one in clips for items in one.items[1::2]]  # a slice is judged by its second frame
    return MediaGroup(frames, len(clips[0].items) // 2, dense_targets(shown, *frames.shape[-2:]))


OTHERS: tuple[Kind, ...] = ("picture", "clip", "page", "picture", "pair", "clip", "picture", "page", "clip", "pair")


def training_batches(source: BatchSource, first_step: int, rank: int) -> Iterator[Batch]:
    """One of a step's two batches: rank 0 gets pictures every time, rank 1 the other kinds in turn."""
    step = first_step
    while True:
        yield source(OTHERS[step % len(OTHERS)] if rank else "picture", 2 * step + rank)
        step += 1
