"""The door for Python callers: a model is opened once, then answers conversations, one or hundreds."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from saccade.base.errors import DeviceError, OptionError, PromptError, SaccadeError
from saccade.base.meter import available_memory_bytes, give_back_memory, progress
from saccade.base.options import from_mapping
from saccade.base.ranks import Ranks, disconnect, launched_size
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import (
    Checkpoint,
    MappedCheckpoint,
    open_checkpoint,
)
from saccade.checkpoints.hub import resolve
from saccade.engine.blocks import BlockPool
from saccade.engine.engine import Engine
from saccade.engine.lookup import speculation_for
from saccade.engine.options import EngineOptions, SamplingParams
from saccade.engine.request import Request, Timings
from saccade.engine.runner import Runner, within_memory
from saccade.engine.scheduler import Scheduler
from saccade.engine.workers import LeadingRunner, follow, meet, own_device
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.options import MediaLimits, MediaOptions
from saccade.inputs.prompt import Prompt
from saccade.kernels.choose import choose, choose_device
from saccade.model.layers import Filling, TensorSource
from saccade.model.qwen2_5_vl import Qwen2_5_VL
from saccade.outputs import CompletionOutput, RequestOutput, output_of
from saccade.planning import keeps_int8_cache, kv_bytes_per_token, loading_of, torch_dtype, weight_bytes
from saccade.quantize.best import BestReport, quantize_best
from saccade.quantize.best_recipe import BestRecipe, read_recipe
from saccade.quantize.calibration import Order
from saccade.quantize.job import Job, prepare
from saccade.quantize.pipeline import Report, quantize_exact
from saccade.quantize.recipe import ExactRecipe
from saccade.quantize.report import Verify

Message = Mapping[str, Any]
Conversation = Sequence[Message]

LOOKAHEAD = 16  # conversations prepared ahead of the engine; their pictures wait in memory
LOAD_REMEDY = "use --quantization w8a8-dynamic, a smaller model, or a larger machine"
CACHE_SHARE = 0.3  # of the memory left beside the weights, for keys and values


@dataclass(frozen=True)
class StreamUpdate:
    """Text that has become whole since the last update of answer `index`; `output` is there when the conversation has ended."""

    index: int
    text: str
    output: RequestOutput | None = None


class LLM:
    """A Qwen2.5-VL ready to answer.

    `model` is a checkpoint folder, a hub id, or "demo" for the small model that ships with Saccade. Keywords are the fields
    of EngineOptions; `media` sets defaults for every picture and video, `limits` what is refused unread. One thread at a time.
    With tensor_parallel=N, N - 1 more processes are started; under torchrun the constructor returns on rank 0 only, all other
    ranks serve it and then exit. `close`, or the program's end, sends them home. `load_s`: seconds until the model was ready.
    Raises CheckpointError, DeviceError or OptionError before anything long begins.
    """

    load_s: float

    def __init__(
        self,
        model: str | os.PathLike[str] = "demo",
        *,
        media: MediaOptions | None = None,
        limits: MediaLimits | None = None,
        kernels: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        start_s = time.perf_counter()
        _require_kinds(media, limits, kernels)
        self.options = from_mapping(EngineOptions, options)
        folder = resolve(model, source=self.options.source, revision=self.options.revision)
        checkpoint = open_checkpoint(folder)
        tokenizer = ChatTokenizer(folder, checkpoint.config)
        found = {"model": str(folder), "revision": None}  # a folder now, which has no revisions
        start = {"kernels": dict(kernels or {}), **dataclasses.asdict(self.options), **found}
        self._open(checkpoint.config, checkpoint, tokenizer, media, limits, kernels, start)
        self.load_s = time.perf_counter() - start_s

    @classmethod
    def from_source(
        cls,
        config: ModelConfig,
        source: TensorSource,
        tokenizer: ChatTokenizer,
        /,  # `source` is an option's name, too
        *,
        media: MediaOptions | None = None,
        limits: MediaLimits | None = None,
        kernels: Mapping[str, str] | None = None,
        **options: Any,
    ) -> LLM:
        """The same over numbers that come from elsewhere than a checkpoint: random ones for a benchmark."""
        start_s = time.perf_counter()
        _require_kinds(media, limits, kernels)
        llm = cls.__new__(cls)
        llm.options = from_mapping(EngineOptions, options)
        llm._open(config, source, tokenizer, media, limits, kernels)
        llm.load_s = time.perf_counter() - start_s
        return llm

    def _open(
        self,
        config: ModelConfig,
        source: TensorSource,
        tokenizer: ChatTokenizer,
        media: MediaOptions | None,
        limits: MediaLimits | None,
        kernels: Mapping[str, str] | None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        """`start`: keywords with which another process opens the same model."""
        options = self.options
        self.config, self.tokenizer = config, tokenizer
        stored = source.quantization if isinstance(source, Checkpoint) else None
        self.quantization = ", ".join(options.quantizations(stored)) or None
        self.media, self.limits = media or MediaOptions(), limits or MediaLimits()
        device, dtype = own_device(choose_device(options.device)), torch_dtype(options.dtype, config)
        num_ranks = max(options.tensor_parallel, launched_size())
        if options.threads is not None or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(options.threads or max(1, usable_cpus() // num_ranks))
        chosen_kernels = choose(device, dict(kernels or {}))
        Qwen2_5_VL(config, chosen_kernels, Ranks(size=num_ranks))  # can it be cut so? Before any process is started
        wanted = loading_of(options)
        self._crew = crew = meet(options.tensor_parallel, device, start)
        if crew.ranks.leads:
            weakref.finalize(self, crew.close).atexit = False  # the crew itself sees to that
        model = Qwen2_5_VL(config, chosen_kernels, crew.ranks)
        free = available_memory_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
        weights = weight_bytes(source if isinstance(source, Checkpoint) else config, dtype, wanted) // crew.ranks.size
        if weights > free:
            raise DeviceError(
                f"the weights take {weights / 1e9:.1f} GB as {dtype}, and {device} has {free / 1e9:.1f} GB free; "
                f"{LOAD_REMEDY}"
            )
        if options.check_weights and isinstance(source, Checkpoint):
            source.check_finite()
        is_int8 = keeps_int8_cache(config, options)
        is_mapped = options.mmap and device.type == "cpu" and crew.ranks.is_alone
        in_place = MappedCheckpoint(source) if is_mapped and isinstance(source, Checkpoint) else None
        filling = Filling(source, dtype, device, wanted, folds_keys=is_int8, in_place=in_place)
        with progress(sum(1 for _ in model.blocks()), "loading") as advance, within_memory(device, LOAD_REMEDY):
            for _ in model.load(filling):
                advance(1)
        give_back_memory()
        num_blocks = self._num_blocks(config, dtype, free - weights)
        num_blocks = crew.agree(num_blocks)
        sizes = (model, num_blocks, options.block_size, options.encoder_cache_bytes, is_int8)
        with within_memory(device, "take a smaller key/value cache: --kv-cache-tokens 8192, --kv-cache-dtype int8"):
            runner = Runner(*sizes) if crew.ranks.is_alone or not crew.ranks.leads else LeadingRunner(crew, *sizes)
        if not crew.ranks.leads:
            _serve(runner)
        pool = BlockPool(num_blocks, options.block_size)
        speculation = speculation_for(options, runner.num_alike_rows)
        scheduler = Scheduler(pool, options.max_tokens_per_step, options.max_running, options.prefix_cache, speculation)
        self.engine = Engine(runner, scheduler, tokenizer)

    def _num_blocks(self, config: ModelConfig, dtype: torch.dtype, free_bytes: int) -> int:
        """Blocks of the cache: as asked for, else enough for two full contexts or a share of the free memory."""
        size = self.options.block_size
        if self.options.kv_cache_tokens is not None:
            return -(-self.options.kv_cache_tokens // size)
        affordable = int(free_bytes * CACHE_SHARE) // kv_bytes_per_token(config, dtype, self.options)
        return max(1, min(affordable, 2 * config.text.max_position_embeddings) // size)

    def close(self) -> None:
        """Ends the other processes of a tensor-parallel model; of any other there is nothing to end."""
        self._crew.close()

    # --- asking ---

    def ask(
        self,
        question: str,
        images: Sequence[Any] | Any = (),
        videos: Sequence[Any] | Any = (),
        sampling_params: SamplingParams | None = None,
        *,
        system: str | None = None,
    ) -> RequestOutput:
        """One question about pictures and videos (paths, bytes, PIL, arrays; one or a list), in that order before the question."""
        return self.chat(messages_for(question, images, videos, system), sampling_params)[0]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        show_progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, together; the outputs stand in the order of the conversations.

        A single conversation that cannot be prepared raises; among many it becomes an output whose finish_reason is "error",
        and no other suffers.
        """
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise PromptError(
                f'messages is {messages!r:.60}; give [{{"role": "user", "content": "Hello"}}], or a list of such lists'
            )
        single = _is_conversation(messages)
        conversations: Sequence[Conversation] = [messages] if single else messages  # type: ignore[assignment,list-item]
        params = _one_each(sampling_params, len(conversations))
        outputs: list[RequestOutput | None] = [None] * len(conversations)
        tickets: dict[int, list[Request]] = {}
        upcoming = iter(range(len(conversations)))
        with progress(len(conversations) if show_progress else 0, "answering") as advance:
            try:
                while True:
                    while (
                        len(self.engine.scheduler.waiting) < LOOKAHEAD and (index := next(upcoming, None)) is not None
                    ):
                        try:
                            prompt = self.prepare(
                                conversations[index], tools=tools, add_generation_prompt=add_generation_prompt
                            )
                            tickets[index] = self.engine.add(prompt, params[index])
                        except SaccadeError as error:
                            if single:
                                raise
                            outputs[index] = _refused(error)
                            advance(1)
                    if not tickets:
                        break
                    self.engine.step()
                    for index in [i for i, requests in tickets.items() if all(r.is_finished for r in requests)]:
                        outputs[index] = output_of(tickets.pop(index))
                        advance(1)
            finally:  # an interrupt leaves nothing behind in the engine
                for requests in tickets.values():
                    for request in requests:
                        self.engine.cancel(request)
        return [output for output in outputs if output is not None]

    def stream(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> Iterator[StreamUpdate]:
        """The answer's text as it becomes whole; the last update carries the output. Closing the iterator cancels the request."""
        (params,) = _one_each(sampling_params, 1)
        prompt = self.prepare(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return self._updates(prompt, params)

    def _updates(self, prompt: Prompt, params: SamplingParams) -> Iterator[StreamUpdate]:
        requests = self.engine.add(prompt, params)
        shown = [0] * len(requests)
        try:
            while not all(request.is_finished for request in requests):
                self.engine.step()
                for index, request in enumerate(requests):
                    whole = request.num_shown()
                    if whole > shown[index]:
                        yield StreamUpdate(index, request.text[shown[index] : whole])
                        shown[index] = whole
            yield StreamUpdate(0, "", output_of(requests))
        finally:
            for request in requests:
                self.engine.cancel(request)

    def prepare(
        self,
        messages: Conversation,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Reads the media and renders the conversation; nothing runs."""
        return self.tokenizer.build(
            messages, defaults=self.media, limits=self.limits, tools=tools, add_generation_prompt=add_generation_prompt
        )

    def embed_media(self, messages: Conversation) -> list[Tensor]:
        """Vision features [tokens, hidden_size] of each medium of a conversation, in order of appearance."""
        features, _ = self.engine.runner.embed_media(self.prepare(messages).media)
        return features


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, and the container's quota where there is one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def _serve(runner: Runner) -> NoReturn:
    """What every rank but the first does with its model: what it is told. Then the process ends."""
    try:
        follow(runner)
    except Exception as error:
        if isinstance(error, SaccadeError):
            print(f"rank {runner.model.ranks.rank}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: an exchange that a dead rank never joins keeps an orderly exit waiting
    disconnect()
    sys.exit(0)


# --- helpers ---------------------------------------------------------------------------------------------------------


def messages_for(
    question: str, images: Sequence[Any] | Any = (), videos: Sequence[Any] | Any = (), system: str | None = None
) -> list[dict[str, Any]]:
    """A conversation of one question: pictures, then videos, then the text."""
    content = [{"type": "image", "image": image} for image in _as_list(images)]
    content += [{"type": "video", "video": video} for video in _as_list(videos)]
    content.append({"type": "text", "text": question})
    turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": content}]


def _require_kinds(media: object, limits: object, kernels: object) -> None:
    """Raises OptionError for what would be stumbled over only when a picture comes."""
    kinds = {"media": (media, MediaOptions), "limits": (limits, MediaLimits), "kernels": (kernels, Mapping)}
    for name, (value, kind) in kinds.items():
        if value is not None and not isinstance(value, kind):
            raise OptionError(f"{name} is {value!r:.60}; give a {kind.__name__}, or leave it out")


def _as_list(media: Any) -> list[Any]:
    return list(media) if isinstance(media, list | tuple) else [media]


def _is_conversation(messages: Any) -> bool:
    return bool(messages) and isinstance(messages[0], Mapping)


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(each, SamplingParams) for each in params):
        raise OptionError(f"sampling_params is {params!r:.60}; give SamplingParams(...), or a list of them")
    if len(params) != count:
        raise OptionError(f"{len(params)} sampling_params for {count} conversations; give one, or one for each")
    return list(params)


def _refused(error: SaccadeError) -> RequestOutput:
    output = CompletionOutput(0, "", [], "error", None, None, str(error), ())
    return RequestOutput([], [output], [], Timings(), 0, None)


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: BestRecipe | str | os.PathLike[str] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    verify: Verify | None = None,
    statistics: str | os.PathLike[str] | None = None,
    **options: Any,
) -> BestReport:
    """Makes a quantized checkpoint of `model` in the folder `out`, which appears whole or not at all; see docs/quantization.md.

    `recipe`: a BestRecipe, or a YAML file with its fields; `options` are fields, too, and take the place of the file's.
    `verify`: what looks at the folder before it appears, as `saccade.verify.after.verifier` makes it; its report comes along.
    `statistics`: a folder where what the float model's linears see is kept; with other schemes the model is not run again.
    Killed at any moment, the same call goes on where it was. Raises OptionError, CheckpointError, MediaError or PromptError
    before the long work begins.
    """
    _require_callable(verify)
    job = quantization_job(model, out, recipe=recipe, device=device, threads=threads, statistics=statistics, **options)
    return quantize_best(job, force=force, verify=verify)


def quantization_job(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: BestRecipe | str | os.PathLike[str] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    statistics: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Job:
    """What `quantize` would do, checked and not begun; its `plan` says what that takes."""
    kept = None if statistics is None else Path(statistics)
    if isinstance(recipe, BestRecipe):
        chosen = dataclasses.replace(recipe, **options)
    elif recipe is not None:
        chosen = read_recipe(Path(recipe), options)
    else:
        chosen = from_mapping(BestRecipe, options)
    where = choose_device(device)
    return prepare(
        resolve(model), Path(out), chosen, device=str(where), threads=threads or usable_cpus(), statistics=kept
    )


def _require_callable(verify: object) -> None:
    """Called at the end of the long work, it would fail only there."""
    if verify is not None and not callable(verify):
        raise OptionError(f"verify is {verify!r}; give what saccade.verify.after.verifier makes, or leave it out")


def quantize_exactly(
    model: str | os.PathLike[str],
    save_directory: str | os.PathLike[str],
    calib_images: str | os.PathLike[str],
    *,
    image_order: Order = "name",
    force: bool = False,
    threads: int | None = None,
    verify: Verify | None = None,
    **options: Any,
) -> Report:
    """Makes the checkpoint that msModelSlim would write from `model`, bit for bit; see docs/quantization-exact.md.

    `calib_images`: a folder of pictures and nothing else. `options`: the fields of ExactRecipe, by default W8A8 with m2.
    `threads`: torch takes one unless told otherwise, as the last bits of its sums depend on it; products, whose do not, all processors.
    Raises OptionError, CheckpointError or MediaError before the long work begins; the folder appears whole or not at all.
    """
    _require_callable(verify)
    recipe = from_mapping(ExactRecipe, options)
    folder = resolve(model)
    out, pictures = Path(save_directory), Path(calib_images)
    return quantize_exact(folder, out, recipe, pictures, order=image_order, force=force, threads=threads, verify=verify)
