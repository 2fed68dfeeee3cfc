"""The program: its commands by name, and errors as one line. Knows no command from the inside."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
import typing

import click

from saccade import __version__
from saccade.base.errors import OptionError, SaccadeError


class Program(click.Group):
    """A command's file is imported when it is called, so that the program's own help imports nothing."""

    SUMMARIES: typing.ClassVar = {
        "ask": "Answer a question about pictures and videos.",
        "inspect": "Say what a checkpoint holds, and what is wrong with it.",
        "quantize": "Make an int8, int4 or fp8 checkpoint: for Saccade, vLLM, SGLang, vLLM Ascend, MindIE.",
        "verify": "Say whether a quantized checkpoint is sound, and how near its model.",
        "doctor": "Say what this machine can do, what is active, and why.",
        "bench": "Measure every stage of an answer, and its distance from the machine's limit.",
        "eval": "Ask a model questions whose answers are known, and compare it with another.",
        "demo": "Ask the model that ships with Saccade about the pictures that ship with it.",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.SUMMARIES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.SUMMARIES:
            return None
        command: click.Command = importlib.import_module(f"saccade.cli.{name}").command
        if not any(parameter.name == "verbose" for parameter in command.params):
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


def let_threads_sleep() -> None:
    """Has torch's threads wait for each other awake no longer than a moment, unless the user says how; before torch is imported.

    They do so after every operation they share, for a millisecond by default: on processors that another program needs, too, they
    then wait most of the time (docs/notes/cpu-decode.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> None:
    """Entry point. Exit codes: 0 well, 1 refused or failed, 2 wrong usage, 130 interrupted."""
    let_threads_sleep()
    is_verbose = "--verbose" in sys.argv
    logging.basicConfig(level=logging.DEBUG if is_verbose else logging.WARNING, format="%(name)s: %(message)s")
    for noisy in ("PIL", "httpx", "httpcore", "urllib3", "filelock", "huggingface_hub", "matplotlib", "libav"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        program(prog_name="saccade", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.UsageError as error:
        where = f" ({error.ctx.command_path} --help tells more)" if error.ctx else ""
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
    except OSError as error:
        if is_verbose or error.filename is None:  # without a name it is no file that the user could see to
            raise
        _fail(f"{error.filename}: {error.strerror}", 1)


def _fail(message: str, code: int) -> typing.NoReturn:
    print(f"saccade: {message}", file=sys.stderr)
    sys.exit(code)
