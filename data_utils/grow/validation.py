"""Reads a model's answers, and refuses what `data_utils.check` would complain about."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from data_utils.prompts import HUMAN
from qwen_vl.special_tokens import SPECIAL_TOKENS

PARTS = ("introduction", "personality", "experience", "relationship", "catchphrase")
_LEAST_SUMMARY, _MOST_SUMMARY = 200, 12_000  # characters; published ones have 400 to 5,000
_LEFTOVER = re.compile(r"\{[A-Za-z_]+\}|\$[a-z_]{3,}|\[(?:insert|your|name)\b[^\]]*\]", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\bas an ai\b|\bi(?:'|’)?m sorry, but i can(?:no|')t|作为(?:一个|一名)?(?:AI|人工智能)", re.IGNORECASE
)
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_WORDS = re.compile(r"[^\W\d_]")
_FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)

Spoken = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class UnusableError(Exception):
    """An answer cannot be used; the text says why."""


class SaidTurn(BaseModel):
    """A turn in the form that the prompts ask for."""

    model_config = ConfigDict(strict=True, extra="ignore")

    speaker: Spoken
    text: Spoken


class DetailedProfile(BaseModel):
    """The five parts of a detailed profile."""

    model_config = ConfigDict(strict=True, extra="forbid")

    introduction: Spoken
    personality: Spoken
    experience: Spoken
    relationship: Spoken
    catchphrase: Spoken


_TURNS = TypeAdapter(Annotated[list[SaidTurn], Field(min_length=2)])


def read_turns(answer: str, speakers: Sequence[str]) -> list[dict[str, str]]:
    """Return the turns of a dialogue, in the published form.

    Args:
        answer: The model's answer: a JSON list, possibly in a code fence or surrounded by text.
        speakers: The first one begins, the second one speaks last.

    Raises:
        UnusableError: It is not such a dialogue.
    """
    said = _validated(_TURNS, _json(answer))
    names = {name.casefold(): name for name in speakers}
    turns = []
    for number, turn in enumerate(said):
        name = names.get(turn.speaker.casefold())
        if name is None:
            raise UnusableError(f"an unknown speaker: {turn.speaker}")
        if name != speakers[number % 2]:
            raise UnusableError(f"turn {number + 1} is {name}'s, and should be {speakers[number % 2]}'s")
        turns.append({"role": name, "value": _without_name(turn.text, name)})
    if len(turns) % 2:
        raise UnusableError(f"{speakers[0]} speaks last")
    return turns


def read_comment(answer: str, name: str) -> str:
    """Return a character's comment on an image.

    Raises:
        UnusableError: It is empty.
    """
    fenced = _FENCE.match(answer.strip())
    text = _without_name((fenced[1] if fenced else answer).strip(), name)
    if not text:
        raise UnusableError("the answer is empty, cut off or withheld")
    return text


def read_detailed_profile(answer: str) -> dict[str, str]:
    """Return the five parts of a detailed profile, in the published order.

    Raises:
        UnusableError: A part is missing, empty or unknown, or a text has faults.
    """
    profile = _validated(TypeAdapter(DetailedProfile), _json(answer)).model_dump()
    for part in PARTS:
        _refuse(text_problem(profile[part]))
    return {part: profile[part] for part in PARTS}


def read_summary(answer: str) -> str:
    """Return a short profile with five headings.

    Raises:
        UnusableError: It has a wrong form, or faults.
    """
    fenced = _FENCE.match(answer.strip())
    text = (fenced[1] if fenced else answer).strip()
    headings = re.findall(r"^### \S", text, re.MULTILINE)
    if not text.startswith("### ") or len(headings) != len(PARTS):
        raise UnusableError(f"a profile must begin with a heading and have {len(PARTS)}; this one has {len(headings)}")
    if not _LEAST_SUMMARY <= len(text) <= _MOST_SUMMARY:
        raise UnusableError(f"the profile has {len(text):,} characters")
    _refuse(text_problem(text))
    return text


def dialogue_problem(dialogue: dict[str, Any], kind: str, language: str) -> str | None:
    """Return why a dialogue cannot be used, or None.

    Args:
        dialogue: In the published form.
        kind: "comment", "human-role" or "inter-role".
        language: What the characters must speak, "English" or "Chinese".
    """
    turns = dialogue["conversations"]
    speakers = [turn.get("role") or turn.get("from") for turn in turns]
    if len(set(speakers)) != 2 or len(turns) % 2 or (kind == "comment" and len(turns) != 2):
        return f"{len(turns)} turns of {len(set(speakers))} speakers"
    if any(a == b for a, b in itertools.pairwise(speakers)):
        return "someone speaks twice in a row"
    if (HUMAN in speakers) != (kind != "inter-role") or speakers[-1] == HUMAN:
        return "the human speaks last, or speaks where no human should"
    for turn in turns:
        problem = text_problem(turn["value"])
        if problem:
            return problem
    words = " ".join(turn["value"] for turn in turns)
    found = _language(words)
    if found != language:
        return f"it is in {found}, and should be in {language}"
    texts = [turn["value"] for turn in turns]
    return "someone repeats a turn word for word" if len(set(texts)) < len(texts) else None


def text_problem(text: str) -> str | None:
    """Return why a text cannot be used, or None."""
    if not text or text != text.strip():
        return "a text is empty or has leading or trailing blanks"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "a text holds half of a surrogate pair, which cannot be written to a file"
    token = next((token for token in SPECIAL_TOKENS if token in text), None)
    if token:
        return f"a text holds {token}, a special token that training would interpret"
    leftover = _LEFTOVER.search(text)
    if leftover:
        return f"a text holds an unfilled template field: {leftover[0]}"
    return "the model speaks as itself, not as the character" if _REFUSAL.search(text) else None


def _language(text: str) -> str:
    letters, chinese = len(_WORDS.findall(text)), len(_CHINESE.findall(text))
    return "Chinese" if chinese > 0.5 * letters else "English"


def _without_name(text: str, name: str) -> str:
    return re.sub(rf"^\[?{re.escape(name)}\]?\s*[:：]\s*", "", text).strip()


def _json(answer: str) -> Any:
    """Return the first JSON list or object in a text."""
    if not answer.strip():
        raise UnusableError("the answer is empty, cut off or withheld")
    start = min((i for i in (answer.find("["), answer.find("{")) if i >= 0), default=-1)
    if start < 0:
        raise UnusableError("there is no JSON in the answer")
    try:
        return json.JSONDecoder(strict=False).raw_decode(answer, start)[0]
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"the answer is not valid JSON: {error}") from None


def _validated(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the answer"
        raise UnusableError(f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def _refuse(problem: str | None) -> None:
    if problem:
        raise UnusableError(problem)
