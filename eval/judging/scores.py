"""Score pairs: reading them from a review, storing them in a row's `rm_review[metric]`, and loading them from there.

A text is first read by the published rule. If that fails, a more forgiving reader tries, and the stored record says so.
If both fail, the review is a failure with a reason: never a guess, never a score of 0.

Stored forms (the first is the published one):

    {"review": text, "score": [a, b]}                                            read by the published rule at once
    {"review": text, "score": [a, b], "read_by": "forgiving", "attempts": n}     each extra key only where it applies
    {"review": text, "score": [], "failure": reason, "attempts": n}              n texts, none of them readable
    {…, "swapped": true}                                                         the reference was model A

A pair is stored as the reviewer wrote it: model A's score first, whoever model A was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Pair = tuple[float, float]
Reader = Literal["published", "forgiving"]

LOWEST, HIGHEST = 0.0, 10.0  # the prompt asks for 1 to 10; published reviews also give 0

_MARKER = re.compile(
    r"""[\[【][\s*_]*scores?[\s*_]*(?:\\?[\]】]|(?=:))    # [Scores], 【Scores】, [**Score**], [Scores: …]; anywhere
      | ^[ \t>#*_-]*scores?[ \t*_]*(?=:)                # Scores: without brackets, only at the start of a line
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_NUMBER = r"([-+]?\d+(?:\.\d+)?)"
_UNIT = r"(?:\s*/\s*10(?!\d|\.\d)|\s+out\s+of\s+10(?!\d|\.\d)|\s*points?|\s*分)?"
_LABEL = (
    r"(?:(?:model|assistant|response|answer|模型)?\s*{letter}(?:'s)?(?:\s+(?:score|response))?\s*(?::|=|-(?=\s))?\s*)"
)
_A, _B = _LABEL.format(letter="a"), _LABEL.format(letter="b")
# What follows must not change the number ("1e1", "9.5.1", "9 of 20", "9%"), nor be a third score on the same line.
_END = r"(?!\w|\.\d)(?!\s*(?:[/%]|(?:out\s+)?of\b))(?![^\w\n]*(?:(?:and|or|to|vs)\b[^\w\n]*)?\d)"
_LEAD = r"[\s:=]*(?:-\s+)?"
_PAIRS = tuple(
    re.compile(_LEAD + pair + _END, re.IGNORECASE)
    for pair in (
        rf"{_A}?{_NUMBER}{_UNIT}\s*(?:[,;|&]|and\b|vs\b\.?)\s*{_B}?{_NUMBER}{_UNIT}",
        rf"{_A}{_NUMBER}{_UNIT}(?!\s*%)\D{{0,200}}?(?<!\w){_B}{_NUMBER}{_UNIT}",
    )
)
_SWAPPED = re.compile(
    _LEAD + rf"{_B}{_NUMBER}{_UNIT}\s*(?:[,;|&]|and\b|vs\b\.?)\s*{_A}{_NUMBER}{_UNIT}" + _END, re.IGNORECASE
)
_CONTRADICTED = re.compile(_LEAD + rf"(?:{_B}{_NUMBER}|{_NUMBER}{_UNIT}\s*[,;|&]\s*{_A}{_NUMBER})", re.IGNORECASE)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_PLAIN = str.maketrans(_FULL_WIDTH | {0x3000: " ", ord("、"): ",", ord("’"): "'"})
_UNBRACKETED = str.maketrans(dict.fromkeys('()[]{}<>【】「」*_`"“”\\', " "))


@dataclass(frozen=True)
class ScoreReading:
    """The result of reading one review.

    Attributes:
        pair: Scores of model A (the evaluated answer) and model B (the ground truth), each 0 to 10; None if unreadable.
        reader: The reader that found the pair; None without one.
        reason: Why there is no pair; empty with one.
    """

    pair: Pair | None
    reader: Reader | None = None
    reason: str = ""


def parse_scores(review: str) -> Pair | None:
    """Apply the published rule exactly: `get_review_score` of the released RM_review.py.

    Args:
        review: A reviewer's whole text.

    Returns:
        The scores of model A and model B by this rule, or None if it fails.
    """
    # published: nan, inf and numbers outside 1 to 10 pass; a second "[Scores]:" or a word after the pair does not.
    parts = review.split("[Scores]:")
    if len(parts) != 2:
        return None
    scores = parts[1].strip().split("\n")[0].replace("(", "").replace(")", "").split(",")
    if len(scores) != 2:
        return None
    try:
        a, b = (float(score.split(":")[1] if ":" in score else score) for score in scores)
    except ValueError:
        return None
    return a, b


def read_scores(review: str) -> ScoreReading:
    """Read a review by the published rule, or else by the forgiving reader.

    The forgiving reader looks only after the last scores marker, where a pair must follow immediately; it accepts
    full-width signs, brackets, bold, "8/10", "Model A: 8 … Model B: 9" and words after the pair. Both readers respect
    labels: "(Model B: 9, Model A: 8)" gives model A 8.

    Args:
        review: A reviewer's whole text, without the prompt.

    Returns:
        The pair and its reader, or the reason why there is none. A score outside 0 to 10 is refused.
    """
    plain = review.translate(_PLAIN)
    markers = list(_MARKER.finditer(plain))
    tail = plain[markers[-1].end() :].translate(_UNBRACKETED) if markers else ""
    if swapped := _SWAPPED.match(tail):  # the published rule takes the first score for model A's, whatever its label
        return _checked((float(swapped[2]), float(swapped[1])), "forgiving")
    if _CONTRADICTED.match(tail):
        return ScoreReading(None, reason="the scores' labels contradict their order")
    pair = parse_scores(review)
    if pair is not None:
        return _checked(pair, "published")
    if not markers:
        return ScoreReading(None, reason="no [Scores] marker" if review.strip() else "empty review")
    match = next(filter(None, (pattern.match(tail) for pattern in _PAIRS)), None)
    if match is None:
        return ScoreReading(None, reason="no single pair of scores right after the last [Scores] marker")
    return _checked((float(match[1]), float(match[2])), "forgiving")


def _checked(pair: Pair, reader: Reader) -> ScoreReading:
    # Comparing refuses nan and inf too, and whole numbers too large for a float.
    outside = [score for score in pair if not LOWEST <= score <= HIGHEST]
    if outside:
        return ScoreReading(None, reason=f"a score outside {LOWEST:g} to {HIGHEST:g}")
    return ScoreReading(pair, reader)


def review_record(review: str, reading: ScoreReading, attempts: int = 1, *, swapped: bool = False) -> dict[str, Any]:
    """Return the record of one review for `rm_review[metric]`.

    Args:
        review: The reviewer's last text.
        reading: The result of `read_scores`.
        attempts: The number of texts requested, the last one included; at least 1.
        swapped: Whether the reference was model A.

    Returns:
        The published form if the published rule could read the first text; otherwise with more keys.
    """
    order = {"swapped": True} if swapped else {}
    if reading.pair is None:
        return {"review": review, "score": [], "failure": reading.reason, "attempts": attempts, **order}
    record: dict[str, Any] = {"review": review, "score": list(reading.pair), **order}
    if reading.reader == "forgiving":
        record["read_by"] = "forgiving"
    if attempts > 1:
        record["attempts"] = attempts
    return record


def read_record(record: object) -> ScoreReading:
    """Read the pair from a stored `rm_review[metric]`, ours or a published one.

    The stored pair counts, not the text: users of the released script correct pairs by hand. Published failures are
    `{}`, a record whose score is `{}`, or no record (None).

    Args:
        record: The stored value, of any type.

    Returns:
        The pair and its reader, or the reason why there is none.
    """
    if not isinstance(record, Mapping) or not record:
        return ScoreReading(None, reason="no review stored" if not record else "the stored review is not an object")
    score = record.get("score")
    if not score:
        return ScoreReading(None, reason=str(record.get("failure") or "no scores stored"))
    if not isinstance(score, list) or len(score) != 2 or not all(_is_number(value) for value in score):
        return ScoreReading(None, reason="the stored score is not a pair of numbers")
    return _checked((score[0], score[1]), "forgiving" if record.get("read_by") == "forgiving" else "published")


def stored_pair(record: object) -> Pair | None:
    """Return the score pair of a stored `rm_review[metric]`, or None for a failed or missing review."""
    return read_record(record).pair


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
