"""The demo's made-up agents, each with one fault, and the rule-based reviews of their answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from data_utils.demo.pictures import Scene, fitting_places
from data_utils.demo.story import ASSISTANT, COMMENT_ANSWERS, TRADES, Persona, describe, say

Answer = Callable[[Scene, Persona, Persona, random.Random], str]

# For each metric: what a good answer does, in plural and singular, and what a bad one fails to do.
VERDICTS = {
    "Instruction Adherence": ("speak as {role} and add nothing", "speaks as {role}", "does not speak as {role}"),
    "Fluency": ("read smoothly", "reads smoothly", "is hard to read"),
    "Coherency": ("hold together", "holds together", "does not hold together"),
    "Image-Text Relevance": ("fit the image", "fits the image", "does not fit the image"),
    "Response Accuracy": ("answer the words", "answers the words", "does not answer the words"),
    "Personality Consistency": ("show how {role} is", "shows how {role} is", "does not show how {role} is"),
    "Knowledge Consistency": ("know what {role} knows", "knows what {role} knows", "does not know what {role} knows"),
    "Tone Consistency": ("sound like {role}", "sounds like {role}", "does not sound like {role}"),
}
# Digits only: a tiny judge cannot learn numbers of two tokens, such as 10.
GOOD = {
    "Instruction Adherence": 9, "Fluency": 9, "Coherency": 8, "Image-Text Relevance": 9,
    "Response Accuracy": 9, "Personality Consistency": 9, "Knowledge Consistency": 8, "Tone Consistency": 9,
}  # fmt: skip
IN_CHARACTER = ("Personality Consistency", "Knowledge Consistency", "Tone Consistency")
# What each agent's answers score on the metrics they fail; on all others they are as good as the ground truth.
FAULTS: dict[str, dict[str, int]] = {
    "faithful": {},
    "plain": {"Instruction Adherence": 5} | dict.fromkeys(IN_CHARACTER, 4),
    "assistant": {"Instruction Adherence": 2} | dict.fromkeys(IN_CHARACTER, 2),
    "blind": {"Image-Text Relevance": 3, "Response Accuracy": 4},
    "stranger": dict.fromkeys(IN_CHARACTER, 3),
    "foreign": {"Instruction Adherence": 3, "Response Accuracy": 5} | dict.fromkeys(IN_CHARACTER, 2),
    "muddled": {"Fluency": 2, "Coherency": 3, "Response Accuracy": 6},
}


def answered_row(
    agent: str, sample: Mapping[str, Any], scene: Scene, people: tuple[Persona, Persona], rng: random.Random
) -> dict[str, Any]:
    """Return ``sample`` with the agent's answer and its eight reviews, in the published form of reviewed rows.

    Args:
        agent: A key of FAULTS.
        sample: A test-form sample; it is not changed.
        scene: What the sample's picture shows.
        people: The answering character and its friend.
        rng: Draws what the agent gets wrong.
    """
    user, truth = sample["conversations"]
    answer = _ANSWERS[agent](scene, *people, rng)
    reviews = {metric: _review(agent, metric, people[0].name) for metric in VERDICTS}
    return {**sample, "conversations": [user, {**truth, "answer": answer}], "rm_review": reviews}


def _review(agent: str, metric: str, role: str) -> dict[str, Any]:
    good = GOOD[metric]
    score = FAULTS[agent].get(metric, good)
    plural, singular, bad = VERDICTS[metric]
    verdict = f"Both responses {plural}." if score == good else f"Model A {bad}, while Model B {singular}."
    return {
        "review": f"{verdict.format(role=role)} [Scores]: ({score}, {good})",
        "score": [float(score), float(good)],
    }


def _faithful(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> str:
    return say(COMMENT_ANSWERS, scene, persona, friend)


def _plain(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> str:
    return describe(scene, persona.language)


def _assistant(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> str:
    return say(ASSISTANT, scene, persona, friend)


def _blind(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> str:
    thing = rng.choice([other for other in ("balloon", "tent", "duck", "flower") if other != scene.thing])
    colour = rng.choice([other for other in ("red", "green", "purple") if other != scene.colour])
    imagined = Scene(thing, colour, rng.choice(fitting_places(thing)), scene.time)
    return say(COMMENT_ANSWERS, imagined, persona, friend)


def _stranger(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> str:
    taken = (persona.trade, friend.trade)
    trade = rng.choice([other for other in sorted(TRADES[persona.language]) if other not in taken])
    return say(COMMENT_ANSWERS, scene, replace(friend, trade=trade), persona)


def _foreign(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> str:
    return describe(scene, "English" if persona.language == "Chinese" else "Chinese")


def _muddled(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> str:
    answer = say(COMMENT_ANSWERS, scene, persona, friend)
    pieces = list(answer) if persona.language == "Chinese" else answer.split()
    rng.shuffle(pieces)
    return ("" if persona.language == "Chinese" else " ").join(pieces)


_ANSWERS: dict[str, Answer] = {
    "faithful": _faithful,
    "plain": _plain,
    "assistant": _assistant,
    "blind": _blind,
    "stranger": _stranger,
    "foreign": _foreign,
    "muddled": _muddled,
}
