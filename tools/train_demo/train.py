"""Trains the demo model: python -m tools.train_demo.train --run runs/demo --minutes 90

Knows the recipe: the model's size, losses, optimisers, schedule and checkpoints. Stopping and starting again resumes; the
clock that drives the learning rate counts training minutes only. Loss and held-out accuracy go to RUN/log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader, IterableDataset

from saccade.checkpoints.config import GenerationConfig, ModelConfig, PreprocessingConfig, TextConfig, VisionConfig
from tools.train_demo import tokenizer as demo_tokenizer
from tools.train_demo.batches import Batch, BatchSource, Packer, patch_rows, training_batches
from tools.train_demo.dense import DenseHead
from tools.train_demo.network import Network, compile_halves

SEED = 2025
NUM_WORKERS = 2
MEETING_FILE = "workers"
REPORT_EVERY = 30  # steps
WORKING_DTYPE = torch.bfloat16  # of activations; weights are float32 until they are exported
PEAK_RATE = 1e-3
DECODER_FACTOR = 2.0  # the decoder's matrices learn faster
WARMUP_STEPS = 60
DECAY_SHARE = 0.45  # of the training time, at the end, in which the rate falls to FINAL_RATE
FINAL_RATE = 0.03
WEIGHTS = {"answer": 1.0, "kind": 0.5, "colour": 0.5, "box": 0.3, "edges": 0.3, "characters": 0.8, "place": 0.1}
HELD_OUT_KINDS = ("picture", "picture", "picture", "pair", "clip", "clip")


def demo_config(tokenizer: Tokenizer) -> ModelConfig:
    """The published architecture in small."""
    token = tokenizer.token_to_id
    vision = VisionConfig(
        hidden_size=256,
        out_hidden_size=256,
        depth=6,
        num_heads=4,
        intermediate_size=688,
        fullatt_block_indexes=(2, 5),
        tokens_per_second=2.0,
    )
    text = TextConfig(
        vocab_size=demo_tokenizer.VOCAB_SIZE,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=704,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        mrope_section=(8, 12, 12),
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    return ModelConfig(
        vision,
        text,
        PreprocessingConfig(
            min_pixels=112 * 112, max_pixels=168 * 168, video_min_pixels=112 * 112, video_max_pixels=112 * 140
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


def losses(network: Network, head: DenseHead, batch: Batch, *, with_text: bool) -> dict[str, Tensor]:
    seen = see(network, batch)
    result: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for units, group in zip(seen, batch.groups, strict=True):
        for name, value in head.losses(units, group.dense).items():
            result[name] = result[name] + value / len(batch.groups)
    if with_text:
        result["answer"] = F.cross_entropy(answer_logits(network, batch, seen), batch.token_ids[batch.is_answer])
    return result


@torch.no_grad()
def held_out_accuracy(network: Network, batches: list[Batch]) -> dict[str, float]:
    """Share of answers, by task, whose every token is the likeliest one: what greedy decoding would write."""
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in batches:
        logits = answer_logits(network, batch, see(network, batch))
        hit = torch.zeros_like(batch.is_answer)
        hit[batch.is_answer] = logits.argmax(-1) == batch.token_ids[batch.is_answer]
        for q in batch.questions:
            right[q.turn.task].append(bool(hit[q.row, q.start : q.end].all()))
    return {task: round(sum(hits) / len(hits), 3) for task, hits in sorted(right.items())}


# --- the run ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):  # type: ignore[type-arg]
    """One worker's batch of every step, drawn in a process of its own."""

    def __init__(self, source: BatchSource, first_step: int, rank: int) -> None:
        self.arguments = source, first_step, rank

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        return training_batches(*self.arguments)


def rate(step: int, progress: float) -> float:
    """Learning rate: warm-up by steps, level, then a straight fall over the last DECAY_SHARE of the time."""
    fall = min(1.0, max(0.0, (1 - progress) / DECAY_SHARE))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_RATE + (1 - FINAL_RATE) * fall)


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
        """Adds up the workers' gradients, and makes the first one's clock everybody's."""
        is_first = dist.get_rank() == 0
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        clock = torch.tensor([self.seconds if is_first else 0.0])
        flat = torch.cat([*(piece.flatten() for piece in pieces), clock])
        dist.all_reduce(flat)
        self.seconds = float(flat[-1])
        for parameter, piece in zip(
            self.parameters, flat[:-1].split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = piece.view_as(parameter)

    def update(self, batch: Batch, learning_rate: float, *, with_text: bool) -> dict[str, float]:
        """One optimiser step on the workers' batches together. Returns this one's losses by name and kind of batch."""
        parts = losses(self.network, self.head, batch, with_text=with_text)
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
        return {f"{name} {batch.kind}": value.item() for name, value in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of checkpoints and the log")
    parser.add_argument("--minutes", type=float, default=115, help="training time in all, resumed parts included")
    parser.add_argument(
        "--tower-minutes", type=float, default=12, help="of which the tower alone, on the dense targets"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each of the two workers")
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    tokenizer_path = arguments.run / "tokenizer.json"
    if not tokenizer_path.exists():
        demo_tokenizer.build(SEED).save(str(tokenizer_path))
    (arguments.run / MEETING_FILE).unlink(
        missing_ok=True
    )  # a stopped run's, in which the workers would wait for the dead
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
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    meeting = f"file://{(arguments.run / MEETING_FILE).absolute()}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_WORKERS)
    tokenizer = Tokenizer.from_file(str(arguments.run / "tokenizer.json"))
    compile_halves()
    training = Training(demo_config(tokenizer))
    checkpoint = arguments.run / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    packer = Packer(tokenizer, training.network.config.vision.tokens_per_second)
    stream = Stream(BatchSource(packer, SEED, "train"), training.step, rank)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4))
    log = (arguments.run / "log.jsonl").open("a")

    def report(**values: object) -> None:
        line = json.dumps({"step": training.step, "minutes": round(training.seconds / 60, 2), **values})
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    try:
        train(training, batches, report, checkpoint, arguments, stopping)
        if rank == 0:
            source = BatchSource(packer, SEED, "held out")
            held_out = [source(kind, index) for index, kind in enumerate(HELD_OUT_KINDS)]
            with torch.compiler.set_stance("force_eager"):
                report(held_out=held_out_accuracy(training.network, held_out))
    finally:  # also when stopped
        if rank == 0:
            training.save(checkpoint)


def train(
    training: Training,
    batches: Iterator[Batch],
    report: Callable[..., None],
    checkpoint: Path,
    arguments: argparse.Namespace,
    stopping: threading.Event,
) -> None:
    sums: dict[str, list[float]] = defaultdict(list)
    clock, last_saved = time.perf_counter(), training.seconds
    while (progress := training.seconds / 60 / arguments.minutes) < 1 and not stopping.is_set():
        with_text = training.seconds >= 60 * arguments.tower_minutes
        values = training.update(next(batches), rate(training.step, progress), with_text=with_text)
        now = time.perf_counter()
        training.seconds += now - clock
        clock = now
        for name, value in values.items():
            sums[name].append(value)
        if training.step % REPORT_EVERY == 0:
            gathered: list[dict[str, list[float]]] = [{} for _ in range(NUM_WORKERS)]
            dist.all_gather_object(gathered, dict(sums))
            if dist.get_rank() == 0:
                together = {name: v for part in gathered for name, v in part.items()}
                report(**{name: round(sum(v) / len(v), 4) for name, v in sorted(together.items())})
            sums.clear()
        if training.seconds - last_saved > 120:
            if dist.get_rank() == 0:
                training.save(checkpoint)
            last_saved = training.seconds


if __name__ == "__main__":
    main()
