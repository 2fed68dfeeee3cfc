"""`saccade ask`: a question about pictures and videos, its answer and what was found in it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saccade.base.errors import SaccadeError
from saccade.base.meter import gigabytes
from saccade.cli.flags import MODEL_HELP, flags, gather, require_places
from saccade.engine.options import EngineOptions, SamplingParams
from saccade.inputs.options import MediaOptions

if TYPE_CHECKING:
    from saccade.inputs.prompt import MediaReceipt
    from saccade.outputs import CompletionOutput, RequestOutput
    from saccade.planning import Plan

DRAWN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@click.command("ask")
@click.argument("question", required=False)
@click.option("--question", "question_option", help="the question, if not given as the argument")
@click.option("--image", "--image_file", "images", multiple=True, help="a picture; may be given several times")
@click.option("--video", "--video_file", "videos", multiple=True, help="a video; may be given several times")
@click.option("--model", "--model_name_or_path", default="demo", show_default=True, help=MODEL_HELP)
@click.option("--system", help="system message")
@click.option("--dry-run", is_flag=True, help="print receipt, prompt length and memory; run nothing")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option(
    "--draw", type=click.Path(dir_okay=False), help="save the (first) picture with the answer's boxes and points"
)
@flags(SamplingParams)
@flags(MediaOptions)
@flags(EngineOptions)
def command(
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
    if draw is not None and Path(draw).suffix.lower() not in DRAWN:
        raise click.UsageError(f"--draw {draw} is of no kind of picture that is written; use {', '.join(DRAWN)}")
    require_places(draw)

    from saccade import api, planning

    messages = api.messages_for(text, images, videos, system)
    if dry_run:
        plan = planning.plan(model, messages, params, media=media, **dataclasses.asdict(engine))
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
        if output.num_drafted_tokens:
            print(
                f"{output.num_accepted_tokens} of {output.num_drafted_tokens} guessed tokens were right",
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
            "drafted_tokens": output.num_drafted_tokens,
            "accepted_tokens": output.num_accepted_tokens,
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
        "notes": list(plan.notes),
    }


def _plan_text(plan: Plan) -> str:
    lines = [_receipt_text(receipt) for receipt in plan.media]
    lines.append(f"prompt  {len(plan.prompt)} tokens, answer up to {plan.max_tokens}")
    lines.append(
        f"memory  {gigabytes(plan.total_bytes)}: weights {gigabytes(plan.weight_bytes)}, cache {gigabytes(plan.kv_cache_bytes)}, "
        f"media {gigabytes(plan.media_bytes)}, one step {gigabytes(plan.activation_bytes)}"
    )
    lines += [f"note    {note}" for note in plan.notes]
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
