"""Outliers put into a model: what large checkpoints grow by themselves, in a small one, with its function left as it was.

A quantizer that is only tried on well-behaved weights looks good whatever it does. Each injector makes one published trouble,
says what remedy it should and should not reward, and changes what the model computes by rounding at most, or says by what.
Scales are powers of two: multiplying by them rounds nothing, in bfloat16 either. This is a simulation: real outliers come in
all these kinds at once, and none is the exact inverse of a remedy.

Knows tensors by their published names; knows no schemes and no scores. Letters: T tokens, H width, I MLP width, D head size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.base.errors import OptionError, SaccadeError
from saccade.base.options import suggestion
from saccade.checkpoints.config import ModelConfig
from saccade.checkpoints.formats import Checkpoint, expected_tensors
from saccade.checkpoints.shard_writer import ShardWriter
from saccade.evals.tasks import TASKS, draw
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.pixels import patches
from saccade.inputs.prompt import Prompt
from saccade.kernels.choose import choose
from saccade.model.language import WholeSequences
from saccade.model.layers import Filling, Linear, Norm
from saccade.model.qwen2_5_vl import Qwen2_5_VL
from saccade.schemes.scheme import Weight

Edit = Callable[[Tensor], Tensor]  # a tensor in float32, the same changed
Edits = dict[str, list[Edit]]

CHANNEL_SCALE = 64.0  # published outlier channels are 20 to 100 times the others
HEAVIEST = 8.0  # the largest factor of a column, in heavy-tails
CHANNEL_SHARE = 0.01  # of all channels, 0.3 to 1 % in published models
MASSIVE = 1000.0  # times the root mean square: what the first token's activations reach in published models
KEY_BIAS = 700.0  # norm of k_proj.bias in the first and last layer of Qwen2.5-7B: 605 and 921, 22 in the median layer
MAX_STRENGTH = 64
SEED = 20_251
WIDER = 256  # neurons first-token adds to every MLP: a group of the largest size
SILENT = 80.0  # a gate of -80 lets through 80 e^-80 of what it gates: nothing, and half of it would do
ITEMS_SEEN = 12  # of each task, where an injector has to see what the model does
RANDOM_SEEN, RANDOM_LENGTH = 12, 250  # sequences of random tokens seen besides, and their length
MIN_MARGIN, ROUNDS, RIDGE = 0.05, 30, 1e-2  # of the direction that tells the first token from all others


class Injected:
    """A checkpoint read through edits: a TensorSource, and a folder once saved. `config` may be wider than the checkpoint's."""

    def __init__(
        self, checkpoint: Checkpoint, edits: Mapping[str, Sequence[Edit]], config: ModelConfig | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config or checkpoint.config
        self.edits = edits

    def tensor(self, name: str) -> Tensor:
        """In float32; bit for bit the checkpoint's where nothing was changed."""
        tensor = self.checkpoint.tensor(name).float()
        for edit in self.edits.get(name, ()):
            tensor = edit(tensor)
        return tensor

    def read_into(self, name: str, out: Tensor) -> None:
        if name in self.edits:
            out.copy_(self.tensor(name))
        else:
            self.checkpoint.read_into(name, out)

    def weight(self, module: str) -> Weight | None:
        return None

    def save(self, folder: Path, dtype: torch.dtype | None = None, *, force: bool = False) -> None:
        """Writes an ordinary checkpoint folder, tensor by tensor; `dtype` is the file's by default."""
        dtype = dtype or getattr(torch, self.config.dtype)
        with ShardWriter(folder, force=force) as writer:
            for name in expected_tensors(self.config):
                writer.add(name, self.tensor(name).to(dtype))
            for file in sorted(self.checkpoint.folder.iterdir()):
                if file.suffix in (".json", ".txt", ".jinja") and not file.name.endswith(".index.json"):
                    writer.add_file(
                        file.name, self._config_file(file, dtype) if file.name == "config.json" else file.read_bytes()
                    )

    def _config_file(self, file: Path, dtype: torch.dtype) -> str:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["torch_dtype"] = str(dtype).removeprefix("torch.")
        content.pop("dtype", None)
        text = content.get("text_config", content)
        text["intermediate_size"] = self.config.text.intermediate_size
        return json.dumps(content, indent=2) + "\n"


Injector = Callable[[Checkpoint, float], Injected]


def inject(checkpoint: Checkpoint, spec: str) -> Injected:
    """The checkpoint with the outliers that `spec` names. Raises OptionError, or SaccadeError where the model does not allow it."""
    name, strength = read_spec(spec)
    if checkpoint.quantization is not None:
        raise OptionError(f"{checkpoint.folder} is quantized; outliers are put into the checkpoint it was made from")
    return INJECTORS[name](checkpoint, strength)


def read_spec(spec: str) -> tuple[str, float]:
    """NAME or NAME:STRENGTH; strength 1 is the published magnitude. Raises OptionError."""
    name, _, strength = spec.partition(":")
    if name not in INJECTORS:
        raise OptionError(f"injector {name!r} is unknown{suggestion(name, INJECTORS)}")
    try:
        factor = float(strength or 1)
    except ValueError:
        factor = float("nan")
    if not 0 < factor <= MAX_STRENGTH:
        raise OptionError(
            f"strength {strength!r} of injector {name} is no number above 0 and up to {MAX_STRENGTH}; 1 is usual"
        )
    return name, factor


def power_of_two(value: float) -> float:
    """The nearest power of two, by exponent."""
    return float(2.0 ** round(torch.tensor(value).log2().item()))


# --- edits -----------------------------------------------------------------------------------------------------------


def scale_rows(tensor: Tensor, factors: Tensor) -> Tensor:
    """tensor: [O, ...] or [O]; factors: [O]."""
    return tensor * factors.view(-1, *[1] * (tensor.ndim - 1))


def scale_columns(tensor: Tensor, factors: Tensor) -> Tensor:
    """tensor: [O, H]; factors: [H]."""
    return tensor * factors


def _edit(edits: Edits, name: str, edit: Edit) -> None:
    edits.setdefault(name, []).append(edit)


def _layers(config: ModelConfig) -> list[str]:
    return [f"model.layers.{index}" for index in range(config.text.num_layers)]


# The linears that read each norm of a layer.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def _scale_norm(edits: Edits, layer: str, norm: str, factors: Tensor) -> None:
    """What the norm gives out times `factors` [H], undone in the columns of what reads it."""
    _edit(edits, f"{layer}.{norm}.weight", partial(scale_rows, factors=factors))
    for linear in READERS[norm]:
        _edit(edits, f"{layer}.{linear}.weight", partial(scale_columns, factors=1 / factors))


def _scale_up(edits: Edits, layer: str, factors: Tensor) -> None:
    """What enters down_proj times `factors` [I], undone in its columns: SiLU acts on the gate, so up is free to scale."""
    _edit(edits, f"{layer}.mlp.up_proj.weight", partial(scale_rows, factors=factors))
    _edit(edits, f"{layer}.mlp.down_proj.weight", partial(scale_columns, factors=1 / factors))


def _some(size: int, generator: torch.Generator, share: float = CHANNEL_SHARE) -> Tensor:
    """Two channels at least, drawn without repeats."""
    return torch.randperm(size, generator=generator)[: max(2, round(size * share))]


def _factors(size: int, channels: Tensor, scale: float) -> Tensor:
    factors = torch.ones(size)
    factors[channels] = scale
    return factors


# --- the injectors ---------------------------------------------------------------------------------------------------


def control(checkpoint: Checkpoint, strength: float) -> Injected:
    """The model as it is: what a table of injectors is read against."""
    return Injected(checkpoint, {})


def norm_channels(checkpoint: Checkpoint, strength: float) -> Injected:
    """1 % of the channels between each norm and its linears 64 times larger; exact.

    Breaks activations of eight bits, whose scale is one for all channels of a token; static per-tensor scales still more.
    Should reward any smoothing, which is its exact inverse: a method that only wins here has won nothing. Should not reward
    anything done to weights alone.
    """
    config, edits = checkpoint.config, Edits()
    generator = torch.Generator().manual_seed(SEED)
    scale = power_of_two(CHANNEL_SCALE * strength)
    for layer in _layers(config):
        for norm in READERS:
            H = config.text.hidden_size
            _scale_norm(edits, layer, norm, _factors(H, _some(H, generator), scale))
    return Injected(checkpoint, edits)


def modality_channels(checkpoint: Checkpoint, strength: float) -> Injected:
    """Some channels large for pictures, others, less, for text, before every linear but o_proj; exact.

    The channels are those whose magnitudes differ most between the two on items of the training split: of norms and MLPs, 1 %
    is made 64 times larger where pictures lead and 8 times where text leads. Breaks static scales calibrated over both
    (pictures set them, text is rounded away) and, by its outlier channels, per-token ones. Should reward scales split by
    modality and statistics balanced between the modalities. Should not reward smoothing by ranges that pictures dominate.
    """
    config, edits = checkpoint.config, Edits()
    pictures, text = power_of_two(CHANNEL_SCALE * strength), power_of_two(CHANNEL_SCALE * strength / 8)
    seen = observe(
        checkpoint,
        [
            f"{layer}.{name}"
            for layer in _layers(config)
            for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
        ],
    )
    if not seen.is_picture.any():
        raise SaccadeError(f"{checkpoint.folder}: no picture could be shown to find channels by modality")

    def factors(module: str) -> Tensor:
        x = seen.inputs[module]
        ratio = x[seen.is_picture].square().mean(0).sqrt() / x[~seen.is_picture].square().mean(0).sqrt().clamp_min(
            1e-12
        )
        order = ratio.argsort(descending=True)
        count = max(1, round(len(ratio) * CHANNEL_SHARE / 2))
        found = _factors(len(ratio), order[:count], pictures)
        found[order[-count:]] = text
        return found

    for layer in _layers(config):
        _scale_norm(edits, layer, "input_layernorm", factors(f"{layer}.self_attn.q_proj"))
        _scale_norm(edits, layer, "post_attention_layernorm", factors(f"{layer}.mlp.gate_proj"))
        _scale_up(edits, layer, factors(f"{layer}.mlp.down_proj"))
    return Injected(checkpoint, edits)


def inner_channels(checkpoint: Checkpoint, strength: float) -> Injected:
    """1 % of the channels between up and down and between v and o 64 times larger; exact.

    Breaks activations of eight bits at down_proj and o_proj. Should reward smoothing of those two pairs, and leaving
    down_proj in float. Should not reward methods that know only the pairs of a norm and its linears.
    """
    config, edits = checkpoint.config, Edits()
    text = config.text
    generator = torch.Generator().manual_seed(SEED)
    scale = power_of_two(CHANNEL_SCALE * strength)
    for layer in _layers(config):
        I = text.intermediate_size  # noqa: E741
        _scale_up(edits, layer, _factors(I, _some(I, generator), scale))
        values = _factors(text.num_kv_heads * text.head_dim, _some(text.num_kv_heads * text.head_dim, generator), scale)
        per_query = values.view(text.num_kv_heads, 1, text.head_dim)
        per_query = per_query.expand(-1, text.num_heads // text.num_kv_heads, -1).flatten()
        for part in ("weight", "bias"):
            _edit(edits, f"{layer}.self_attn.v_proj.{part}", partial(scale_rows, factors=values))
        _edit(edits, f"{layer}.self_attn.o_proj.weight", partial(scale_columns, factors=1 / per_query))
    return Injected(checkpoint, edits)


def first_token(checkpoint: Checkpoint, strength: float) -> Injected:
    """A massive activation at the first token: one channel of down_proj's input is 1000 times as large as the others are on average.

    The first token is always <|im_start|> and sees itself alone, so in every layer it is one known vector. Every MLP gets 256
    more neurons, of which one is live: its gate is a direction that is positive at the first token and negative at all
    others, so that SiLU silences it there. In layer 1 it multiplies the first token's residual stream, in the layers between
    it keeps it so, in the last it takes that back; a norm does not see how long a vector is, so no other token sees any of it.
    Changes the function by rounding at the first token. The direction is found from what the model saw, tasks and random tokens; it
    holds for conversations unlike any of those (tests/evals/test_outliers.py), but is not proven for every text there could be.
    Breaks static per-tensor scales at down_proj, which a single token sets for all. Should reward per-token scales, calibration
    that leaves the first token out, clipping, and down_proj in float. Should not reward any method for norm inputs.
    Smoothing of up and down may undo it as well: the channel is the token's own, as it is in published models.
    """
    config, edits = checkpoint.config, Edits()
    text = config.text
    first, last = 1, text.num_layers - 1
    if last <= first:
        raise SaccadeError(f"{checkpoint.folder} has {text.num_layers} layers; first-token needs three at least")
    streams = [*(f"{layer}.{norm}" for layer in _layers(config) for norm in READERS), "model.norm"]
    seen = observe(checkpoint, streams, from_norms=True)
    growth = 1.0  # how much larger than it was the first token's stream is where the layer in hand begins
    for index, layer in enumerate(_layers(config)):
        gate, up, down = (torch.zeros(text.hidden_size) for _ in range(3))
        if index >= first:
            before, middle, after = (seen.inputs[name] for name in streams[2 * index : 2 * index + 3])
            token = int(seen.is_first.nonzero()[0])
            # What the MLP's norm will see: the first token's larger stream with what attention added, all others as ever.
            larger = growth * before[token] + (middle - before)[token]
            x = torch.where(seen.is_first[:, None], larger, middle)
            gain = checkpoint.tensor(f"{layer}.post_attention_layernorm.weight").float()
            normed = gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + text.rms_norm_eps)
            direction, margin = separating_direction(normed, seen.is_first)
            hidden = _hidden(checkpoint, layer, normed)
            massive = MASSIVE * strength * hidden[~seen.is_first].square().mean().sqrt().item()
            if index == first:  # no larger a column than the layer's other weights, which bounds what can be written
                largest = checkpoint.tensor(f"{layer}.mlp.down_proj.weight").abs().max().item()
                growth = max(1.0, massive * largest / after[token].abs().max().item())
            if index == last:
                growth = 1.0
            gate = direction * (SILENT / margin)
            up = direction * (massive * margin / SILENT)
            written = checkpoint.tensor(f"{layer}.mlp.down_proj.weight").float() @ hidden[token]
            down = (growth * after[token] - larger - written) / massive
        for name, vector in (("gate", gate), ("up", up)):
            _edit(edits, f"{layer}.mlp.{name}_proj.weight", partial(_with_row, row=vector))
        _edit(edits, f"{layer}.mlp.down_proj.weight", partial(_with_column, column=down))
    wide = dataclasses.replace(text, intermediate_size=text.intermediate_size + WIDER)
    return Injected(checkpoint, edits, dataclasses.replace(config, text=wide))


def separating_direction(x: Tensor, is_first: Tensor) -> tuple[Tensor, float]:
    """r [H] and a margin such that r x = 1 at the first token and r x <= -margin at all others.

    x: [T, H], the first token's rows equal. Least squares towards 1 and -1, again and again over those others alone that are
    not yet beyond -1: a squared hinge by its active set. Raises SaccadeError where no such direction is found.
    """
    others, first = x[~is_first].double(), x[is_first][0].double()
    small = torch.eye(x.shape[1], dtype=torch.float64) * others.square().mean() * RIDGE
    active = torch.ones(len(others), dtype=torch.bool)
    margin = -1.0
    best = torch.zeros_like(first)
    for _ in range(ROUNDS):
        near = others[active]
        weight = max(int(active.sum()), 1)  # the first token's one row weighs as much as all the others together
        gram = near.T @ near + weight * (torch.outer(first, first) + small)
        direction = torch.linalg.solve(gram, weight * first - near.sum(0))
        direction /= first @ direction
        reached = -(others @ direction)
        if float(reached.min()) > margin:
            best, margin = direction, float(reached.min())
        active = reached < 1
    if margin < MIN_MARGIN:
        raise SaccadeError(
            f"no direction tells the first token from all others (margin {margin:.3f}); the model is too narrow for first-token"
        )
    return best.float(), margin


def _hidden(checkpoint: Checkpoint, layer: str, x: Tensor) -> Tensor:
    """What enters the layer's down_proj [T, I] for normed rows x [T, H]."""
    gate, up = (checkpoint.tensor(f"{layer}.mlp.{name}_proj.weight").float() for name in ("gate", "up"))
    return F.silu(x @ gate.T) * (x @ up.T)


def _with_row(tensor: Tensor, row: Tensor) -> Tensor:
    """`row` and zeros, WIDER rows in all, below."""
    return torch.cat([tensor, F.pad(row[None], (0, 0, 0, WIDER - 1))])


def _with_column(tensor: Tensor, column: Tensor) -> Tensor:
    return _with_row(tensor.T, column).T.contiguous()


def k_spikes(checkpoint: Checkpoint, strength: float) -> Injected:
    """The three slowest RoPE pairs of every key head 64 times larger, and a key bias of norm 700 on the slowest.

    The scale is shared by the two halves of a pair and undone in the queries: exact. The bias adds the same to all logits of a
    query as long as the pair hardly turns over a context: it changes the function by the rest, which is measured.
    Breaks caches of eight bits, whose scale is one for a token and head. Should reward folding pair scales into the queries,
    scales by channel, and keys before rotation. Should not reward anything done to weights or to linear inputs.
    """
    config, edits = checkpoint.config, Edits()
    text = config.text
    half = text.head_dim // 2
    scale = power_of_two(CHANNEL_SCALE * strength)
    pairs = torch.arange(half - 3, half)
    per_head = _factors(text.head_dim, torch.cat([pairs, pairs + half]), scale)
    bias = torch.zeros(text.head_dim)
    bias[half - 1] = KEY_BIAS * strength
    for layer in _layers(config):
        for part in ("weight", "bias"):
            _edit(
                edits,
                f"{layer}.self_attn.k_proj.{part}",
                partial(scale_rows, factors=per_head.repeat(text.num_kv_heads)),
            )
            _edit(
                edits,
                f"{layer}.self_attn.q_proj.{part}",
                partial(scale_rows, factors=1 / per_head.repeat(text.num_heads)),
            )
        _edit(edits, f"{layer}.self_attn.k_proj.bias", partial(torch.add, other=bias.repeat(text.num_kv_heads)))
    return Injected(checkpoint, edits)


def heavy_tails(checkpoint: Checkpoint, strength: float) -> Injected:
    """Rare columns of weights up to 8 times larger, by heavy-tailed powers of two, the inputs as much smaller; exact.

    Column factors are 2^k with k geometric: half the columns stay, a quarter double, and so on, before every linear that
    follows a norm or up_proj. Breaks four bits with large groups, whose scale the largest of 256 weights sets. Should
    reward smaller groups, scales searched with the inputs in view (AWQ), smoothing that looks at weights too, and GPTQ. Should
    not reward anything done to activations alone: they are smaller than they were.
    """
    config, edits = checkpoint.config, Edits()
    text = config.text
    generator = torch.Generator().manual_seed(SEED)
    most = power_of_two(HEAVIEST * strength)

    def factors(size: int) -> Tensor:
        steps = torch.empty(size).geometric_(0.5, generator=generator) - 1
        return (2.0**-steps).clamp_min(1 / most)

    for layer in _layers(config):
        for norm in READERS:
            _scale_norm(edits, layer, norm, factors(text.hidden_size))
        _scale_up(edits, layer, factors(text.intermediate_size))
    return Injected(checkpoint, edits)


INJECTORS: dict[str, Injector] = {
    "control": control,
    "norm-channels": norm_channels,
    "modality-channels": modality_channels,
    "inner-channels": inner_channels,
    "first-token": first_token,
    "k-spikes": k_spikes,
    "heavy-tails": heavy_tails,
}


# --- what a model sees -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """Rows of all tokens of some items. inputs[name]: [T, H] float32. is_picture, is_first: [T] bool."""

    inputs: Mapping[str, Tensor]
    is_picture: Tensor
    is_first: Tensor


@torch.inference_mode()
def observe(checkpoint: Checkpoint, names: Sequence[str], *, from_norms: bool = False) -> Seen:
    """What enters the linears called `names`, or the residual stream at the norms called so.

    Runs the model in float32 over items of every task's training split, and over tokens drawn at random after the first, so that
    words no task uses are seen too.
    """
    config = checkpoint.config
    model = Qwen2_5_VL(config, choose(torch.device("cpu")))
    for _ in model.load(Filling(checkpoint, torch.float32, torch.device("cpu"))):
        pass
    rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(module: torch.nn.Module, arguments: tuple[Tensor | None, ...]) -> None:
        known = [module.name] if isinstance(module, Norm) else list(module.parts) if isinstance(module, Linear) else []
        for name in set(known) & set(rows):
            rows[name].append(sum(x for x in arguments if x is not None))  # type: ignore[arg-type]

    for module in model.modules():
        if isinstance(module, Norm if from_norms else Linear):
            module.register_forward_pre_hook(note)
    is_picture, is_first = [], []
    for prompt in _prompts(ChatTokenizer(checkpoint.folder, config)):
        ids = torch.tensor(prompt.token_ids)
        x = model.embed(ids)
        for span, medium in zip(prompt.spans, prompt.media, strict=True):
            features = model.encode(patches(medium.frames, config), [medium.receipt.grid])
            x[span.start : span.start + len(features)] = features
        model(x, prompt.positions, WholeSequences(model.kernels, (len(ids),)))
        media = torch.zeros(len(ids), dtype=torch.bool)
        for span, medium in zip(prompt.spans, prompt.media, strict=True):
            media[span.start : span.start + medium.receipt.num_tokens] = True
        is_picture.append(media)
        is_first.append(torch.arange(len(ids)) == 0)
    return Seen({name: torch.cat(found) for name, found in rows.items()}, torch.cat(is_picture), torch.cat(is_first))


def _prompts(tokenizer: ChatTokenizer) -> Iterator[Prompt]:
    """Whole conversations of the training split, then random tokens after the token that begins all of them."""
    for task in TASKS:
        for index in range(ITEMS_SEEN):
            item = draw(task, "train", SEED, index)
            messages = [*item.messages, {"role": "assistant", "content": item.answer}]
            prompt = tokenizer.build(messages, add_generation_prompt=False)
            yield prompt
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(RANDOM_SEEN):
        ids = torch.randint(len(tokenizer), (RANDOM_LENGTH,), generator=generator).tolist()
        positions = torch.arange(RANDOM_LENGTH + 1).expand(3, -1)
        yield Prompt((prompt.token_ids[0], *ids), positions, RANDOM_LENGTH + 1)
