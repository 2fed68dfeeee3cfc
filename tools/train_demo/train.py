"""Trains the demo model: python -m tools.train_demo.train --run runs/nano --minutes 80

Knows the recipe: the model's sizes, losses, optimisers, schedule, the balance of tasks, and checkpoints. Stopping and starting
again resumes; the clock that drives the learning rate counts training minutes only. Losses and accuracies go to RUN/log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader, IterableDataset

from saccade.checkpoints.config import GenerationConfig, ModelConfig, PreprocessingConfig, TextConfig, VisionConfig
from saccade.evals.tasks import MEDIA
from tools.train_demo import tokenizer as demo_tokenizer
from tools.train_demo.batches import START_WEIGHTS, Batch, BatchSource, Packer, patch_rows, training_batches
from tools.train_demo.dense import DenseHead
from tools.train_demo.network import Network, compile_halves

T = TypeVar("T")

SEED = 2026
NUM_WORKERS = 2
MEETING_FILE = "workers"
ERRORS_FILE = "errors.json"
REPORT_EVERY = 15  # steps
HELD_OUT_EVERY = 20  # minutes
LONGEST_STEP = 30.0  # seconds that one step may add to the clock: a process that was stopped did not train
WORKING_DTYPE = torch.bfloat16  # of activations; weights are float32 until they are exported
PEAK_RATE = 1e-3
DECODER_FACTOR = 1.2  # the decoder's matrices learn faster
WARMUP_STEPS = 30
DECAY_SHARE = 0.6  # of the training time, at the end, in which the rate falls to FINAL_RATE
FINAL_RATE = 0.03
WEIGHTS = {
    "answer": 1.0,
    "kind": 0.5,
    "colour": 0.5,
    "box": 0.3,
    "edges": 0.3,
    "characters": 0.8,
    "meaning": 0.8,
    "place": 0.1,
}
SOLVED_WEIGHT = 0.2  # of a task without errors, beside one that is always wrong


def vision(width: int, depth: int, inner: int, out: int) -> VisionConfig:
    return VisionConfig(
        hidden_size=width,
        out_hidden_size=out,
        depth=depth,
        num_heads=width // 64,
        intermediate_size=inner,
        fullatt_block_indexes=tuple(range(2, depth, 3)),
        tokens_per_second=2.0,
    )


def text(width: int, depth: int, head_dim: int, inner: int) -> TextConfig:
    section = (head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16)
    return TextConfig(
        vocab_size=demo_tokenizer.VOCAB_SIZE,
        hidden_size=width,
        num_layers=depth,
        num_heads=width // head_dim,
        num_kv_heads=2,
        head_dim=head_dim,
        intermediate_size=inner,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        mrope_section=section,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


SIZES: dict[str, tuple[VisionConfig, TextConfig]] = {
    "nano": (vision(256, 6, 688, 512), text(512, 4, 64, 1024)),  # 16 million parameters
    "small": (vision(512, 12, 1376, 1024), text(1024, 10, 128, 3072)),  # 163 million
}


def demo_config(tokenizer: Tokenizer, size: str = "nano") -> ModelConfig:
    """The published architecture in small."""
    token = tokenizer.token_to_id
    return ModelConfig(
        *SIZES[size],
        PreprocessingConfig(
            min_pixels=84 * 84, max_pixels=448 * 336, video_min_pixels=112 * 112, video_max_pixels=112 * 140
        ),
        GenerationConfig((token("<|im_end|>"), token("<|endoftext|>")), token("<|endoftext|>")),
        token("<|image_pad|>"),
        token("<|video_pad|>"),
        token("<|vision_start|>"),
        token("<|vision_end|>"),
        "bfloat16",
    )


# --- one batch -------------------------------------------------------------------------------------------------------


def see(network: Network, batch: Batch) -> list[Tensor]:
    """The tower over every group of the batch. Returns [N, U, H] each."""
    config = network.config
    return [
        network.visual(patch_rows(group.frames, config.vision, config.preprocessing).to(WORKING_DTYPE), *group.grid)
        for group in batch.groups
    ]


def answer_logits(network: Network, batch: Batch, seen: list[Tensor]) -> Tensor:
    """Logits [A, V] that predict the answer tokens token_ids[is_answer], in that order."""
    # [N, U, H] -> [trees, slices * U, H]; several pictures of a tree side by side.
    groups = zip(seen, batch.groups, strict=True)
    per_tree = [units.reshape(-1, g.slices_per_tree * units.shape[1], units.shape[2]) for units, g in groups]
    units = torch.cat(per_tree, dim=1).flatten(0, 1)
    states = network.states(batch.token_ids, batch.is_media, units, batch.positions, batch.attention_bias())
    before = batch.is_answer.roll(-1, dims=1)  # an answer never begins a row
    return network.logits(states[before]).float()


Hits = dict[str, list[bool]]


def losses(
    network: Network, head: DenseHead, batch: Batch, tokenizer: Tokenizer, *, with_text: bool
) -> tuple[dict[str, Tensor], Hits]:
    """Mean losses by name, and which answers greedy decoding would have got right, by task."""
    seen = see(network, batch)
    result: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for units, group in zip(seen, batch.groups, strict=True):
        for name, value in head.losses(units, group.dense).items():
            result[name] = result[name] + value / len(batch.groups)
    if not with_text:
        return result, {}
    logits = answer_logits(network, batch, seen)
    each = F.cross_entropy(logits, batch.token_ids[batch.is_answer], reduction="none")
    token_weights = batch.token_weights[batch.is_answer]
    result["answer"] = (each * token_weights).sum() / token_weights.sum()
    return result, answers_right(batch, logits, tokenizer)


def answers_right(batch: Batch, logits: Tensor, tokenizer: Tokenizer) -> Hits:
    """By task, whether every answer token is the likeliest one (what greedy decoding would write), or the box fits."""
    right: Hits = defaultdict(list)
    guesses = torch.zeros_like(batch.token_ids)
    guesses[batch.is_answer] = logits.argmax(-1)
    for q in batch.questions:
        guess = guesses[q.row, q.start : q.end]
        if q.turn.metric == "box":
            right[q.turn.task].append(box_fits(tokenizer.decode(guess.tolist()), q.turn.answer))
        else:
            right[q.turn.task].append(bool((guess == batch.token_ids[q.row, q.start : q.end]).all()))
    return right


def box_fits(guess: str, answer: str) -> bool:
    a, b = ([float(n) for n in re.findall(r"\d+", text.split("label")[0].split("2d")[-1])] for text in (guess, answer))
    if len(a) != 4 or a[0] >= a[2] or a[1] >= a[3]:
        return False
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared >= 0.5 * ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@torch.no_grad()
def held_out_accuracy(network: Network, source: BatchSource, tokenizer: Tokenizer) -> dict[str, float]:
    """Share of right answers by task on three batches of every medium, half of the media by each worker."""
    right: Hits = defaultdict(list)
    for index, medium in enumerate(list(MEDIA)[dist.get_rank() :: NUM_WORKERS]):
        for number in range(3):
            batch = source(100 * index + number, medium)
            logits = answer_logits(network, batch, see(network, batch))
            for task, hits in answers_right(batch, logits, tokenizer).items():
                right[task] += hits
    return accuracy(gathered(right))


def gathered(mine: Mapping[str, list[T]]) -> dict[str, list[T]]:
    """All workers' lists, joined by name."""
    parts: list[dict[str, list[T]]] = [{} for _ in range(NUM_WORKERS)]
    dist.all_gather_object(parts, dict(mine))
    return {name: [v for part in parts for v in part.get(name, [])] for name in sorted({n for p in parts for n in p})}


def accuracy(hits: Mapping[str, list[bool]]) -> dict[str, float]:
    return {task: round(sum(values) / len(values), 3) for task, values in hits.items()}


class Balance:
    """How much of each task there is: START_WEIGHTS times its errors in the latest answers. Kept in a file that the processes
    which draw the batches read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def errors(self) -> dict[str, float]:
        if not self.path.exists():
            return dict.fromkeys(START_WEIGHTS, 1.0)
        loaded: dict[str, float] = json.loads(self.path.read_text())
        return loaded

    def __call__(self) -> dict[str, float]:
        errors = self.errors()
        return {
            task: start * (SOLVED_WEIGHT + (1 - SOLVED_WEIGHT) * errors.get(task, 1.0))
            for task, start in START_WEIGHTS.items()
        }

    def update(self, accuracies: Mapping[str, float]) -> None:
        """Follow new accuracies half-way."""
        errors = self.errors()
        errors |= {
            task: round(0.5 * errors.get(task, 1.0) + 0.5 * (1 - value), 4) for task, value in accuracies.items()
        }
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(errors))
        temporary.replace(self.path)


# --- the run ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):  # type: ignore[type-arg]
    """One worker's batch of every step, drawn in a process of its own."""

    def __init__(self, source: BatchSource, first_step: int, rank: int) -> None:
        self.arguments = source, first_step, rank

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        return training_batches(*self.arguments, NUM_WORKERS)


def rate(step: int, progress: float, peak: float) -> float:
    """Learning rate: warm-up by steps, level, then a straight fall over the last DECAY_SHARE of the time."""
    fall = min(1.0, max(0.0, (1 - progress) / DECAY_SHARE))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_RATE + (1 - FINAL_RATE) * fall)


class Training:
    """Everything that a checkpoint holds."""

    def __init__(self, config: ModelConfig) -> None:
        torch.manual_seed(SEED)
        self.network = Network(config)
        self.head = DenseHead(config.text.hidden_size)
        inner: dict[str, list[nn.Parameter]] = {"visual": [], "model": []}
        for name, parameter in self.network.named_parameters():
            if self.is_inner(name, parameter):
                inner[name.split(".")[0]].append(parameter)
        others = [p for name, p in self.network.named_parameters() if not self.is_inner(name, p)]
        self.muon = torch.optim.Muon(
            [{"params": ps} for ps in inner.values()], lr=PEAK_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.AdamW(
            [*others, *self.head.parameters()], lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.step = 0
        self.seconds = 0.0
        self.wants_stop = self.is_stopping = False  # asked to stop; all workers agreed to

    @staticmethod
    def is_inner(name: str, parameter: Tensor) -> bool:
        """What Muon trains: the blocks' matrices. The merger's large one would cost it as much as all of them."""
        return parameter.ndim == 2 and "embed" not in name and "merger" not in name

    @property
    def parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer]:
        return {"network": self.network, "head": self.head, "muon": self.muon, "adam": self.adam}

    def save(self, path: Path) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        temporary = path.with_suffix(".part")
        torch.save({**state, "step": self.step, "seconds": self.seconds}, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.head.parameters()]

    def share(self) -> None:
        """Adds up the workers' gradients, makes the first one's clock everybody's, and any one's wish to stop."""
        is_first = dist.get_rank() == 0
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        common = torch.tensor([self.seconds if is_first else 0.0, float(self.wants_stop)])
        flat = torch.cat([*(piece.flatten() for piece in pieces), common])
        dist.all_reduce(flat)
        self.seconds, self.is_stopping = float(flat[-2]), bool(flat[-1])
        for parameter, piece in zip(
            self.parameters, flat[:-2].split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = piece.view_as(parameter)

    def update(
        self, batch: Batch, learning_rate: float, tokenizer: Tokenizer, *, with_text: bool
    ) -> tuple[dict[str, float], Hits]:
        """One optimiser step on the workers' batches together. Returns this one's losses by name and kind of batch, and hits."""
        parts, hits = losses(self.network, self.head, batch, tokenizer, with_text=with_text)
        torch.stack([value * WEIGHTS[name] for name, value in parts.items()]).sum().backward()
        self.share()
        tower, decoder, others = (*self.muon.param_groups, *self.adam.param_groups)
        tower["lr"] = others["lr"] = learning_rate
        decoder["lr"] = learning_rate * DECODER_FACTOR
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step()
        self.adam.step()
        self.network.zero_grad()
        self.head.zero_grad()
        self.step += 1
        return {f"{name} {batch.kind}": value.item() for name, value in parts.items()}, hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/nano"), help="folder of checkpoints and the log")
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--minutes", type=float, default=180, help="training time in all, resumed parts included")
    parser.add_argument(
        "--tower-minutes", type=float, default=12, help="of which the tower alone, on the dense targets"
    )
    parser.add_argument("--peak-rate", type=float, default=PEAK_RATE, help="learning rate; lower for a reopened run")
    parser.add_argument("--threads", type=int, default=1, help="of each of the two workers")
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    tokenizer_path = arguments.run / "tokenizer.json"
    if not tokenizer_path.exists():
        demo_tokenizer.build(SEED).save(str(tokenizer_path))
    # A stopped run's, in which the workers would wait for the dead.
    (arguments.run / MEETING_FILE).unlink(missing_ok=True)
    workers = multiprocessing.spawn(work, args=(arguments,), nprocs=NUM_WORKERS, join=False)

    def stop(*_: object) -> None:  # each worker ends after its step
        for process in workers.processes:
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    while not workers.join():
        pass


def work(rank: int, arguments: argparse.Namespace) -> None:
    """One of the two workers: both hold the model, each has its own batch in every step, and their gradients add up."""
    torch.set_num_threads(arguments.threads)
    meeting = f"file://{(arguments.run / MEETING_FILE).absolute()}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_WORKERS)
    run = Run(arguments)
    signal.signal(signal.SIGTERM, lambda *_: setattr(run.training, "wants_stop", True))
    run.go()


class Run:
    """One worker's training from wherever the last stop left it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.run
        self.minutes: float = arguments.minutes
        self.tower_minutes: float = arguments.tower_minutes
        self.peak_rate: float = arguments.peak_rate
        self.is_first = dist.get_rank() == 0
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        compile_halves()
        self.training = Training(demo_config(self.tokenizer, arguments.size))
        if self.checkpoint.exists():
            self.training.load(self.checkpoint)
        self.balance = Balance(self.folder / ERRORS_FILE)
        packer = Packer(self.tokenizer, self.training.network.config.vision.tokens_per_second)
        self.held_out = BatchSource(packer, SEED, lambda: START_WEIGHTS, test=True)
        stream = Stream(BatchSource(packer, SEED, self.balance, test=False), self.training.step, dist.get_rank())
        self.batches = iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4))
        self.log = (self.folder / "log.jsonl").open("a")

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def go(self) -> None:
        try:
            self.train()
        finally:
            self.save()
        if not self.training.is_stopping:
            self.judge()

    def save(self) -> None:
        if self.is_first:
            self.training.save(self.checkpoint)

    def report(self, **values: object) -> None:
        if self.is_first:
            line = json.dumps({"step": self.training.step, "minutes": round(self.training.seconds / 60, 2), **values})
            print(line, flush=True)
            self.log.write(line + "\n")
            self.log.flush()

    def judge(self) -> None:
        with torch.compiler.set_stance("force_eager"):
            self.report(held_out=held_out_accuracy(self.training.network, self.held_out, self.tokenizer))

    def train(self) -> None:
        training = self.training
        sums: dict[str, list[float]] = defaultdict(list)
        hits: Hits = defaultdict(list)
        # `elapsed` is the clock that `share` made everybody's: what all workers must decide alike is decided by it.
        elapsed = last_saved = last_judged = training.seconds
        clock = time.perf_counter()
        while elapsed < 60 * self.minutes and not training.is_stopping:
            with_text = elapsed >= 60 * self.tower_minutes
            learning_rate = rate(training.step, elapsed / 60 / self.minutes, self.peak_rate)
            values, right = training.update(next(self.batches), learning_rate, self.tokenizer, with_text=with_text)
            elapsed = training.seconds
            now = time.perf_counter()
            training.seconds += min(now - clock, LONGEST_STEP)
            clock = now
            for name, value in values.items():
                sums[name].append(value)
            for task, answers in right.items():
                hits[task] += answers
            if training.step % REPORT_EVERY == 0:
                self._report(sums, hits)
                sums.clear()
                hits.clear()
            if elapsed - last_saved > 240:
                self.save()
                last_saved = elapsed
            if elapsed - last_judged > 60 * HELD_OUT_EVERY:
                self.judge()
                last_judged, clock = elapsed, time.perf_counter()

    def _report(self, sums: Mapping[str, list[float]], hits: Mapping[str, list[bool]]) -> None:
        means = {name: round(sum(v) / len(v), 4) for name, v in gathered(sums).items()}
        accuracies = accuracy(gathered(hits))
        if self.is_first:
            self.balance.update(accuracies)
        self.report(**means, right=accuracies)


if __name__ == "__main__":
    main()
