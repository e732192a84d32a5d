"""The review prompt of one answered row and one metric (released RM_review.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_utils.prompts import CURIOUS_HUMAN, HYPOTHETICAL_CHARACTERS
from eval.judging.metrics import METRICS

SYSTEM = (
    "You are an objective and precise evaluator, specializing in rigorously assessing the role-playing and multimodal "
    "understanding abilities of various models."
)


def is_reviewable(row: Mapping[str, Any]) -> bool:
    """Return whether the row has an answer to review."""
    # published: only an empty answer is left out; a blank one is reviewed.
    return bool(row["conversations"][1].get("answer"))


def review_prompts(row: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the eight review prompts of one answered row.

    All eight share everything up to the metric's question, so that a reviewer may encode that prefix once. The backend
    adds the picture (`Picture 1: <img>…</img>`, on a separate line before the text).

    Args:
        row: An answered sample: `role`, `script`, `other_role`, and `conversations` with the question in
            `[0]["value"]`, the ground truth in `[1]["value"]` and the evaluated answer in `[1]["answer"]`.

    Returns:
        `{metric name: (system message, text)}` in published order. The texts are plain: anything in them that looks
        like a control tag comes from the data or the evaluated agent, and must not be read as one.

    Raises:
        KeyError: If the row lacks one of these fields.
    """
    role, other_role = row["role"], row["other_role"]
    partner = "the curious human" if other_role == CURIOUS_HUMAN else other_role
    head = _transcript(row) + f"## **[Instruction]**\n\n{_task(role, other_role, row['script'])}\n\n"
    return {metric.name: (SYSTEM, head + _request(metric.question(role=role, partner=partner))) for metric in METRICS}


def _transcript(row: Mapping[str, Any]) -> str:
    user, assistant = row["conversations"][0], row["conversations"][1]
    sections = (
        ("Question", user["value"]),
        ("Model A's Response", assistant["answer"]),
        ("Model B's Response", assistant["value"]),
    )
    return "".join(f"## **[{name} Start]**\n\n{text}\n\n## **[{name} End]**\n\n\n" for name, text in sections)


def _task(role: str, other_role: str, script: str) -> str:
    """Return the sentence that describes the task of both models to the reviewer."""
    who = _introduced(role, script)
    whom = other_role if other_role == CURIOUS_HUMAN else _introduced(other_role, script)
    return (
        f"The task instruction of the two models is to directly role-play as {who} and talk with {whom} about the "
        f"given image using the distinctive tone, manner and vocabulary of {role}."
    )


def _introduced(role: str, script: str) -> str:
    # published: the partner is introduced with the role's own script, and a hypothetical one keeps its closing comma.
    if script == HYPOTHETICAL_CHARACTERS:
        return f"{role}, a person who is one of the {HYPOTHETICAL_CHARACTERS},"
    return f"{role} from {script}"


def _request(question: str) -> str:
    return (
        "Please evaluate the following aspect of each model's response:\n"
        f"{question}\n\n"
        "Please provide a brief qualitative evaluation for the relative performance of the two models, followed by "
        "paired quantitative scores from 1 to 10, where 1 indicates poor performance and 10 indicates excellent "
        "performance.\n\n"
        "The output should be in the following format:\n"
        "{Qualitative Evaluation}, [Scores]: ({the score of Model A}, {the score of Model B})\n\n"
        "Please ensure that your evaluations are unbiased and that the order in which the responses were presented "
        "does not affect your judgment."
    )
