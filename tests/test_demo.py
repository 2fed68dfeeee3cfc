"""The model that ships answers about the pictures and clips that ship, through the same door as any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from saccade import LLM, SamplingParams
from saccade.checkpoints.describe import describe
from saccade.demo import FOLDER, Question, is_right, overlap, questions, run
from saccade.grounding import Box
from saccade.inputs.options import MediaOptions

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", device="cpu")


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.question)
def test_a_shipped_question_is_answered_rightly(llm: LLM, question: Question) -> None:
    llm.media = MediaOptions(**question.options)
    answer = llm.chat(question.messages, SamplingParams(max_tokens=200))[0].outputs[0]
    assert is_right(question, answer), f"{answer.text!r}, not {question.answer!r}"
    assert answer.finish_reason == "stop"


def test_one_picture_several_and_a_video_are_asked_about() -> None:
    kinds = {(min(len(q.images), 2), len(q.videos)) for q in questions()}
    assert {(1, 0), (2, 0), (0, 1)} <= kinds


def test_the_answers_are_transformers_too() -> None:
    """Greedy in float32, over the same ids, rows and positions."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from tests.parity.oracle import Oracle

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER / "model", dtype="float32").eval()
    llm = LLM("demo", device="cpu", dtype="float32")
    for question in questions()[::3]:
        output = llm.chat(question.messages, SamplingParams(max_tokens=60))[0].outputs[0]
        prompt = llm.prepare(question.messages)
        expected = Oracle(model).greedy(prompt, llm.config, 60, stop=llm.config.generation.eos_token_ids)
        assert output.token_ids == expected, question.question


def test_the_demo_says_what_was_right_and_draws_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = run(tmp_path)
    printed = capsys.readouterr().out
    assert wrong == 0, printed
    assert f"{len(questions())} of {len(questions())} answers right" in printed
    assert list(tmp_path.glob("boxes-*.png"))


def test_a_wrong_answer_is_called_wrong() -> None:
    from saccade.outputs import CompletionOutput

    question = Question((), "What colour?", "The circle is red.")
    said = [
        CompletionOutput(0, text, [], "stop", None, None, None, ())
        for text in ("the circle is red. ", "The circle is blue.")
    ]
    assert [is_right(question, answer) for answer in said] == [True, False]
    a, b = (Box(corners, "", 0, corners) for corners in ((0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0)))
    assert overlap(a, b) == pytest.approx(1 / 3)
    assert overlap(a, a) == 1


def test_the_checkpoint_is_small_and_whole() -> None:
    assert not describe(FOLDER / "model").problems
    assert sum(path.stat().st_size for path in (FOLDER / "model").iterdir()) <= 40e6
