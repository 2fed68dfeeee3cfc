"""The engine: together or one by one, cached or not, in chunks or whole, the answers are the same; and every request ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from saccade import LLM, SamplingParams
from saccade.base.errors import MediaError, OptionError, PromptError
from tests.parity.test_transformers import clip, picture

Open = Callable[..., LLM]
GREEDY = SamplingParams(max_tokens=24, temperature=0, repetition_penalty=1.0, ignore_eos=True)


def conversation(seed: int) -> list[dict[str, Any]]:
    """Text, a picture, two pictures, a clip: what there is depends on the seed, and so do sizes and lengths."""
    words = {"type": "text", "text": " ".join(["tell me more"] * (1 + seed * 7 % 23))}
    pictures = [
        {"type": "image", "image": picture(56 + 28 * (seed % 5), 84 + 28 * (seed % 3), seed + i)} for i in range(2)
    ]
    video = {"type": "video", "video": clip(56, 84, 2 + seed % 4, seed), "fps": 1.0 + seed % 3, "min_pixels": 3136}
    content = [[words], [pictures[0], words], [words, *pictures], [video, words], [pictures[1], video, words]][seed % 5]
    return [{"role": "user", "content": content}]


def told(outputs: list[Any]) -> list[Any]:
    """All that is said of every answer but its probabilities."""
    return [
        [(answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason) for answer in output.outputs]
        for output in outputs
    ]


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def one_by_one(open_tiny: Open) -> list[list[int]]:
    llm = open_tiny(prefix_cache=False)
    return [tokens(llm.chat(conversation(seed), GREEDY))[0] for seed in range(64)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_tokens": 640, "block_size": 8},  # too small for all of them: requests wait and are preempted
        {"max_tokens_per_step": 48},  # prompts in chunks, pictures cut across steps
        {
            "kv_cache_tokens": 512,
            "block_size": 4,
            "max_tokens_per_step": 33,
            "encoder_cache_bytes": 0,
            "max_running": 7,
        },
        {"prefix_cache": False, "block_size": 1, "kv_cache_tokens": 900},
    ],
    ids=["roomy", "small cache", "chunks", "everything small", "blocks of one"],
)
def test_64_mixed_requests_answer_as_one_by_one(
    open_tiny: Open, one_by_one: list[list[int]], options: dict[str, Any]
) -> None:
    llm = open_tiny(**options)
    assert tokens(llm.chat([conversation(seed) for seed in range(64)], GREEDY)) == one_by_one
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks, "blocks leaked"
    if options.get("kv_cache_tokens", 8192) == 640:
        assert llm.engine.scheduler.num_preemptions > 0, "the cache was not too small; the test tests nothing"


@pytest.mark.parametrize("block_size", [1, 8])
def test_a_known_prefix_is_computed_once(open_tiny: Open, block_size: int) -> None:
    llm = open_tiny(block_size=block_size)
    cold = llm.chat(conversation(1), GREEDY)[0]
    warm = llm.chat(conversation(1), GREEDY)[0]
    assert cold.num_cached_tokens == 0
    # The last token is always computed: its row yields the answer's first.
    assert warm.num_cached_tokens == (len(warm.prompt_token_ids) - 1) // block_size * block_size
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


def test_two_pictures_of_one_size_are_not_mistaken_for_each_other(open_tiny: Open) -> None:
    def ask(llm: LLM, seed: int) -> list[int]:
        parts = [{"type": "image", "image": picture(112, 112, seed)}, {"type": "text", "text": "What is this?"}]
        return tokens(llm.chat([{"role": "user", "content": parts}], GREEDY))[0]

    llm = open_tiny(block_size=4)
    answers = [ask(llm, seed) for seed in (1, 2)]
    assert answers[0] != answers[1]
    assert answers == [ask(open_tiny(prefix_cache=False), seed) for seed in (1, 2)]


def test_a_shared_picture_is_embedded_once(open_tiny: Open) -> None:
    llm = open_tiny()
    parts = {"type": "image", "image": picture(112, 84, 3)}
    conversations = [
        [{"role": "user", "content": [parts, {"type": "text", "text": f"Question {i}"}]}] for i in range(5)
    ]
    llm.chat(conversations, GREEDY)
    assert llm.engine.runner.num_encoded == 1


def test_the_encoder_cache_stays_within_its_bytes(open_tiny: Open) -> None:
    llm = open_tiny(encoder_cache_bytes=20_000)
    llm.chat([conversation(1 + 5 * i) for i in range(12)], GREEDY)
    assert 0 < llm.engine.runner.encoder_cache.size_bytes <= 20_000


def test_n_answers_share_a_prompt_and_differ_by_seed(open_tiny: Open) -> None:
    llm = open_tiny()
    params = SamplingParams(n=3, seed=11, temperature=1.5, max_tokens=12, ignore_eos=True)
    together = llm.chat(conversation(2), params)[0]
    assert len({tuple(answer.token_ids) for answer in together.outputs}) == 3
    third = llm.chat(conversation(2), dataclasses.replace(params, n=1, seed=13))[0]
    assert together.outputs[2].token_ids == third.outputs[0].token_ids


def test_a_seeded_answer_does_not_depend_on_its_neighbours(open_tiny: Open) -> None:
    llm = open_tiny()
    params = SamplingParams(seed=3, temperature=1.0, max_tokens=16, ignore_eos=True)
    alone = tokens(llm.chat(conversation(4), params))[0]
    among = tokens(llm.chat([conversation(seed) for seed in (0, 4, 7)], [GREEDY, params, GREEDY]))[1]
    assert alone == among


def test_generation_ends_at_a_stop_text_and_leaves_it_out(open_tiny: Open) -> None:
    llm = open_tiny()
    whole = llm.chat(conversation(0), GREEDY)[0].outputs[0].text
    stop = whole[3:6]
    answer = llm.chat(conversation(0), dataclasses.replace(GREEDY, stop=(stop,)))[0].outputs[0]
    assert answer.finish_reason == "stop"
    assert answer.stop_reason == stop
    assert answer.text == whole[: whole.index(stop)]


def test_a_stop_text_before_min_tokens_does_not_count(open_tiny: Open) -> None:
    llm = open_tiny()
    whole = llm.chat(conversation(0), GREEDY)[0].outputs[0].text
    params = dataclasses.replace(GREEDY, stop=(whole[0],), min_tokens=GREEDY.max_tokens - 1)
    answer = llm.chat(conversation(0), params)[0].outputs[0]
    assert len(answer.token_ids) >= GREEDY.max_tokens - 1
    assert answer.text.startswith(whole[:8])


def test_generation_ends_at_a_stop_token(open_tiny: Open) -> None:
    llm = open_tiny()
    ids = tokens(llm.chat(conversation(0), GREEDY))[0]
    answer = llm.chat(conversation(0), dataclasses.replace(GREEDY, stop_token_ids=(ids[4],)))[0].outputs[0]
    assert answer.token_ids == ids[: ids.index(ids[4]) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", ids[4])


def test_logprobs_tell_what_was_chosen(open_tiny: Open) -> None:
    llm = open_tiny()
    output = llm.chat(conversation(1), dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=1))[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert [entries[0].token_id for entries in answer.logprobs] == answer.token_ids
    assert all(entries[0].rank == 1 and entries[0] == entries[1] for entries in answer.logprobs)  # greedy
    assert output.prompt_logprobs is not None
    assert [entries[0].token_id for entries in output.prompt_logprobs] == output.prompt_token_ids[1:]


def test_prompt_logprobs_are_the_same_in_chunks_and_after_preemption(open_tiny: Open) -> None:
    params = dataclasses.replace(GREEDY, prompt_logprobs=0)
    conversations = [conversation(seed) for seed in range(8)]
    whole = open_tiny().chat(conversations, params)
    small = open_tiny(max_tokens_per_step=31, kv_cache_tokens=400, block_size=8).chat(conversations, params)
    for a, b in zip(whole, small, strict=True):
        assert a.prompt_logprobs is not None
        assert b.prompt_logprobs is not None
        left, right = ([entries[0].logprob for entries in o] for o in (a.prompt_logprobs, b.prompt_logprobs))
        assert left == pytest.approx(right, abs=1e-3)


def test_streamed_pieces_make_up_the_text(open_tiny: Open) -> None:
    llm = open_tiny()
    expected = llm.chat(conversation(3), GREEDY)[0]
    updates = list(llm.stream(conversation(3), GREEDY))
    assert "".join(update.text for update in updates) == expected.outputs[0].text
    assert updates[-1].output is not None
    assert updates[-1].output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_stream_never_shows_the_beginning_of_a_stop_text(open_tiny: Open) -> None:
    llm = open_tiny()
    output = llm.chat(conversation(0), GREEDY)[0].outputs[0]
    second = len(llm.tokenizer.decode(output.token_ids[:1]))
    stop = output.text[second : second + 6]  # begins with a token of its own, and takes several
    params = dataclasses.replace(GREEDY, stop=(stop,))
    shown = "".join(update.text for update in llm.stream(conversation(0), params))
    assert shown == output.text[: output.text.index(stop)]


def test_closing_a_stream_frees_its_blocks_at_once(open_tiny: Open) -> None:
    llm = open_tiny()
    pool = llm.engine.scheduler.pool
    stream = llm.stream(conversation(1), dataclasses.replace(GREEDY, max_tokens=500))
    next(stream)
    assert pool.num_free < pool.num_blocks
    stream.close()
    assert pool.num_free == pool.num_blocks
    assert not llm.engine.has_work


def test_a_broken_picture_among_many_harms_no_other(open_tiny: Open, one_by_one: list[list[int]]) -> None:
    llm = open_tiny()
    broken = [
        {"role": "user", "content": [{"type": "image", "image": b"not a picture"}, {"type": "text", "text": "?"}]}
    ]
    outputs = llm.chat([conversation(0), broken, conversation(1)], GREEDY)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert "picture" in (outputs[1].outputs[0].error or "")
    assert tokens(outputs)[::2] == one_by_one[:2]
    with pytest.raises(MediaError):
        llm.chat(broken, GREEDY)


def test_a_prompt_that_cannot_fit_is_refused_and_one_that_fits_ends_at_the_limit(open_tiny: Open) -> None:
    llm = open_tiny(kv_cache_tokens=64, block_size=16)
    with pytest.raises(PromptError, match="kv_cache_tokens"):
        llm.chat(conversation(2), GREEDY)
    text = [{"role": "user", "content": "Hi"}]
    answer = llm.chat(text, dataclasses.replace(GREEDY, max_tokens=500, detect_repetition=False))[0]
    assert answer.outputs[0].finish_reason == "length"
    assert len(answer.prompt_token_ids) + len(answer.outputs[0].token_ids) == 64


def test_endless_repetition_ends_the_answer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A head that always says the same token."""
    llm = LLM(
        _edited(tiny_checkpoint, tmp_path, {"lm_head.weight": lambda w: torch.zeros_like(w)}),
        dtype="float32",
        device="cpu",
    )
    params = SamplingParams(max_tokens=2000, temperature=0)
    answer = llm.chat(conversation(0), params)[0].outputs[0]
    assert answer.finish_reason == "repetition"
    assert len(answer.token_ids) == 256
    free = llm.chat(conversation(0), dataclasses.replace(params, detect_repetition=False, max_tokens=300))[0].outputs[0]
    assert (free.finish_reason, len(free.token_ids)) == ("length", 300)


def test_non_finite_logits_end_the_request_with_an_error(tiny_checkpoint: Path, tmp_path: Path) -> None:

    llm = LLM(tiny_checkpoint, dtype="float32", device="cpu", kv_cache_tokens=4096)
    token = llm.tokenizer.encode("Z")[0]
    llm.engine.runner.model.language.embed_tokens.weight.values[token] = float("nan")
    poisoned, healthy = [[{"role": "user", "content": words}] for words in ("Z", "say hi")]
    outputs = llm.chat([poisoned, healthy], GREEDY)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
    assert "non-finite" in (outputs[0].outputs[0].error or "")
    assert outputs[0].outputs[0].token_ids == []


def test_weight_only_int8_answers_nearly_the_same(open_tiny: Open) -> None:
    exact, rounded = open_tiny(), open_tiny(quantization="w8a16")
    assert rounded.engine.runner.model.language.layers[0].mlp.down.weight.values.dtype == torch.int8
    params = dataclasses.replace(GREEDY, prompt_logprobs=0)
    left, right = (llm.chat(conversation(1), params)[0].prompt_logprobs for llm in (exact, rounded))
    assert left is not None
    assert right is not None
    errors = torch.tensor([a[0].logprob - b[0].logprob for a, b in zip(left, right, strict=True)])
    assert 0 < errors.abs().mean() < 0.15


def test_features_of_media_come_without_an_answer(open_tiny: Open) -> None:
    llm = open_tiny()
    features = llm.embed_media(conversation(4))
    assert [f.shape[0] for f in features] == [m.receipt.num_tokens for m in llm.prepare(conversation(4)).media]


def test_asking_is_one_call(open_tiny: Open) -> None:
    llm = open_tiny()
    output = llm.ask("What is this?", images=picture(60, 60, 1), sampling_params=GREEDY)
    assert output.media[0].model_size == (56, 56)
    assert output.timings.total_s > 0
    several = llm.ask("Compare.", images=[picture(60, 60, 1), Image.new("RGB", (90, 90))], sampling_params=GREEDY)
    assert [receipt.index for receipt in several.media] == [0, 1]


def test_messages_that_are_no_conversation_are_refused(open_tiny: Open) -> None:
    llm = open_tiny()
    for wrong in ("Hello", {"role": "user", "content": "Hello"}):
        with pytest.raises(PromptError, match="messages is"):
            llm.chat(wrong)  # type: ignore[arg-type]
    assert llm.chat([]) == []


def test_random_cancelling_loses_nothing(open_tiny: Open) -> None:
    """Requests come and go at random; the rest answer as alone, and every block comes back."""
    import random

    pick = random.Random(5)
    llm = open_tiny(kv_cache_tokens=700, block_size=8, max_tokens_per_step=100)
    alone = {seed: tokens(open_tiny().chat(conversation(seed), GREEDY))[0] for seed in range(10)}
    alive: dict[int, Any] = {}
    finished = 0
    for seed in [seed % 10 for seed in range(40)]:
        if seed not in alive:
            alive[seed] = llm.engine.add(llm.prepare(conversation(seed)), GREEDY)[0]
        for _ in range(pick.randrange(6)):
            llm.engine.step()
        if pick.random() < 0.3:
            victim = pick.choice(list(alive))
            llm.engine.cancel(alive.pop(victim))
        for done in [seed for seed, request in alive.items() if request.is_finished]:
            assert alive.pop(done).output_ids == alone[done]
            finished += 1
    for request in alive.values():
        llm.engine.cancel(request)
    assert finished > 5
    pool = llm.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks
    assert not llm.engine.has_work


def test_an_unknown_option_names_the_nearest(tiny_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'max_running'"):
        LLM(tiny_checkpoint, max_runing=3)
    with pytest.raises(OptionError, match="dtype 'bfloat61'"):
        LLM(tiny_checkpoint, dtype="bfloat61")
    with pytest.raises(OptionError, match="2 sampling_params for 1"):
        LLM(tiny_checkpoint).chat(conversation(0), [GREEDY, GREEDY])


def _edited(source: Path, target: Path, edits: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> Path:
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: edits.get(name, lambda t: t)(tensor) for name, tensor in tensors.items()}, target / "model.safetensors"
    )
    return target
