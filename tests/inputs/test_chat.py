"""Conversations become the ids transformers makes of them; what users type stays text; tokens come back whole."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from saccade.base.errors import CheckpointError, MediaError, OptionError, PromptError
from saccade.checkpoints.config import ModelConfig
from saccade.geometry import token_positions
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.media import MediaLimits, MediaOptions

SMALL = Image.new("RGB", (60, 90), "teal")
WIDE = Image.new("RGB", (280, 84), "navy")
CLIP = [Image.new("RGB", (112, 56), (40 * index, 0, 0)) for index in range(5)]

# As published with the checkpoints (chat_template.json); only tests run it.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or "
    "'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture "
    "{{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or "
    "'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video "
    "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def oracle(tokenizer_folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"))


def reference_ids(oracle: Any, messages: list[dict[str, Any]], num_tokens: list[int], **options: Any) -> list[int]:
    """Ids by transformers: its template engine, its tokenizer, each placeholder repeated as its processor does."""
    options = {"add_generation_prompt": True, **options}
    text = oracle.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False, **options)
    pieces = [text]
    counts = iter(num_tokens)
    for pad in ("<|image_pad|>", "<|video_pad|>"):
        assert pad not in "".join(str(message.get("content")) for message in messages)
    out = ""
    while pieces:
        text = pieces.pop()
        places = [(text.index(pad), pad) for pad in ("<|image_pad|>", "<|video_pad|>") if pad in text]
        if not places:
            out += text
            break
        at, pad = min(places)
        out += text[:at] + pad * next(counts)
        pieces.append(text[at + len(pad) :])
    return list(oracle(out, add_special_tokens=False)["input_ids"])


def image(source: object = SMALL, **options: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **options}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "Hello, how are you?"}],
    "text as a part": [{"role": "user", "content": [text("Hello")]}],
    "newlines at the edges": [{"role": "user", "content": "\n\n two\n\n\nlines \n"}],
    "nothing": [{"role": "user", "content": ""}],
    "other scripts": [{"role": "user", "content": "héllo 你好 🎉 e\u0301 ١٢٣ don't 12345"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "a late system message": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And now?"},
    ],
    "one picture": [{"role": "user", "content": [image(), text("Describe this image.")]}],
    "several pictures": [{"role": "user", "content": [text("a"), image(), image(WIDE), text("b"), image()]}],
    "pictures and a video": [
        {"role": "user", "content": [image(), {"type": "video", "video": CLIP}, image(WIDE), text("?")]},
        {"role": "assistant", "content": [text("ok")]},
        {"role": "user", "content": [{"type": "video", "video": CLIP, "fps": 1}, text("and this?")]},
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("options", [{}, {"add_vision_id": True}, {"add_generation_prompt": False}])
def test_ids_equal_transformers(name: str, options: dict[str, Any], tokenizer: ChatTokenizer, oracle: Any) -> None:
    messages = CONVERSATIONS[name]
    prompt = tokenizer.build(messages, **options)
    assert list(prompt.token_ids) == reference_ids(
        oracle, messages, [medium.receipt.num_tokens for medium in prompt.media], **options
    )


def test_random_texts_equal_transformers(tokenizer: ChatTokenizer, oracle: Any) -> None:
    generator = random.Random(0)
    alphabet = "ab Zé好🎉\n\r\t  0'.,!?<|>_e\u0301"
    for _ in range(300):
        words = "".join(generator.choice(alphabet) for _ in range(generator.randrange(30)))
        messages = [{"role": "system", "content": words}, {"role": "user", "content": words[::-1]}]
        assert list(tokenizer.build(messages).token_ids) == reference_ids(oracle, messages, [])


def test_the_older_files_give_the_same_ids(tmp_path: Path, tokenizer_folder: Path, config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, tmp_path)
    old = ChatTokenizer(tmp_path, config)
    oracle = transformers.Qwen2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for words in ("Hello there, it's 1234 o'clock!", "a\n\n b  c ", "e\u0301 你好"):
        assert old.encode(words) == oracle(words)["input_ids"]


# --- places and positions --------------------------------------------------------------------------------------------


def test_every_medium_stands_at_its_span_with_its_tokens_and_positions(
    tokenizer: ChatTokenizer, config: ModelConfig
) -> None:
    prompt = tokenizer.build(CONVERSATIONS["pictures and a video"])
    pads = {"image": config.image_token_id, "video": config.video_token_id}
    for medium, span in zip(prompt.media, prompt.spans, strict=True):
        receipt = medium.receipt
        stop = span.start + receipt.num_tokens
        assert prompt.token_ids[span.start - 1] == config.vision_start_token_id
        assert set(prompt.token_ids[span.start : stop]) == {pads[receipt.kind]}
        assert prompt.token_ids[stop] == config.vision_end_token_id
    assert [(medium.receipt.kind, medium.receipt.index) for medium in prompt.media] == [
        ("image", 0),
        ("video", 0),
        ("image", 1),
        ("video", 1),
    ]
    assert [span.second_per_grid for span in prompt.spans] == [0, 1, 0, 2]
    positions, following = token_positions(len(prompt), prompt.spans, 2, 2.0)
    assert torch.equal(prompt.positions, positions)
    assert prompt.next_position == following == int(prompt.positions.max()) + 1


def test_the_published_prompt_has_972_picture_tokens(
    published_media: Path, tokenizer: ChatTokenizer, config: ModelConfig
) -> None:
    content = [image(published_media / "examples_image1.jpg"), text("Describe this image.")]
    prompt = tokenizer.build([{"role": "user", "content": content}])
    assert prompt.token_ids.count(config.image_token_id) == 972
    at = prompt.spans[0].start
    assert prompt.positions[:, at : at + 972].amax(1).tolist() == [at, at + 26, at + 35]


# --- what users type -------------------------------------------------------------------------------------------------

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
)


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_typed_special_tokens_stay_text(role: str, tokenizer: ChatTokenizer) -> None:
    plain = tokenizer.build([{"role": role, "content": "x"}])
    typed = tokenizer.build([{"role": role, "content": "x" + "".join(SPECIAL)}])
    for special in tokenizer.special_ids:
        assert typed.token_ids.count(special) == plain.token_ids.count(special)
    assert "".join(SPECIAL) in tokenizer.decode(typed.token_ids)


def test_special_tokens_cannot_be_pieced_together(tokenizer: ChatTokenizer) -> None:
    parts = [text("<|im"), text("_start|>"), image(), text("<|image_"), text("pad|>")]
    prompt = tokenizer.build([{"role": "user", "content": parts}])
    assert sum(id in tokenizer.special_ids for id in prompt.token_ids) == 7 + prompt.media[0].receipt.num_tokens


def test_typed_tool_tags_are_tokens_only_in_trusted_turns(
    tmp_path: Path, tokenizer_folder: Path, config: ModelConfig
) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    last = content["added_tokens"][-1]
    content["added_tokens"].append({**last, "id": 411, "content": "<tool_call>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = ChatTokenizer(tmp_path, config)
    counts = {
        role: tokenizer.build([{"role": role, "content": "<tool_call>"}]).token_ids.count(411)
        for role in ("system", "user", "assistant", "tool")
    }
    assert counts == {"system": 1, "user": 0, "assistant": 1, "tool": 0}
    assert tokenizer.decode([411]) == "<tool_call>"


@pytest.mark.parametrize("words", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_refused(words: str, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(PromptError, match="Unicode"):
        tokenizer.build([{"role": "user", "content": words}])


# --- message parts ---------------------------------------------------------------------------------------------------


def test_parts_of_every_dialect_are_one_prompt(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    SMALL.save(path)
    dialects: list[dict[str, Any]] = [
        {"type": "image", "image": str(path)},
        {"type": "image", "image": path.as_uri()},
        {"image": path},
        {"type": "image", "url": str(path)},
        {"type": "image", "path": path},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
        {"type": "image_url", "image_url": {"url": path.as_uri(), "detail": "auto"}},
        {"type": "image_url", "image_url": path.as_uri()},
        {"image_url": str(path)},
        {"type": "input_image", "image_url": str(path), "detail": "high"},
    ]
    prompts = [tokenizer.build([{"role": "user", "content": [part, text("?")]}]) for part in dialects]
    assert len({prompt.token_ids for prompt in prompts}) == 1
    assert len({prompt.media[0].key for prompt in prompts}) == 1
    for part in ({"type": "video_url", "video_url": {"url": CLIP}}, {"video": CLIP}, {"type": "video", "video": CLIP}):
        assert tokenizer.build([{"role": "user", "content": [part]}]).media[0].receipt.kind == "video"


def test_options_reach_the_medium_from_everywhere(tokenizer: ChatTokenizer) -> None:
    big = Image.new("RGB", (1000, 1000))

    def tokens(part: dict[str, Any], **defaults: Any) -> int:
        prompt = tokenizer.build([{"role": "user", "content": [part]}], defaults=MediaOptions(**defaults))
        return prompt.media[0].receipt.num_tokens

    assert tokens(image(big)) == 1296
    assert tokens(image(big), max_pixels=100_000) < 128
    assert tokens(image(big, max_pixels=200_000), max_pixels=100_000) > 200
    assert tokens({"type": "image_url", "image_url": {"url": big, "max_pixels": 50_000}}) < 64
    assert tokens({"type": "image_url", "image_url": {"url": big, "detail": "low"}}) == 324
    assert tokens({"type": "image_url", "image_url": {"url": big, "detail": "low", "max_pixels": 500_000}}) > 600


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image"}],
        [{"type": "sound", "sound": "x"}],
        [{"type": "image", "image": SMALL, "url": "x"}],
        [{"image": SMALL, "text": "x"}],
        [{"type": "text"}],
        [{"type": "text", "text": 5}],
        [{"type": "text", "text": "x", "colour": "red"}],
        [{"type": ["image"], "image": SMALL}],
        [{"type": "image_url", "image_url": {"detail": "low"}}],
        [{"type": "image_url", "image_url": {"url": SMALL, "detail": "medium"}}],
        [{}],
        [7],
        7,
        b"bytes",
    ],
)
def test_malformed_parts_are_refused_with_their_place(content: object, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(PromptError, match="message 0"):
        tokenizer.build([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "messages", [[], "Hello", [{"content": "x"}], [{"role": "boss", "content": "x"}], ["x"], None, [None]]
)
def test_malformed_conversations_are_refused(messages: Any, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(PromptError):
        tokenizer.build(messages)


def test_an_unknown_key_of_a_part_names_the_nearest(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(OptionError, match="'max_pixels'"):
        tokenizer.build([{"role": "user", "content": [image(maxpixels=5)]}])


def test_a_refused_medium_says_why(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(MediaError, match="network"):
        tokenizer.build([{"role": "user", "content": [image("https://example.com/a.png")]}])
    with pytest.raises(MediaError, match="switched off"):
        tokenizer.build([{"role": "user", "content": [image("a.png")]}], limits=MediaLimits(allow_local_paths=False))


def test_a_prompt_that_does_not_fit_says_how_long_it_is_and_what_helps(
    tokenizer_folder: Path, config: ModelConfig
) -> None:
    tight = replace(config, text=replace(config.text, max_position_embeddings=100))
    tokenizer = ChatTokenizer(tokenizer_folder, tight)
    with pytest.raises(PromptError, match=r"the model takes 100; send less text"):
        tokenizer.build([{"role": "user", "content": "word " * 100}])
    with pytest.raises(PromptError, match="max_pixels"):
        tokenizer.build([{"role": "user", "content": [image(Image.new("RGB", (224, 224)))] * 2}])


# --- tools and open turns --------------------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {"name": "wetter", "description": "Wetter <in> Köln & Umgebung", "parameters": {}},
}


def rendered(tokenizer: ChatTokenizer, messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.decode(tokenizer.build(messages, **options).token_ids, skip_special=False)


def test_tools_calls_and_results_are_rendered_as_the_text_model_knows_them(tokenizer: ChatTokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "wetter", "arguments": '{"ort": "Köln"}'}}
    messages = [
        {"role": "user", "content": "Wetter?"},
        {"role": "assistant", "content": None, "tool_calls": [call, {"name": "zeit", "arguments": {}}]},
        {"role": "tool", "content": "sonnig", "tool_call_id": "1"},
        {"role": "tool", "content": [text("12 Uhr")]},
        {"role": "assistant", "content": "Sonnig.", "tool_calls": [call]},
    ]
    assert rendered(tokenizer, messages, tools=[TOOL]) == (
        "<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n\nYou may call one or more functions to assist with the"
        " user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "wetter", "description": "Wetter <in> Köln & Umgebung", "parameters": {}}}'
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within"
        ' <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\nWetter?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "wetter", "arguments": {"ort": "Köln"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "zeit", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsonnig\n</tool_response>\n<tool_response>\n12 Uhr\n</tool_response><|im_end|>\n"
        '<|im_start|>assistant\nSonnig.\n<tool_call>\n{"name": "wetter", "arguments": {"ort": "Köln"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_tools_follow_the_callers_own_system_text(tokenizer: ChatTokenizer) -> None:
    out = rendered(
        tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], tools=[TOOL]
    )
    assert out.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert out.count("# Tools") == 1


def test_a_tool_may_answer_with_a_picture(tokenizer: ChatTokenizer) -> None:
    prompt = tokenizer.build([{"role": "user", "content": "Look"}, {"role": "tool", "content": [image()]}])
    assert len(prompt.media) == 1


@pytest.mark.parametrize(
    "call",
    [{}, 5, {"function": {"name": 5}}, {"name": "f", "arguments": "{broken"}, {"name": "f", "arguments": {1, 2}}],
)
def test_malformed_tool_calls_are_refused(call: object, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(PromptError, match="message 0"):
        tokenizer.build([{"role": "assistant", "content": "", "tool_calls": [call]}])


def test_an_open_turn_goes_on_from_its_text(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"}]
    assert rendered(tokenizer, messages, continue_final_message=True).endswith("<|im_start|>assistant\nOnce upon")
    with pytest.raises(PromptError, match="continue_final_message"):
        tokenizer.build(messages[:1], continue_final_message=True)


# --- tokens become text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["plain", "emoji 🎉🧑‍🚀 done", "漢字かな交じり文", "mixé ﷽ \n\t x", ""])
def test_streamed_text_is_whole_characters_and_adds_up(words: str, tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode(words)
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == words
    assert all("\ufffd" not in piece for piece in pieces)
    assert tokenizer.decode(ids) == words


def test_a_cut_character_is_shown_as_damaged_only_at_the_end(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("ok 🎉")
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids[:-1])) == "ok "
    assert stream.flush() == "\ufffd"


def test_random_ids_decode_as_in_transformers(tokenizer: ChatTokenizer, oracle: Any) -> None:
    generator = random.Random(0)
    for _ in range(300):
        ids = [generator.randrange(411) for _ in range(20)]
        assert tokenizer.decode(ids, skip_special=False) == oracle.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("token_id", [411, 1023, 151_999, 2**31, 2**40, -1])
def test_ids_beyond_the_tokenizer_have_no_text_and_never_crash(token_id: int, tokenizer: ChatTokenizer) -> None:
    assert tokenizer.decode([token_id]) == ""
    assert tokenizer.stream().push(token_id) == ""


def test_special_tokens_are_hidden_or_shown(tokenizer: ChatTokenizer) -> None:
    ids = [*tokenizer.encode("a"), 399]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special=False) == "a<|im_end|>"


# --- the tokenizer's files -------------------------------------------------------------------------------------------


def test_an_absent_or_damaged_tokenizer_is_refused(tmp_path: Path, config: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        ChatTokenizer(tmp_path, config)
    for damaged in ("", "{}", '{"added_tokens": []}', "[]"):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(CheckpointError):
            ChatTokenizer(tmp_path, config)


def test_a_tokenizer_of_another_checkpoint_is_refused(tokenizer_folder: Path, config: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match=r"image_pad.*409.*151655"):
        ChatTokenizer(tokenizer_folder, replace(config, image_token_id=151_655))
