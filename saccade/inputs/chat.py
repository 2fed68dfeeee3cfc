"""Messages become a prompt: the chat template, the tokens, and the media where they belong. Tokens become text again.

Knows roles, message parts and token ids; knows no pixels. The published vision template is written out here: a template found
in a checkpoint is a program of whoever made the file, and the one that Qwen2.5-VL was trained with is this one (section 4),
with the text model's rendering of tools, which the published vision template leaves out. Both are text a reader can follow.
"""

from __future__ import annotations

import codecs
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from saccade.base.errors import CheckpointError, PromptError
from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Span, token_positions
from saccade.inputs.options import MediaLimits, MediaOptions
from saccade.inputs.pixels import prepare_image, prepare_video
from saccade.inputs.prompt import Medium, Prompt

DEFAULT_SYSTEM = "You are a helpful assistant."
TOOLS_HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
LOW_DETAIL_PIXELS = 512 * 512  # OpenAI's detail: low

# How Qwen2.5 cuts text before merging bytes (section 4); for folders that hold only vocab.json and merges.txt.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# --- message parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MediaPart:
    """A picture or video of a message: where it is, and what the part says about it."""

    kind: Literal["image", "video"]
    source: object
    options: Mapping[str, object]


# Keys that hold a source, by kind; the first is the one to use.
_SOURCES: dict[str, tuple[Literal["image", "video"], tuple[str, ...]]] = {
    "image": ("image", ("image", "url", "path")),
    "image_url": ("image", ("image_url",)),
    "input_image": ("image", ("image_url",)),
    "video": ("video", ("video", "url", "path")),
    "video_url": ("video", ("video_url",)),
}
_TEXT_TYPES = ("text", "input_text", "output_text")


def parse_content(content: object, where: str) -> list[str | MediaPart]:
    """The parts of a message's content: text, or a list of parts as qwen-vl-utils and the OpenAI API write them.

    A part is {"type": "text", "text": ...}, {"type": "image", "image": source, ...options}, {"type": "image_url",
    "image_url": url or {"url": ..., "detail": ...}}, the same for videos, or one of those without "type". Raises PromptError.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise PromptError(f"{where}: content is a {type(content).__name__}; give text or a list of parts")
    parts: list[str | MediaPart] = []
    for number, part in enumerate(content):
        parts.append(part if isinstance(part, str) else _parse_part(part, f"{where}, part {number}"))
    return parts


def _parse_part(part: object, where: str) -> str | MediaPart:
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} is a {type(part).__name__}; give a dict with a type")
    kind = part.get("type")
    if kind is None:
        kinds = [name for name in (*_SOURCES, "text") if name in part]
        if len(kinds) != 1:
            raise PromptError(f"{where} has no type and {len(kinds)} known keys; give it one of {_known_types()}")
        kind = kinds[0]
    if kind in _TEXT_TYPES:
        text = part.get("text")
        if not isinstance(text, str) or set(part) - {"type", "text"}:
            raise PromptError(f'{where}: a text part holds "text", a string, and nothing else; it has {sorted(part)}')
        return text
    if not isinstance(kind, str) or kind not in _SOURCES:
        raise PromptError(f"{where} has the unknown type {kind!r}; use one of {_known_types()}")
    medium, keys = _SOURCES[kind]
    present = [key for key in keys if part.get(key) is not None]
    if len(present) != 1:
        raise PromptError(f"{where}: a part of type {kind} needs one source, under {keys[0]!r}; it has {sorted(part)}")
    source = part[present[0]]
    options = {key: value for key, value in part.items() if key not in ("type", present[0])}
    if isinstance(source, Mapping):
        if source.get("url") is None:
            raise PromptError(f'{where}: {present[0]} holds no "url"')
        options |= {key: value for key, value in source.items() if key != "url"}
        source = source["url"]
    if medium == "image" and "detail" in options:
        detail = options.pop("detail")
        if detail not in (None, "low", "high", "auto"):
            raise PromptError(f"{where}: detail is {detail!r}; use low, high or auto")
        if detail == "low":
            options.setdefault("max_pixels", LOW_DETAIL_PIXELS)
    return MediaPart(medium, source, options)


def _known_types() -> str:
    return ", ".join([*_SOURCES, "text"])


# --- rendering -------------------------------------------------------------------------------------------------------


class _Rendering:
    """A prompt in the making: text still to be encoded, token ids, and media, in order.

    `template` is ours and may hold any added token. `trusted` text (system and assistant turns, tools) may hold added tokens
    that are not special, such as <tool_call>, which those turns do contain. Text typed by users and returned by tools
    becomes ordinary tokens whatever it spells.
    """

    def __init__(
        self, all_tokens: Mapping[str, int], ordinary_tokens: Mapping[str, int], *, add_vision_id: bool
    ) -> None:
        self.items: list[str | int | MediaPart] = []
        self._all, self._all_pattern = all_tokens, _alternatives(all_tokens)
        self._ordinary, self._ordinary_pattern = ordinary_tokens, _alternatives(ordinary_tokens)
        self._add_vision_id = add_vision_id
        self._counts = {"image": 0, "video": 0}

    def template(self, text: str) -> None:
        self._split(text, self._all_pattern, self._all)

    def trusted(self, text: str) -> None:
        self._split(text, self._ordinary_pattern, self._ordinary)

    def typed(self, text: str) -> None:
        if text:
            self.items.append(text)

    def parts(self, parts: Iterable[str | MediaPart], *, is_trusted: bool) -> None:
        for part in parts:
            if isinstance(part, str):
                (self.trusted if is_trusted else self.typed)(part)
                continue
            self._counts[part.kind] += 1
            if self._add_vision_id:
                self.template(f"{'Picture' if part.kind == 'image' else 'Video'} {self._counts[part.kind]}: ")
            self.template("<|vision_start|>")
            self.items.append(part)
            self.template("<|vision_end|>")

    def _split(self, text: str, pattern: re.Pattern[str] | None, tokens: Mapping[str, int]) -> None:
        pieces = [text] if pattern is None else pattern.split(text)
        self.items.extend(tokens.get(piece, piece) for piece in pieces if piece)


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _render(
    rendering: _Rendering,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> None:
    """The whole conversation (section 4). Raises PromptError."""
    roles = [_role(message, number) for number, message in enumerate(messages)]
    if roles[0] != "system":
        rendering.template(f"<|im_start|>system\n{DEFAULT_SYSTEM}")
        _render_tools(rendering, tools)
        rendering.template("<|im_end|>\n")
    for number, (role, message) in enumerate(zip(roles, messages, strict=True)):
        where = f"message {number} ({role})"
        parts = parse_content(message.get("content"), where)
        if role == "tool":
            if number == 0 or roles[number - 1] != "tool":
                rendering.template("<|im_start|>user")
            rendering.template("\n<tool_response>\n")
            rendering.parts(parts, is_trusted=False)
            rendering.template("\n</tool_response>")
            if number + 1 == len(roles) or roles[number + 1] != "tool":
                rendering.template("<|im_end|>\n")
            continue
        calls = message.get("tool_calls") or []
        if calls and role != "assistant":
            raise PromptError(f"{where}: only an assistant message holds tool_calls")
        rendering.template(f"<|im_start|>{role}")
        if parts or not calls:
            rendering.template("\n")
        rendering.parts(parts, is_trusted=role != "user")
        for call in calls:
            rendering.template("\n<tool_call>\n")
            rendering.trusted(_call_json(call, where))
            rendering.template("\n</tool_call>")
        if role == "system" and number == 0:
            _render_tools(rendering, tools)
        if not (continue_final_message and number + 1 == len(roles)):
            rendering.template("<|im_end|>\n")
    if add_generation_prompt and not continue_final_message:
        rendering.template("<|im_start|>assistant\n")


def _role(message: object, number: int) -> str:
    if not isinstance(message, Mapping):
        raise PromptError(f"message {number} is a {type(message).__name__}; give a dict with role and content")
    role = message.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        raise PromptError(f"message {number} has the role {role!r}; use system, user, assistant or tool")
    return str(role)


def _render_tools(rendering: _Rendering, tools: Sequence[Mapping[str, Any]]) -> None:
    if not tools:
        return
    rendering.template(TOOLS_HEAD)
    for tool in tools:
        rendering.trusted("\n" + _json(tool, "a tool"))
    rendering.template(TOOLS_TAIL)


def _call_json(call: object, where: str) -> str:
    """A tool call of the OpenAI API, or its bare function, as the model writes it. Arguments may be JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f"{where}: a tool call needs a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise PromptError(f"{where}: the arguments of {function['name']} are not JSON") from error
    name = _json(function["name"], where)
    return f'{{"name": {name}, "arguments": {_json({} if arguments is None else arguments, where)}}}'


def _json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise PromptError(f"{where} cannot be written as JSON: {error}") from error


# --- the tokenizer ---------------------------------------------------------------------------------------------------


class ChatTokenizer:
    """A checkpoint's tokenizer and the published chat template: messages to Prompt, token ids to text.

    The wrapped tokenizer has no added tokens at all, so no text can spell one; this class puts them where the template says.
    """

    def __init__(self, folder: Path | str, config: ModelConfig) -> None:
        """Reads tokenizer.json, or vocab.json and merges.txt. Raises CheckpointError if absent or at odds with the config."""
        self.config = config
        self._tokenizer, added = _load(Path(folder))
        self.added_tokens = {token["content"]: int(token["id"]) for token in added}
        self.special_ids = frozenset(int(token["id"]) for token in added if token.get("special"))
        self._ordinary = {text: id for text, id in self.added_tokens.items() if id not in self.special_ids}
        self._added_texts = {id: text for text, id in self.added_tokens.items()}
        self._bytes: dict[int, bytes] = {}
        expected = {
            "<|vision_start|>": config.vision_start_token_id,
            "<|vision_end|>": config.vision_end_token_id,
            "<|image_pad|>": config.image_token_id,
            "<|video_pad|>": config.video_token_id,
        }
        for text in ("<|im_start|>", "<|im_end|>", *expected):
            found = self.added_tokens.get(text)
            if found is None or found != expected.get(text, found):
                raise CheckpointError(
                    f"{folder}: the tokenizer gives {text} the id {found}, config.json {expected.get(text, 'none')};"
                    " copy both from one checkpoint"
                )

    def __len__(self) -> int:
        """One past the largest id that has a text; the model's vocabulary is padded beyond it."""
        return max([self._tokenizer.get_vocab_size() - 1, *self._added_texts]) + 1

    def build(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        defaults: MediaOptions | None = None,
        limits: MediaLimits | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_vision_id: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """Renders a conversation, reads its media and places everything.

        `defaults` apply to every medium unless its part says otherwise. `continue_final_message` leaves the last turn, an
        assistant's, open, so that the answer goes on from its text. Raises PromptError, MediaError or OptionError.
        """
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
            raise PromptError(
                'messages must be a list such as [{"role": "user", "content": "Hello"}], with one at least'
            )
        if continue_final_message and _role(messages[-1], len(messages) - 1) != "assistant":
            raise PromptError("continue_final_message needs an assistant message at the end; add one or leave it out")
        start = time.perf_counter()
        rendering = _Rendering(self.added_tokens, self._ordinary, add_vision_id=add_vision_id)
        _render(
            rendering,
            messages,
            tools or (),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        prompt = self._assemble(rendering.items, defaults or MediaOptions(), limits or MediaLimits())
        return replace(prompt, prepare_s=time.perf_counter() - start)

    def _assemble(self, items: Sequence[str | int | MediaPart], defaults: MediaOptions, limits: MediaLimits) -> Prompt:
        """Encodes the text between tokens in one run, as the reference does, and widens each medium to its tokens."""
        config = self.config
        ids: list[int] = []
        run: list[str] = []
        media: list[Medium] = []
        spans: list[Span] = []
        counts = {"image": 0, "video": 0}
        for item in [*items, None]:
            if isinstance(item, str):
                run.append(item)
                continue
            if run:
                ids.extend(self.encode("".join(run)))
                run.clear()
            if isinstance(item, int):
                ids.append(item)
            elif item is not None:
                prepare = prepare_image if item.kind == "image" else prepare_video
                options = defaults.overridden_by(item.options, item.kind)
                medium = prepare(item.source, options, config, limits, counts[item.kind])
                counts[item.kind] += 1
                receipt = medium.receipt
                media.append(medium)
                spans.append(Span(len(ids), receipt.grid, receipt.second_per_grid))
                pad = config.image_token_id if item.kind == "image" else config.video_token_id
                ids.extend([pad] * receipt.num_tokens)
                self._check_length(len(ids), media)  # at once: the next medium need not be read
        self._check_length(len(ids), media)
        vision = config.vision
        positions, next_position = token_positions(len(ids), spans, vision.spatial_merge_size, vision.tokens_per_second)
        return Prompt(tuple(ids), positions, next_position, tuple(media), tuple(spans))

    def _check_length(self, length: int, media: Sequence[Medium]) -> None:
        longest = self.config.text.max_position_embeddings
        if length > longest:
            num_media = sum(medium.receipt.num_tokens for medium in media)
            remedy = "lower max_pixels, fps or num_frames, or send less" if num_media else "send less text"
            raise PromptError(
                f"the prompt has at least {length} tokens ({num_media} of them for {len(media)} media),"
                f" the model takes {longest}; {remedy}"
            )

    def encode(self, text: str) -> list[int]:
        """Ordinary token ids of a text; nothing in it becomes an added token."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeError) as error:  # lone surrogates
            raise PromptError("the text holds characters that are not valid Unicode; clean it first") from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids without a text (padding rows) nothing."""
        stream = self.stream(skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, skip_special: bool = True) -> TextStream:
        return TextStream(self, skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for ids without a text."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._added_texts:
            return str(self._added_texts[token_id]).encode()
        text: str | None = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if text is None:
            return b""
        try:
            return bytes(_BYTES[character] for character in text)
        except KeyError:  # a token that is not spelled in byte characters stands for itself
            return text.encode()


class TextStream:
    """Text of tokens as they arrive. A character split over tokens is held back until it is whole."""

    def __init__(self, tokenizer: ChatTokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that has become whole with this token; may be empty."""
        return "" if token_id in self._hidden else self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._decoder.decode(b"", final=True)


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins: byte-level BPE files spell every byte as one of these characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


def _load(folder: Path) -> tuple[Tokenizer, list[dict[str, Any]]]:
    """The tokenizer without its added tokens, and those. Raises CheckpointError."""
    whole = folder / "tokenizer.json"
    try:
        if whole.is_file():
            content = json.loads(whole.read_text(encoding="utf-8"))
            added = content.pop("added_tokens")
            tokenizer = Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            added = [{"id": id, **token} for id, token in settings["added_tokens_decoder"].items()]
            tokenizer = Tokenizer(models.BPE(vocab, merges))
            tokenizer.normalizer = normalizers.NFC()
            split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        else:
            raise CheckpointError(
                f"{folder}: no tokenizer.json, nor vocab.json and merges.txt; download the whole checkpoint"
            )
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise CheckpointError(f"{folder}: the tokenizer's files are damaged; download them again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, added
