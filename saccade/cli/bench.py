"""`saccade bench`: every stage of an answer, measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
from click.core import ParameterSource

from saccade.bench.options import BenchOptions
from saccade.cli.flags import MODEL_HELP, flags, gather, require_places
from saccade.engine.options import EngineOptions, SamplingParams
from saccade.inputs.options import MediaOptions


@click.command("bench")
@click.option("--model", "--model_name_or_path", default="demo", show_default=True, help=MODEL_HELP)
@click.option("--image", "--image_file", "images", multiple=True, help="a picture; may be given several times")
@click.option("--video", "--video_file", "videos", multiple=True, help="a video; may be given several times")
@click.option("--question", default="Describe this image.", show_default=True, help="the question")
@flags(BenchOptions)
@flags(SamplingParams, max_tokens=128, min_tokens=128)
@flags(MediaOptions)
@flags(EngineOptions, speculation="off")  # a token a step: what the limit of a decoded token means
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    question: str,
    **values: Any,
) -> None:
    """Measure every stage of an answer, and its distance from the machine's limit.

    Works as typed, offline: saccade bench --repeat 3 --warmup 1
    """
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if "min_tokens" not in given:
        values["min_tokens"] = min(values["min_tokens"], values["max_tokens"])
    if values["random"] is not None and "model" in given:
        raise click.UsageError(f"--random {values['random']} is measured in place of a --model; give one")
    options = gather(BenchOptions, values)
    params = gather(SamplingParams, values)
    media = gather(MediaOptions, values)
    engine = dataclasses.asdict(gather(EngineOptions, values))
    require_places(options.json)

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
