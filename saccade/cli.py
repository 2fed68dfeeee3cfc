"""The command line: flags become options, errors become one line. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from saccade import __version__
from saccade.base.errors import OptionError, SaccadeError

if TYPE_CHECKING:
    from saccade.api import Plan
    from saccade.inputs.prompt import MediaReceipt
    from saccade.outputs import CompletionOutput, RequestOutput

T = TypeVar("T")
Command = Callable[..., None]

# The spellings of the reference benchmark's script, accepted beside ours.
ALIASES = {
    "max_tokens": ["--max_length", "--max_new_tokens"],
    "min_tokens": ["--min_length"],
    "quantization": ["--quant_type"],
    "temperature": ["--temperature"],
    "top_p": ["--top_p"],
    "top_k": ["--top_k"],
    "repetition_penalty": ["--repetition_penalty"],
}


MODEL_HELP = "checkpoint folder, hub id, or demo"

# --- flags from dataclasses ------------------------------------------------------------------------------------------


def flags(kind: type, **changed_defaults: Any) -> Callable[[Command], Command]:
    """A decorator that adds a flag for every field of dataclass `kind`; `gather` turns them back into an instance."""

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(kind)
        for field in reversed(dataclasses.fields(kind)):
            name = "--" + field.name.replace("_", "-")
            names = list(dict.fromkeys([name, *ALIASES.get(field.name, []), field.name]))
            default = changed_defaults.get(field.name, field.default)
            keywords: dict[str, Any] = {"help": field.metadata.get("help", ""), "default": default}
            value_type, is_multiple = _value_type(hints[field.name])
            if value_type is bool:
                names = [f"{name}/--no-{name[2:]}" if default else name, field.name]
                keywords["is_flag"] = True
            else:
                keywords |= {"type": value_type, "multiple": is_multiple, "show_default": default not in (None, ())}
            command = click.option(*names, **keywords)(command)
        return command

    return decorate


def script_options(kind: type) -> Callable[[Command], Command]:
    """As `flags`, in the spelling of msModelSlim's scripts: underscores, and booleans as the literals True and False.

    A boolean named in `_BARE` is a bare flag there too.
    """

    def literal(ctx: click.Context, parameter: click.Parameter, value: str) -> bool:
        return value == "True"

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(kind)
        for field in reversed(dataclasses.fields(kind)):
            names = [f"--{field.name}", f"--{field.name.replace('_', '-')}", field.name]
            keywords: dict[str, Any] = {"help": field.metadata.get("help", ""), "default": field.default}
            value_type, _ = _value_type(hints[field.name])
            if value_type is bool and field.name in _BARE:
                keywords["is_flag"] = True
            elif value_type is bool:
                keywords |= {
                    "type": click.Choice(["True", "False"]),
                    "callback": literal,
                    "default": str(field.default),
                }
            else:
                keywords["type"] = value_type
            keywords["show_default"] = "is_flag" not in keywords and field.default is not None
            command = click.option(*dict.fromkeys(names), **keywords)(command)
        return command

    return decorate


_BARE = ("mindie_format",)


def gather(kind: type[T], values: dict[str, Any]) -> T:
    """Takes the fields of `kind` out of a command's keywords."""
    return kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _value_type(hint: Any) -> tuple[Any, bool]:
    """The type of a flag's value, and whether the flag may be given several times."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _value_type(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return arguments[0], True
    if origin is typing.Literal:
        return click.Choice(arguments), False
    return hint, False


# --- the program -----------------------------------------------------------------------------------------------------


class Program(click.Group):
    """Commands are built when they are called, so that the program's own help imports nothing."""

    SUMMARIES: typing.ClassVar = {
        "ask": "Answer a question about pictures and videos.",
        "inspect": "Say what a checkpoint holds, and what is wrong with it.",
        "quantize": "Make a smaller checkpoint, equal bit for bit to what msModelSlim would write.",
        "doctor": "Say what this machine can do, what is active, and why.",
        "bench": "Measure every stage of an answer, and its distance from the machine's limit.",
        "demo": "Ask the model that ships with Saccade about the pictures that ship with it.",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.SUMMARIES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.SUMMARIES:
            return None
        makers: Mapping[str, Callable[[], click.Command]] = {
            "ask": _ask_command,
            "inspect": _inspect_command,
            "quantize": _quantize_command,
            "doctor": _doctor_command,
            "bench": _bench_command,
            "demo": _demo_command,
        }
        command = makers[name]()
        command.params.append(
            click.Option(["--verbose"], is_flag=True, expose_value=False, help="logs, timings and tracebacks")
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.SUMMARIES.items()))


@click.command(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="saccade")
def program() -> None:
    """Saccade runs Qwen2.5-VL: a picture or a video and a question become an answer.

    Try: saccade demo
    """


def main() -> None:
    """Entry point. Exit codes: 0 well, 1 refused or failed, 2 wrong usage, 130 interrupted."""
    is_verbose = "--verbose" in sys.argv
    logging.basicConfig(level=logging.DEBUG if is_verbose else logging.WARNING, format="%(name)s: %(message)s")
    for noisy in ("PIL", "httpx", "httpcore", "urllib3", "filelock", "huggingface_hub", "matplotlib", "libav"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        program(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.UsageError as error:
        where = f" (saccade {error.ctx.command.name} --help tells more)" if error.ctx and error.ctx.command.name else ""
        _fail(f"{error.format_message()}{where}", 2)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SaccadeError as error:
        if is_verbose:
            traceback.print_exc()
        _fail(str(error), 2 if isinstance(error, OptionError) else 1)


def _fail(message: str, code: int) -> typing.NoReturn:
    print(f"saccade: {message}", file=sys.stderr)
    sys.exit(code)


# --- ask -------------------------------------------------------------------------------------------------------------


def _ask_command() -> click.Command:
    from saccade.engine.options import EngineOptions, SamplingParams
    from saccade.inputs.options import MediaOptions

    @click.command("ask", short_help=Program.SUMMARIES["ask"])
    @click.argument("question", required=False)
    @click.option("--question", "question_option", help="the question, if not given as the argument")
    @click.option("--image", "--image_file", "images", multiple=True, help="a picture; may be given several times")
    @click.option("--video", "--video_file", "videos", multiple=True, help="a video; may be given several times")
    @click.option(
        "--model", "--model_name_or_path", default="demo", show_default=True, help="checkpoint folder, hub id, or demo"
    )
    @click.option("--system", help="system message")
    @click.option("--dry-run", is_flag=True, help="print receipt, prompt length and memory; run nothing")
    @click.option("--json", "as_json", is_flag=True, help="print one JSON object")
    @click.option(
        "--draw", type=click.Path(dir_okay=False), help="save the (first) picture with the answer's boxes and points"
    )
    @flags(SamplingParams)
    @flags(MediaOptions)
    @flags(EngineOptions)
    def ask(
        question: str | None,
        question_option: str | None,
        images: tuple[str, ...],
        videos: tuple[str, ...],
        model: str,
        system: str | None,
        dry_run: bool,
        as_json: bool,
        draw: str | None,
        **values: Any,
    ) -> None:
        """Answer a question about pictures and videos, in the order they are given.

        Works as typed, offline: saccade ask "Say hello."
        """
        text = question if question is not None else question_option
        if text is None:
            raise click.UsageError('give a question: saccade ask "What is this?" --image photo.jpg')
        if question is not None and question_option is not None:
            raise click.UsageError("the question is given twice, as an argument and as --question; give one")
        params = gather(SamplingParams, values)
        media = gather(MediaOptions, values)
        engine = gather(EngineOptions, values)
        if draw is not None and not images:
            raise click.UsageError("--draw needs an --image to draw on")

        from saccade import api

        messages = api.messages_for(text, images, videos, system)
        if dry_run:
            plan = api.plan(model, messages, params, media=media, **dataclasses.asdict(engine))
            print(json.dumps(_plan_json(plan)) if as_json else _plan_text(plan))
            return
        llm = api.LLM(model, media=media, **dataclasses.asdict(engine))
        output = None
        for update in llm.stream(messages, params):
            if not as_json and update.index == 0:
                print(update.text, end="", flush=True)
            output = update.output or output
        assert output is not None, "a stream ended without its output"
        if as_json:
            print(json.dumps(output_json(output)))
        else:
            print()
            for answer in output.outputs[1:]:
                print(f"\n[{answer.index + 1}] {answer.text}")
            _print_findings(output)
        if draw is not None:
            from saccade.drawing import draw_answer

            draw_answer(images[0], output.outputs[0]).save(draw)
        failed = [answer.error for answer in output.outputs if answer.error]
        if failed:
            raise SaccadeError(failed[0])

    return ask


def _print_findings(output: RequestOutput) -> None:
    """Where the boxes, points and events are in the caller's own pixels and seconds; to stderr, the answer alone is on stdout."""
    answer = output.outputs[0]
    for box in answer.boxes:
        print(f"box   {_where(box.xyxy)}  picture {box.picture + 1}  {box.label}", file=sys.stderr)
    for point in answer.points:
        print(f"point {_where(point.xy)}  picture {point.picture + 1}  {point.label}", file=sys.stderr)
    for event in answer.events:
        print(
            f"event {event.start_s:.2f}-{event.end_s:.2f} s  video {event.video + 1}  {event.description}",
            file=sys.stderr,
        )
    if answer.finish_reason in ("length", "repetition"):
        print(f"(ended by {answer.finish_reason} after {len(answer.token_ids)} tokens)", file=sys.stderr)
    if "--verbose" in sys.argv:
        times = output.timings
        print(
            f"{len(output.prompt_token_ids)} tokens in, {len(answer.token_ids)} out, {times.total_s:.2f} s: "
            f"vision {times.vision_s:.2f}, prefill {times.prefill_s:.2f}, decode {times.decode_s:.2f}",
            file=sys.stderr,
        )


def _where(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


def output_json(output: RequestOutput) -> dict[str, Any]:
    """An output for machines: answers with boxes, receipts, token counts and timings."""
    return {
        "outputs": [_answer_json(answer) for answer in output.outputs],
        "media": [dataclasses.asdict(receipt) for receipt in output.media],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "completion_tokens": sum(len(answer.token_ids) for answer in output.outputs),
        },
        "timings": dataclasses.asdict(output.timings),
        "prompt_logprobs": _logprobs_json(output.prompt_logprobs),
    }


def _answer_json(answer: CompletionOutput) -> dict[str, Any]:
    return {
        "index": answer.index,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "error": answer.error,
        "token_ids": answer.token_ids,
        "boxes": [dataclasses.asdict(box) for box in answer.boxes],
        "points": [dataclasses.asdict(point) for point in answer.points],
        "events": [dataclasses.asdict(event) for event in answer.events],
        "logprobs": _logprobs_json(answer.logprobs),
    }


def _logprobs_json(logprobs: Any) -> Any:
    return None if logprobs is None else [[dataclasses.asdict(entry) for entry in position] for position in logprobs]


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "media": [dataclasses.asdict(receipt) for receipt in plan.media],
        "prompt_tokens": len(plan.prompt),
        "max_tokens": plan.max_tokens,
        "memory_bytes": {
            "weights": plan.weight_bytes,
            "kv_cache": plan.kv_cache_bytes,
            "media": plan.media_bytes,
            "activations": plan.activation_bytes,
            "total": plan.total_bytes,
        },
    }


def _plan_text(plan: Plan) -> str:
    lines = [_receipt_text(receipt) for receipt in plan.media]
    lines.append(f"prompt  {len(plan.prompt)} tokens, answer up to {plan.max_tokens}")
    lines.append(
        f"memory  {_gigabytes(plan.total_bytes)}: weights {_gigabytes(plan.weight_bytes)}, cache {_gigabytes(plan.kv_cache_bytes)}, "
        f"media {_gigabytes(plan.media_bytes)}, one step {_gigabytes(plan.activation_bytes)}"
    )
    return "\n".join(lines)


def _receipt_text(receipt: MediaReceipt) -> str:
    (width, height), (model_width, model_height) = receipt.original_size, receipt.model_size
    what = "picture" if receipt.kind == "image" else "video  "
    text = f"{what} {receipt.index + 1}  {receipt.source}: {width} x {height}"
    text += f" -> {model_width} x {model_height}, {receipt.num_tokens} tokens"
    if receipt.frame_times_s:
        first, last = receipt.frame_times_s[0], receipt.frame_times_s[-1]
        text += f", {len(receipt.frame_times_s)} frames from {first:.2f} to {last:.2f} s, {receipt.second_per_grid:.4f} s per grid"
    text += f", sha256 {receipt.sha256[:16]}"
    return "".join([text, *(f"\n          ({note})" for note in receipt.notes)])


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# --- inspect, doctor, bench, demo ------------------------------------------------------------------------------------


def _inspect_command() -> click.Command:
    @click.command("inspect", short_help=Program.SUMMARIES["inspect"])
    @click.argument("model", default="demo")
    @click.option("--check", is_flag=True, help="also read every weight, looking for NaN and infinity")
    @click.option(
        "--source",
        default="huggingface",
        show_default=True,
        help="where hub ids are looked up: huggingface or modelscope",
    )
    def inspect(model: str, check: bool, source: Literal["huggingface", "modelscope"]) -> None:
        """Say what a checkpoint holds, and what is wrong with it; exit code 1 if anything is."""
        from saccade.checkpoints.describe import describe
        from saccade.checkpoints.formats import open_checkpoint
        from saccade.checkpoints.hub import resolve

        folder = resolve(model, source=source)
        description = describe(folder)
        print("\n".join(description.render()))
        if check and not description.problems:
            open_checkpoint(folder).check_finite()
            print("every weight is finite")
        if description.problems:
            sys.exit(1)

    return inspect


def _quantize_command() -> click.Command:
    from saccade.quantize.recipe import ExactRecipe

    @click.command("quantize", short_help=Program.SUMMARIES["quantize"])
    @click.option("--model_path", "--model", "model", required=True, help="float checkpoint folder or hub id")
    @click.option(
        "--calib_images", "--calib-images", required=True, help="folder of calibration pictures, nothing else"
    )
    @click.option(
        "--save_directory", "--save-directory", required=True, help="folder to make; an existing one is refused"
    )
    @click.option(
        "--mode", type=click.Choice(["exact"]), default="exact", show_default=True, help="how weights are found"
    )
    @click.option(
        "--image_order",
        "--image-order",
        type=click.Choice(["name", "listing"]),
        default="name",
        show_default=True,
        help="order of the pictures, which results depend on; listing is the file system's, as msModelSlim takes it",
    )
    @click.option("--force", is_flag=True, help="replace an existing checkpoint")
    @click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="last bits depend on it")
    @script_options(ExactRecipe)
    def quantize(
        model: str,
        calib_images: str,
        save_directory: str,
        mode: str,
        image_order: Literal["name", "listing"],
        force: bool,
        threads: int,
        **values: Any,
    ) -> None:
        """Make a smaller checkpoint for Ascend engines and for Saccade, equal bit for bit to what msModelSlim would write.

        For example: saccade quantize --model_path Qwen2.5-VL-3B-Instruct --calib_images photos --save_directory w8a8
        """
        from saccade import api

        report = api.quantize(
            model, save_directory, calib_images, image_order=image_order, force=force, threads=threads, **values
        )
        print(
            f"quantized to {report.scheme} in {report.seconds:.0f} s, {_gigabytes(report.source_bytes)} -> "
            f"{_gigabytes(report.output_bytes)}, {report.num_samples} pictures, "
            f"at most {_gigabytes(report.peak_memory_bytes)} of memory: {report.folder}"
        )

    return quantize


def _doctor_command() -> click.Command:
    @click.command("doctor", short_help=Program.SUMMARIES["doctor"])
    @click.option("--json", "as_json", is_flag=True, help="print one JSON object")
    def doctor(as_json: bool) -> None:
        """Say what this machine can do, what is active, and why."""
        from saccade.doctor import examine

        report = examine()
        print(json.dumps(report.as_json()) if as_json else report.render())
        if report.problems:
            sys.exit(1)

    return doctor


def _bench_command() -> click.Command:
    from saccade.bench.options import BenchOptions
    from saccade.engine.options import EngineOptions, SamplingParams
    from saccade.inputs.options import MediaOptions

    @click.command("bench", short_help=Program.SUMMARIES["bench"])
    @click.option("--model", "--model_name_or_path", default="demo", show_default=True, help=MODEL_HELP)
    @click.option("--image", "--image_file", "images", multiple=True, help="a picture; may be given several times")
    @click.option("--video", "--video_file", "videos", multiple=True, help="a video; may be given several times")
    @click.option("--question", default="Describe this image.", show_default=True, help="the question")
    @flags(BenchOptions)
    @flags(SamplingParams, max_tokens=128, min_tokens=128)
    @flags(MediaOptions)
    @flags(EngineOptions)
    def bench(model: str, images: tuple[str, ...], videos: tuple[str, ...], question: str, **values: Any) -> None:
        """Measure every stage of an answer, and its distance from the machine's limit.

        Works as typed, offline: saccade bench --repeat 3 --warmup 1
        """
        options = gather(BenchOptions, values)
        params = gather(SamplingParams, values)
        media = gather(MediaOptions, values)
        engine = dataclasses.asdict(gather(EngineOptions, values))

        from saccade import api
        from saccade.bench.measure import bench as measure
        from saccade.bench.model import random_llm
        from saccade.demo import a_picture

        if not images and not videos:
            images = (str(a_picture()),)
        if options.random is not None:
            llm = random_llm(options.random, options.layers, options.vision_depth, media=media, **engine)
        else:
            llm = api.LLM(model, media=media, **engine)
        messages = api.messages_for(question, images, videos)
        result = measure(llm, messages, params, options, name=options.random or model)
        result.show()
        if options.json is not None:
            result.write(options.json)

    return bench


def _demo_command() -> click.Command:
    @click.command("demo", short_help=Program.SUMMARIES["demo"])
    @click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("demo-output"),
        show_default=True,
        help="folder for drawn boxes",
    )
    def demo(out: Path) -> None:
        """Ask the model that ships with Saccade about pictures and clips it was not trained on; exit code 1 if an answer is wrong."""
        from saccade.demo import run

        wrong = run(out)
        if wrong:
            raise SaccadeError(f"{wrong} of the demo's answers are not the expected ones")

    return demo


if __name__ == "__main__":
    main()
