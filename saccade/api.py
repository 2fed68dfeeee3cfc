"""The door for Python callers: a model is opened once, then answers conversations, one or hundreds."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from saccade.base.errors import DeviceError, OptionError, PromptError, SaccadeError
from saccade.base.meter import available_memory_bytes, progress
from saccade.base.options import from_mapping, suggestion
from saccade.base.ranks import Ranks, disconnect, launched_size
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import (
    EMBEDDING,
    HEAD,
    Checkpoint,
    MappedCheckpoint,
    expected_tensors,
    linears,
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
from saccade.inputs.prompt import MediaReceipt, Prompt
from saccade.kernels.choose import choose, choose_device
from saccade.kernels.record import KV_SCALE_BYTES
from saccade.model.layers import Filling, TensorSource
from saccade.model.qwen2_5_vl import Qwen2_5_VL
from saccade.outputs import CompletionOutput, RequestOutput, output_of
from saccade.quantize.best import BestReport, quantize_best
from saccade.quantize.best_recipe import BestRecipe, read_recipe
from saccade.quantize.calibration import Order
from saccade.quantize.job import Job, prepare
from saccade.quantize.pipeline import Report, quantize_exact
from saccade.quantize.recipe import ExactRecipe
from saccade.quantize.report import Verify
from saccade.schemes.affine import loading_scheme
from saccade.schemes.scheme import DENSE, Scheme, fitting

Message = Mapping[str, Any]
Conversation = Sequence[Message]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_SPELLINGS = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
LOOKAHEAD = 16  # conversations prepared ahead of the engine; their pictures wait in memory
LOAD_REMEDY = "use --quantization w8a8-dynamic, a smaller model, or a larger machine"
CACHE_SHARE = 0.3  # of the memory left beside the weights, for keys and values


@dataclass(frozen=True)
class StreamUpdate:
    """Text that has become whole since the last update of answer `index`; `output` is there when the conversation has ended."""

    index: int
    text: str
    output: RequestOutput | None = None


@dataclass(frozen=True)
class Plan:
    """What a conversation would take, without running it. Bytes are of one request at its longest."""

    prompt: Prompt
    max_tokens: int
    weight_bytes: int
    kv_cache_bytes: int
    media_bytes: int  # prepared frames, patch rows and features
    activation_bytes: int  # of the widest layer for one step
    notes: tuple[str, ...] = ()  # layers that are stored otherwise than asked for, and why

    @property
    def media(self) -> list[MediaReceipt]:
        return [medium.receipt for medium in self.prompt.media]

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_cache_bytes + self.media_bytes + self.activation_bytes


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
        start = {"model": str(folder), "kernels": dict(kernels or {}), **dataclasses.asdict(self.options)}
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
        self.quantization = _quantization(options, source.quantization if isinstance(source, Checkpoint) else None)
        self.media, self.limits = media or MediaOptions(), limits or MediaLimits()
        device, dtype = own_device(choose_device(options.device)), torch_dtype(options.dtype, config)
        num_ranks = max(options.tensor_parallel, launched_size())
        if options.threads is not None or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(options.threads or max(1, usable_cpus() // num_ranks))
        chosen_kernels = choose(device, dict(kernels or {}))
        Qwen2_5_VL(config, chosen_kernels, Ranks(size=num_ranks))  # can it be cut so? Before any process is started
        scheme, head_scheme = loading_schemes(options)
        self._crew = crew = meet(options.tensor_parallel, device, start)
        if crew.ranks.leads:
            weakref.finalize(self, crew.close).atexit = False  # the crew itself sees to that
        model = Qwen2_5_VL(config, chosen_kernels, crew.ranks)
        free = available_memory_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
        model_or_config = source if isinstance(source, Checkpoint) else config
        weights = weight_bytes(model_or_config, dtype, scheme, head_scheme) // crew.ranks.size
        if weights > free:
            raise DeviceError(
                f"the weights take {weights / 1e9:.1f} GB as {dtype}, and {device} has {free / 1e9:.1f} GB free; "
                f"{LOAD_REMEDY}"
            )
        if options.check_weights and isinstance(source, Checkpoint):
            source.check_finite()
        is_int8 = keeps_int8_cache(config, options)
        is_used_as_it_is = device.type == "cpu" and scheme.is_dense and crew.ranks.is_alone
        is_mapped = options.mmap and is_used_as_it_is
        in_place = MappedCheckpoint(source) if is_mapped and isinstance(source, Checkpoint) else None
        filling = Filling(source, dtype, device, scheme, head_scheme, folds_keys=is_int8, in_place=in_place)
        with progress(sum(1 for _ in model.blocks()), "loading") as advance, within_memory(device, LOAD_REMEDY):
            for _ in model.load(filling):
                advance(1)
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
        if isinstance(messages, str | bytes | Mapping):
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
        prompt = self.prepare(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return self._updates(prompt, sampling_params or SamplingParams())

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


# --- what things take ------------------------------------------------------------------------------------------------


def plan(
    model: str | os.PathLike[str],
    messages: Conversation,
    sampling_params: SamplingParams | None = None,
    *,
    media: MediaOptions | None = None,
    limits: MediaLimits | None = None,
    **options: Any,
) -> Plan:
    """What a conversation would take: opens the checkpoint's headers and the media, loads no weight, runs nothing."""
    chosen = from_mapping(EngineOptions, options)
    folder: Path = resolve(model, source=chosen.source, revision=chosen.revision)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    prompt = ChatTokenizer(folder, config).build(
        messages, defaults=media or MediaOptions(), limits=limits or MediaLimits()
    )
    max_tokens = (sampling_params or SamplingParams()).max_tokens
    scheme, head_scheme = loading_schemes(chosen)
    weights = weight_bytes(checkpoint, torch_dtype(chosen.dtype, config), scheme, head_scheme)
    return replace(plan_for(config, prompt, max_tokens, chosen, weights), notes=tuple(stand_ins(config, scheme)))


def stand_ins(config: ModelConfig, scheme: Scheme) -> Iterator[str]:
    """The layers that cannot be quantized to `scheme` while loading, and what they are quantized to: a line for each width."""
    counts: dict[int, int] = {}
    for module, (_, num_columns) in linears(config).items():
        if f"{module}.weight" != HEAD and fitting(scheme, num_columns) != scheme:
            counts[num_columns] = counts.get(num_columns, 0) + 1
    for num_columns, count in counts.items():
        yield (
            f"{count} layers of {num_columns} columns become {fitting(scheme, num_columns).name}: groups of "
            f"{scheme.group_size} do not divide them"
        )


def plan_for(config: ModelConfig, prompt: Prompt, max_tokens: int, options: EngineOptions, weights: int) -> Plan:
    dtype = torch_dtype(options.dtype, config)
    num_patches = sum(medium.receipt.grid.num_patches for medium in prompt.media)
    num_media_tokens = sum(medium.receipt.num_tokens for medium in prompt.media)
    features = num_media_tokens * config.text.hidden_size * dtype.itemsize
    rows = num_patches * config.vision.patch_values * (4 + dtype.itemsize)
    frames = sum(medium.frames.nbytes for medium in prompt.media)
    step = min(len(prompt), options.max_tokens_per_step)
    widest_text = 2 * config.text.intermediate_size + 3 * config.text.hidden_size
    widest_vision = 2 * config.vision.intermediate_size + 4 * config.vision.hidden_size
    activations = max(step * widest_text, num_patches * widest_vision) * dtype.itemsize + 4 * config.text.vocab_size
    return Plan(
        prompt=prompt,
        max_tokens=max_tokens,
        weight_bytes=weights,
        kv_cache_bytes=(len(prompt) + max_tokens) * kv_bytes_per_token(config, dtype, options),
        media_bytes=frames + rows + features,
        activation_bytes=activations,
    )


def torch_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """The working type called `name`; auto is the checkpoint's own."""
    full = config.dtype if name == "auto" else DTYPE_SPELLINGS.get(name, name)
    if full not in DTYPES:
        raise OptionError(f"dtype {name!r} is unknown{suggestion(name, ['auto', *DTYPES])}")
    return DTYPES[full]


def loading_schemes(options: EngineOptions) -> tuple[Scheme, Scheme]:
    """What linears that come dense are quantized to while loading, and what the output head is."""
    return loading_scheme(options.quantization), loading_scheme(options.head_quantization)


def weight_bytes(
    model: ModelConfig | Checkpoint, dtype: torch.dtype, scheme: Scheme = DENSE, head_scheme: Scheme = DENSE
) -> int:
    """Bytes of all weights in memory; the schemes are those of `loading_schemes`. A tied head that is quantized is one of its own.

    Raises OptionError when what is to be quantized is so already.
    """
    if isinstance(model, Checkpoint) and model.quantization is not None:
        if not scheme.is_dense:
            raise OptionError(
                f"quantization {scheme.name!r} is for checkpoints that are not quantized, and {model.folder} is: "
                f"{model.quantization}; leave the option out"
            )
        if not head_scheme.is_dense and model.is_quantized("lm_head"):
            raise OptionError(
                f"head_quantization {head_scheme.name!r}: {model.folder} has a {model.scheme('lm_head').name} head; "
                "leave the option out"
            )
        return model.weight_bytes(dtype) + head_bytes(model.config, dtype, head_scheme)
    config = model.config if isinstance(model, Checkpoint) else model
    total = 0.0
    for name, shape in expected_tensors(config).items():
        is_linear = len(shape) == 2 and name not in (EMBEDDING, HEAD)
        stored = fitting(scheme, shape[1]) if is_linear else DENSE
        total += math.prod(shape) * (dtype.itemsize if stored.is_dense else stored.bytes_per_weight)
    return int(total) + head_bytes(config, dtype, head_scheme)


def _quantization(options: EngineOptions, stored: str | None) -> str | None:
    """In a few words; `stored`: that of the checkpoint."""
    head = None if options.head_quantization is None else f"head {options.head_quantization}"
    return ", ".join(words for words in (options.quantization or stored, head) if words) or None


def head_bytes(config: ModelConfig, dtype: torch.dtype, scheme: Scheme) -> int:
    """What a head in this scheme adds to a model whose head is dense: less than nothing where it is not tied."""
    text = config.text
    before = 0 if text.tie_word_embeddings else dtype.itemsize
    stored = fitting(scheme, text.hidden_size)
    return 0 if stored.is_dense else int(text.vocab_size * text.hidden_size * (stored.bytes_per_weight - before))


def keeps_int8_cache(config: ModelConfig, options: EngineOptions) -> bool:
    """As the option says, or else the checkpoint."""
    return options.kv_cache_dtype == "int8" or (options.kv_cache_dtype == "auto" and config.has_int8_cache)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype, options: EngineOptions) -> int:
    text = config.text
    row = text.head_dim + KV_SCALE_BYTES if keeps_int8_cache(config, options) else text.head_dim * dtype.itemsize
    return 2 * text.num_layers * text.num_kv_heads * row


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
