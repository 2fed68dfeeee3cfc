"""Answers, scores and comparisons: the same as one by one, the same twice, and right about what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saccade import SamplingParams
from saccade.base.errors import OptionError
from saccade.demo import questions
from saccade.engine.options import EngineOptions
from saccade.evals.item import Item
from saccade.evals.report import render_html, render_markdown, render_text, worst
from saccade.evals.run import Candidate, EvalOptions, Evaluation, evaluate, first_difference
from tests.test_cli import Run, run  # noqa: F401  # the fixture

OPTIONS = EvalOptions(max_tokens=24)
FLOAT = Candidate(engine=EngineOptions(dtype="float32", kv_cache_tokens=4096))
COARSE = Candidate(engine=EngineOptions(dtype="float32", quantization="w4a8-g64", kv_cache_tokens=4096))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [
        Item(str(number), ("even", "odd")[number % 2], tuple(asked.messages[0]["content"]), asked.answer, "anls")
        for number, asked in enumerate(questions()[:6])
    ]


@pytest.fixture(scope="module")
def compared(items: list[Item]) -> Evaluation:
    return evaluate(COARSE, items, OPTIONS, against=FLOAT)


def test_answers_are_those_of_asking_one_by_one(items: list[Item]) -> None:
    found = evaluate(FLOAT, items[:4], OPTIONS)
    llm = FLOAT.open()
    greedy = SamplingParams(max_tokens=24, temperature=0, repetition_penalty=1.0)
    for outcome in found.outcomes:
        assert outcome.text == llm.chat(outcome.item.messages, greedy)[0].outputs[0].text


def test_the_same_command_gives_the_same_figures(items: list[Item], compared: Evaluation) -> None:
    again = evaluate(COARSE, items, OPTIONS, against=FLOAT)
    assert json.dumps(again.figures()) == json.dumps(compared.figures())
    assert torch.equal(again.token_kl, compared.token_kl)


def test_a_model_does_not_differ_from_itself(items: list[Item]) -> None:
    found = evaluate(FLOAT, items[:3], OPTIONS, against=FLOAT).comparisons[""]
    assert (found.divergence.mean_kl, found.divergence.top1_agreement, found.greedy_match) == (0, 1, 1)
    assert (found.difference.mean, found.mcnemar.p_value, found.median_first_divergence) == (0, 1, None)


def test_a_coarse_model_differs(compared: Evaluation) -> None:
    whole = compared.comparisons[""]
    assert whole.divergence.mean_kl > 1e-4
    assert whole.divergence.p99_kl > whole.divergence.mean_kl
    assert whole.divergence.num_tokens == len(compared.token_kl)
    tasks = [compared.comparisons[name].divergence for name in ("even", "odd")]
    assert sum(task.num_tokens for task in tasks) == whole.divergence.num_tokens
    assert sum(task.mean_kl * task.num_tokens for task in tasks) == pytest.approx(float(compared.token_kl.sum()))
    assert whole.score.mean - compared.mean.mean == pytest.approx(-whole.difference.mean)


def test_an_item_that_cannot_be_asked_is_wrong_and_counted(items: list[Item], tmp_path: Path) -> None:
    broken = Item("x", "odd", ({"type": "image", "image": str(tmp_path / "no.png")},), "3", "exact")
    found = evaluate(FLOAT, [items[0], broken], OPTIONS, against=FLOAT)
    assert found.num_errors == 1
    assert "no.png" in str(found.outcomes[1].error)
    assert found.outcomes[1].score == 0
    assert "1 items could not be asked" in render_text(found.figures())
    list(FLOAT.shown([broken]))


def test_no_item_is_refused() -> None:
    with pytest.raises(OptionError, match="no item"):
        evaluate(FLOAT, [], OPTIONS)


@pytest.mark.parametrize(
    ("a", "b", "first"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [4], 0)]
)
def test_the_first_difference_is_a_tokens_index(a: list[int], b: list[int], first: int | None) -> None:
    assert first_difference(a, b) == first


def test_the_table_follows_from_the_figures_alone(compared: Evaluation) -> None:
    figures = compared.figures()
    assert render_markdown(json.loads(json.dumps(figures))) == render_markdown(figures)
    assert "| even | anls | 3 |" in render_markdown(figures)


def test_the_page_stands_alone_and_shows_the_worst(compared: Evaluation) -> None:
    chosen = worst(compared, 4)
    media = dict(zip(chosen, COARSE.shown(compared.outcomes[index].item for index in chosen), strict=True))
    page = render_html(compared, media)
    assert "http" not in page
    assert "<script" not in page
    assert page.count("<svg") == 2
    assert page.count("data:image/png;base64,") >= sum(len(shown) > 0 for shown in media.values()) > 0
    lost = [
        i
        for i in range(len(compared.outcomes))
        if compared.pairings[i].reference_is_right > compared.outcomes[i].is_right
    ]
    assert set(lost[:4]) <= set(chosen) or len(lost) > 4


def test_text_of_an_answer_is_no_markup(items: list[Item]) -> None:
    asked = Item("<i>", "t", ({"type": "text", "text": "<script>alert(1)</script>"},), "<b>", "exact")
    assert "<script>" not in render_html(evaluate(FLOAT, [asked], OPTIONS), {})


def test_the_command_leads_with_the_result(run: Run, tmp_path: Path) -> None:  # noqa: F811
    dataset = Path(__file__).parents[2] / "docs" / "example.jsonl"
    out, answers = tmp_path / "out.json", tmp_path / "answers.jsonl"
    code, text, err = run(
        *("eval", "demo", "--dataset", str(dataset), "--against", "demo", "--quantization", "w8a16"),
        *("--json", str(out), "--answers", str(answers), "--html", str(tmp_path / "page.html")),
    )
    assert code == 0, err
    assert text.startswith("demo w8a16: ")
    assert json.loads(out.read_text())["num_items"] == len(answers.read_text().splitlines()) == 10
    assert all(json.loads(line)["kl"] < 1 for line in answers.read_text().splitlines())
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "colours"], "task 'colours' is unknown; did you mean 'colour'?"),
        (["--inject", "nothing"], "injector 'nothing' is unknown"),
        (["--inject", "k-spikes:x"], "strength 'x'"),
        (["--dataset", "no.jsonl"], "no.jsonl"),
        (["--against-dtype", "float32"], "need --against"),
        (["--limit", "0"], "limit is 0"),
        (["--quantization", "w1a1"], "'w1a1'"),
        (["--json", "no/such/folder/x.json"], "is no folder; make it first"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(run: Run, arguments: list[str], message: str) -> None:  # noqa: F811
    code, out, err = run("eval", "demo", *arguments)
    assert (code, out) == (2, "")
    assert message in err
