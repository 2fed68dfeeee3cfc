"""Runs a step: the tower for media not embedded yet, the decoder over the paged cache, logits. Decides nothing."""

from __future__ import annotations

import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from saccade.base.errors import DeviceError
from saccade.base.meter import give_back_memory
from saccade.engine.batch import Batch, Placement
from saccade.engine.device_sampling import Draw
from saccade.engine.graphs import Cuda, DecodeGraphs
from saccade.engine.sampling import Sampler
from saccade.inputs.pixels import patches
from saccade.inputs.prompt import Medium
from saccade.kernels.record import KV_SCALE_BYTES, Kernels, PagedLayout
from saccade.model.language import rotary_angles
from saccade.model.qwen2_5_vl import Qwen2_5_VL

PATCHES_AT_ONCE = 8192  # of small media that go through the tower together
STEP_REMEDY = (
    "compute less at once: --max-tokens-per-step 512, smaller pictures (--max-pixels), a smaller --kv-cache-tokens"
)
LOGIT_TILE = 64  # rows whose float32 logits over the whole vocabulary are held at once


class PagedCache:
    """Keys and values of all layers in blocks, and the attention over them for the step in hand."""

    def __init__(self, model: Qwen2_5_VL, num_blocks: int, block_size: int, is_int8: bool = False) -> None:
        text = model.config.text
        row = text.head_dim + (KV_SCALE_BYTES if is_int8 else 0)
        shape = (text.num_layers, 2, num_blocks, block_size, model.num_kv_heads, row)
        self.blocks = torch.empty(shape, dtype=torch.int8 if is_int8 else model.dtype, device=model.device)
        self.kernels: Kernels = model.kernels
        self.layout: PagedLayout | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.layout is not None, "no step in hand"
        k_cache, v_cache = self.blocks[layer]
        self.kernels.store_kv(k, v, k_cache, v_cache, self.layout)
        return self.kernels.attention_paged(q, k_cache, v_cache, self.layout, q.shape[-1] ** -0.5)


class EncoderCache:
    """Vision features by content, least recently used thrown out first, bounded in bytes (the newest always stays)."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
        return features

    def put(self, key: bytes, features: Tensor) -> None:
        self._features[key] = features
        self.size_bytes += features.nbytes
        while self.size_bytes > self.max_bytes and len(self._features) > 1:
            _, oldest = self._features.popitem(last=False)
            self.size_bytes -= oldest.nbytes

    def clear(self) -> None:
        self._features.clear()
        self.size_bytes = 0


@dataclass(frozen=True)
class VisionTimes:
    preprocessing_s: float
    vision_s: float


@contextmanager
def within_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Raises DeviceError with the remedy where a GPU's memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = str(error).partition("\n")[0]
        raise DeviceError(f"{device} has not enough memory left ({told}); {remedy}") from error


@contextmanager
def kernels_named(device: torch.device) -> Iterator[None]:
    """Raises DeviceError with the remedy where Triton cannot compile or launch a kernel: its own errors do not say which."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("triton."):
            raise
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [frame.f_code.co_name for frame in frames if "/kernels/triton_" in frame.f_code.co_filename]
        raise DeviceError(
            f"Triton's kernel of {names[-1] if names else 'a step'} does not run on {device} "
            f"({type(error).__name__}: {str(error).strip().splitlines()[-1]}); open the model with "
            "kernels={'linear': 'reference'}, or whichever op it is, and torch's own operators do it"
        ) from error


P = ParamSpec("P")
T = TypeVar("T")


def _on_its_device(call: Callable[Concatenate[Runner, P], T]) -> Callable[Concatenate[Runner, P], T]:
    """A Runner's method with the model's GPU as the current one, whichever thread calls: Triton launches there."""

    @wraps(call)
    def wrapped(self: Runner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        device = self.model.device
        if device.type != "cuda":
            return call(self, *args, **kwargs)
        with torch.cuda.device(device), within_memory(device, STEP_REMEDY), kernels_named(device):
            return call(self, *args, **kwargs)

    return wrapped


class Runner:
    def __init__(
        self,
        model: Qwen2_5_VL,
        num_blocks: int,
        block_size: int,
        encoder_cache_bytes: int,
        has_int8_cache: bool = False,
    ) -> None:
        self.model = model
        self.cache = PagedCache(model, num_blocks, block_size, has_int8_cache)
        plan = model.kernels.plan_decoder if model.ranks.is_alone else None  # in one call, nothing can be exchanged
        self.decoder_step = plan(model.language.weights(), self.cache.blocks) if plan else None
        self.tells_visual = model.language.tells_visual
        is_cuda = model.device.type == "cuda" and model.kernels.sources["attention_paged"] == "triton"
        self.graphs: DecodeGraphs | None = None
        if is_cuda:
            # Ranks would have to be told of steps before they are taken.
            head = model.head if model.ranks.is_alone else None
            vocab_size = model.config.text.vocab_size
            card, likeliest = Cuda(model.device), model.kernels.likeliest
            self.graphs = DecodeGraphs(self.compute, head, vocab_size, block_size, card, likeliest)
        self.encoder_cache = EncoderCache(encoder_cache_bytes)
        self.num_encoded = 0  # media that went through the tower

    @property
    def num_alike_rows(self) -> int:
        """Up to how many tokens a step may have so that each one's logits have the bits it gives alone; 1 if that is unknown."""
        alike = self.model.kernels.alike_rows
        if alike is None or self.decoder_step is None:
            return 1
        layers = self.model.language.weights().layers
        weights = [w for layer in layers for w in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        return min(alike(weight, self.model.dtype) for weight in [*weights, self.model.lm_head.weight])

    @contextmanager
    def processors_to_itself(self) -> Iterator[None]:
        """For a step whose work our own threads do: torch keeps to one.

        After each operation that torch's threads share they wait awake for milliseconds, on the processors that ours need next.
        Other types than bfloat16 have a head that torch multiplies by.
        """
        before = torch.get_num_threads()
        if self.decoder_step is not None and self.model.dtype == torch.bfloat16:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @_on_its_device
    @torch.inference_mode()
    def embed_media(self, media: Sequence[Medium]) -> tuple[list[Tensor], VisionTimes]:
        """Features [tokens, H] of each medium; the tower sees every content once. Returns them and the seconds it took."""
        found = {medium.key: self.encoder_cache.get(medium.key) for medium in media}
        missing = {medium.key: medium for medium in media if found[medium.key] is None}
        preprocessing = vision = 0.0
        for group in _groups(list(missing.values())):
            start = time.perf_counter()
            rows = torch.cat([patches(medium.frames.to(self.model.device), self.model.config) for medium in group])
            middle = time.perf_counter()
            grids = [medium.receipt.grid for medium in group]
            lengths = [medium.receipt.num_tokens for medium in group]
            encoded = torch.split(self.model.encode(rows, grids), lengths)
            for medium, features in zip(group, encoded, strict=True):
                found[medium.key] = features
                self.encoder_cache.put(medium.key, features)
            self.num_encoded += len(group)
            if self.model.device.type == "cuda":  # else the time would be that of queueing the work
                torch.cuda.synchronize(self.model.device)
            else:
                give_back_memory()  # the tower's, before the prompt takes its own
            preprocessing += middle - start
            vision += time.perf_counter() - middle
        return [_present(found[medium.key]) for medium in media], VisionTimes(preprocessing, vision)

    @_on_its_device
    @torch.inference_mode()
    def run(self, batch: Batch, features: Sequence[Tensor]) -> Tensor:
        """features[i]: [tokens, H] of batch.placements[i]'s medium. Returns the tokens' last hidden rows [T, H]."""
        if self.graphs is not None and self.graphs.takes(batch) and (hidden := self.graphs.run(batch)) is not None:
            return hidden
        batch = batch.to(self.model.device)
        placed = _place(batch.placements, features, self.model.device)
        return self.compute(batch.token_ids, batch.positions, batch.layout, *placed)

    def forget_recordings(self) -> None:
        """To be called before ranks part: NCCL waits, for ever if need be, until no CUDA graph holds an exchange of its."""
        if self.graphs is not None:
            self.graphs.recordings.clear()

    def chooses(self, batch: Batch) -> bool:
        """Whether the tokens behind the batch's rows can be chosen on the device: `begin`, then `launch`."""
        return self.graphs is not None and self.graphs.head is not None and self.graphs.takes(batch)

    def can_follow(self, batch: Batch) -> bool:
        """Whether the batch can be launched behind one under way."""
        return self.graphs is not None and self.graphs.is_recorded(batch)

    @_on_its_device
    @torch.inference_mode()
    def begin(self, batch: Batch, samplers: Sequence[Sampler]) -> bool:
        """The rows of the batch and of those launched from now on are these samplers'. No launch may be under way.

        Returns False where the device turns out not to do it: the batch is to be run.
        """
        assert self.graphs is not None, "tokens are chosen on the host"
        return self.graphs.begin(batch, samplers)

    @_on_its_device
    @torch.inference_mode()
    def launch(self, batch: Batch, draws: Sequence[Draw], *, is_first: bool) -> Callable[[], list[int]]:
        """Queues a step and the choice of its rows' next tokens; returns what waits for them (see DecodeGraphs.launch)."""
        assert self.graphs is not None, "tokens are chosen on the host"
        return self.graphs.launch(batch, draws, is_first=is_first)

    def compute(
        self,
        token_ids: Tensor,
        positions: Tensor,
        layout: PagedLayout,
        media_rows: Tensor | None = None,
        media_features: Tensor | None = None,
    ) -> Tensor:
        """The decoder over the cache, its token rows `media_rows` replaced. Returns the last hidden rows [T, H]."""
        self.cache.layout = layout
        x = self.model.embed(token_ids, media_rows, media_features)
        is_planned = media_rows is None or not self.tells_visual  # a planned step knows one range of a linear's inputs
        if self.decoder_step is not None and is_planned:
            return self.decoder_step(x, *rotary_angles(self.model.config.text, positions), layout)
        return self.model(x, positions, self.cache, media_rows)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
        """Logits [V] float32 on the CPU of each of `rows` of hidden [T, H], a tile of them computed at a time."""
        for start in range(0, len(rows), LOGIT_TILE):
            yield from self.head(hidden, rows[start : start + LOGIT_TILE]).float().cpu()

    @_on_its_device
    @torch.inference_mode()
    def head(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits [R, V] in the model's type of `rows` of hidden [T, H]."""
        return self.model.head(hidden[torch.tensor(rows, device=hidden.device)])


def _groups(media: Sequence[Medium]) -> Iterator[list[Medium]]:
    """The media in runs of at most PATCHES_AT_ONCE patches; a larger one goes alone."""
    group: list[Medium] = []
    num_patches = 0
    for medium in media:
        if group and num_patches + medium.receipt.grid.num_patches > PATCHES_AT_ONCE:
            yield group
            group, num_patches = [], 0
        group.append(medium)
        num_patches += medium.receipt.grid.num_patches
    if group:
        yield group


def _present(features: Tensor | None) -> Tensor:
    assert features is not None, "a medium was not embedded"
    return features


def _place(
    placements: Sequence[Placement], features: Sequence[Tensor], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if not placements:
        return None, None
    rows = [torch.arange(place.row, place.row + place.count) for place in placements]
    pieces = [f[place.first : place.first + place.count] for place, f in zip(placements, features, strict=True)]
    return torch.cat(rows).to(device), torch.cat(pieces)
