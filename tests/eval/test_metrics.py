"""The eight metrics and their wording."""

import json
from pathlib import Path

import pytest

from eval.judging.metrics import METRIC_NAMES, METRICS


def test_questions_name_the_role_and_the_partner() -> None:
    questions = {metric.name: metric.question(role="Ada", partner="Bob") for metric in METRICS}
    assert list(questions) == list(METRIC_NAMES)
    assert all(question.startswith(f"{name}: ") and question.endswith("?") for name, question in questions.items())
    assert {name for name, question in questions.items() if "Bob's words" in question} == {"Response Accuracy"}
    assert {name for name, question in questions.items() if "Ada" in question} == {
        "Instruction Adherence", "Personality Consistency", "Knowledge Consistency", "Tone Consistency",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["{partner}", "{0}", "{{", "A } B"])
def test_braces_in_a_name_stay_as_they_are(name: str) -> None:
    question = METRICS[0].question(role=name, partner="Bob")
    assert question.count(name) >= 2 and "Bob" not in question


def test_order_is_the_papers(shared: Path) -> None:
    table = json.loads((shared / "golden" / "paper_table_5.json").read_text(encoding="utf-8"))
    assert list(METRIC_NAMES) == table["columns"][:-1]


def test_short_names_are_short_and_differ() -> None:
    assert len({metric.short for metric in METRICS}) == 8
    assert all(len(metric.short) <= 9 for metric in METRICS)
