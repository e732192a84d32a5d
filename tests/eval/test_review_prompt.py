"""The review prompts, against the published ones and by rule."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from eval.judging.metrics import METRIC_NAMES
from eval.judging.prompt import is_reviewable, review_prompts


def made(role: str = "Ada", script: str = "The Engine", other_role: str = "a curious human") -> dict[str, Any]:
    turns = [{"from": "user", "value": "Q?"}, {"from": "assistant", "value": "truth", "answer": " given "}]
    return {
        "id": "x_1",
        "image": "a.jpg",
        "conversations": turns,
        "role": role,
        "script": script,
        "other_role": other_role,
    }


def task(row: dict[str, Any]) -> str:
    text = review_prompts(row)["Fluency"][1]
    return next(line for line in text.splitlines() if line.startswith("The task instruction"))


@cache
def published_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_published_text(shared: Path) -> None:
    prompts = json.loads((shared / "golden" / "review" / "prompts.json").read_text(encoding="utf-8"))
    assert prompts
    for prompt in prompts:
        folder = shared / "mmrole_data" / "published" / f"{prompt['split']}-test_answers" / prompt["mrpa"]
        row = next(row for row in published_rows(folder / prompt["file"]) if row["id"] == prompt["id"])
        assert review_prompts(row)[prompt["metric"]] == (prompt["system"], prompt["text"])


def test_every_published_hash(shared: Path) -> None:
    hashes = json.loads((shared / "golden" / "review" / "prompt_hashes.json").read_text(encoding="utf-8"))["hashes"]
    files = sorted({key.rsplit("/", 1)[0] for key in hashes})
    made_hashes = {}
    for file in files:
        split, agent, name = file.split("/")
        rows = published_rows(shared / "mmrole_data" / "published" / f"{split}_answers" / agent / name)
        reviewed = [(row, review_prompts(row)) for row in rows if is_reviewable(row)]
        for metric in METRIC_NAMES:
            digest = hashlib.sha256()
            for row, prompts in reviewed:
                system, text = prompts[metric]
                digest.update("\x1f".join([row["id"], system, f"images/{row['image']}", text]).encode() + b"\x1e")
            made_hashes[f"{file}/{metric}"] = {"count": len(reviewed), "sha256": digest.hexdigest()}
    assert made_hashes == hashes


def test_fictional_role_and_human() -> None:
    assert task(made()) == (
        "The task instruction of the two models is to directly role-play as Ada from The Engine and talk with a "
        "curious human about the given image using the distinctive tone, manner and vocabulary of Ada."
    )


def test_partner_is_introduced_with_the_roles_script() -> None:
    assert "as Ada from The Engine and talk with Bob from The Engine about" in task(made(other_role="Bob"))


def test_hypothetical_roles_keep_the_published_comma() -> None:
    hypothetical = "a person who is one of the Hypothetical Characters,"
    row = made(script="Hypothetical Characters", other_role="Bob")
    assert f"as Ada, {hypothetical} and talk with Bob, {hypothetical} about" in task(row)
    row = made(script="Hypothetical Characters")
    assert f"as Ada, {hypothetical} and talk with a curious human about" in task(row)


def test_partner_in_response_accuracy() -> None:
    assert "answer the curious human's words" in review_prompts(made())["Response Accuracy"][1]
    assert "answer Bob's words" in review_prompts(made(other_role="Bob"))["Response Accuracy"][1]


def test_answer_is_model_a_and_truth_is_model_b_verbatim() -> None:
    text = review_prompts(made())["Fluency"][1]
    assert "## **[Model A's Response Start]**\n\n given \n\n## **[Model A's Response End]**" in text
    assert "## **[Model B's Response Start]**\n\ntruth\n\n## **[Model B's Response End]**" in text
    assert text.startswith("## **[Question Start]**\n\nQ?\n\n")


def test_the_eight_share_all_but_the_question() -> None:
    prompts = review_prompts(made())
    assert list(prompts) == list(METRIC_NAMES)
    heads = {text.split("\nPlease evaluate the following")[0] for _, text in prompts.values()}
    assert len(heads) == 1 and len({text for _, text in prompts.values()}) == 8


@pytest.mark.parametrize(("answer", "expected"), [("", False), (None, False), (" ", True), ("text", True)])
def test_published_only_an_empty_answer_is_not_reviewed(answer: str | None, expected: bool) -> None:
    row = made()
    row["conversations"][1]["answer"] = answer
    assert is_reviewable(row) is expected


def test_a_row_without_an_answer_is_not_reviewed() -> None:
    row = made()
    del row["conversations"][1]["answer"]
    assert not is_reviewable(row)
