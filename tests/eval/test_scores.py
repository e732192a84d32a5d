"""Reading scores out of reviews, and storing them."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.judging.prompt import review_prompts
from eval.judging.scores import ScoreReading, parse_scores, read_record, read_scores, review_record, stored_pair


def test_published_rule_on_odd_texts(shared: Path) -> None:
    cases = json.loads((shared / "golden" / "review" / "score_parsing.json").read_text(encoding="utf-8"))
    assert cases
    for case in cases:
        pair = parse_scores(case["review"])
        assert (pair and [str(score) for score in pair]) == case["score"], case["review"]


def test_every_published_review(shared: Path) -> None:
    count = 0
    for path in sorted((shared / "mmrole_data" / "published").glob("*_reviews/*/*.json")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            for record in row.get("rm_review", {}).values():
                reading = read_scores(record["review"])
                assert list(parse_scores(record["review"]) or ()) == record["score"]
                assert review_record(record["review"], reading) == record
                assert stored_pair(record) == tuple(record["score"])
                count += 1
    assert count == 8 * (8 * 294 - 3)  # eight metrics of eight agents' rows, three of them without an answer


@pytest.mark.parametrize(
    ("review", "pair"),
    [
        ("Good. [Scores]: (8, 9)", (8, 9)),
        ("[Scores]: (8,9)\nextra line", (8, 9)),
        ("[Scores]:\n\n(8, 9)", (8, 9)),
        ("[Scores]: (Model A: 9, Model B: 10).", (9, 10)),
        ("[Scores]: (A: 8: 3, 9)", (8, 9)),
        ("[Scores]: ((8, 9", (8, 9)),
        ("[Scores]: (1e1, 3)", (10, 3)),
        ("[Scores]: (-1, 30)", (-1, 30)),
        ("[Scores]: (8, 9) [Scores]: (8, 9)", None),
        ("[Scores]: (8, 9) done", None),
        ("[Scores]: (7, 8, 9)", None),
        ("[scores]: (8, 9)", None),
        ("[Scores]:（8，9）", None),
        ("(8, 9)", None),
        ("", None),
    ],
)
def test_published_rule(review: str, pair: tuple[float, float] | None) -> None:
    assert parse_scores(review) == pair


FORGIVEN = [
    ("[scores]: (8, 9)", (8, 9)),
    ("[Score]: (8, 9)", (8, 9)),
    ("[Scores] (8, 9)", (8, 9)),
    ("[Scores: (8, 9)]", (8, 9)),
    ("**[Scores]**: **(8, 9)**", (8, 9)),
    ("[**Scores**]: 8, 9", (8, 9)),
    (r"\[Scores\]: (8, 9)", (8, 9)),
    ("【Scores】：（8，9）", (8, 9)),
    ("［Scores］：（８．５，９）", (8.5, 9)),
    ("Both are good.\n**Scores:** (8, 9)", (8, 9)),
    ("[Scores]: ( 8 , 9 ) trailing words", (8, 9)),
    ("[Scores]: (8, 9), because A lost 2 points", (8, 9)),
    ("[Scores]: (8/10, 9/10).", (8, 9)),
    ("[Scores]: 8 out of 10, 9.5 out of 10", (8, 9.5)),
    ("[Scores]: 8 points, 9 points", (8, 9)),
    ("[Scores]: 8 and 9", (8, 9)),
    ("[Scores]: 8; 9", (8, 9)),
    ("[Scores]: Model A: 8/10, Model B: 9/10", (8, 9)),
    ("[Scores]:\nModel A: 8\nModel B: 9", (8, 9)),
    ("[Scores]: Model B: 9, Model A: 8 x", (8, 9)),
    ("[Scores]:\n- Model A: 8/10\n- **Model B**: 9/10\n", (8, 9)),
    ("[Scores]: Model A's score: 8 (rather good), Model B's score: 9 (better)", (8, 9)),
    ("[Scores]: A = 8, B = 9 in all", (8, 9)),
    ("[Scores]: (8, 9) [Scores]: (1, 2)", (1, 2)),
    ("The format [Scores]: ({the score of Model A}, {the score of Model B}).\n[Scores]: (3, 4)", (3, 4)),
]


@pytest.mark.parametrize(("review", "pair"), FORGIVEN)
def test_forgiving_reader_reads_and_says_so(review: str, pair: tuple[float, float]) -> None:
    assert parse_scores(review) is None
    assert read_scores(review) == ScoreReading(pair, "forgiving")


@pytest.mark.parametrize(
    ("review", "reason"),
    [
        ("", "empty review"),
        (" \n", "empty review"),
        ("I give them 8 and 9.", "no [Scores] marker"),
        ("(8, 9)", "no [Scores] marker"),
        ("The scores: 8, 9 were fair.", "no [Scores] marker"),
        *(
            (f"[Scores]: {tail}", "no single pair of scores right after the last [Scores] marker")
            for tail in (
                "", "(8,", "(7, 8, 9)", "(seven, 8)", "8 9", "(8,9),(7,6)", "(8, 9) and (7, 6)", "(8, 9, )1", "8,5; 9",
                "I think 8, 9", "(8, 9%) x", "(8, 9/20)", "3, 9 of 20", "(8-9, 7)", "(3, 1e1) x", "(8, 9½) x",
                "(8, 1²) x", "A better", "8 (Model A), 9 (Model B)", "(8, 9.5.1)",
                "({the score of Model A}, {the score of Model B})", "(8, 9) [Scores]: as said",
                "({the score of Model A}, {the score of Model B})\n\nPlease rate from 1 to 10, 8, 9",
            )
        ),
        *((f"[Scores]: {tail}", "a score outside 0 to 10") for tail in (
            "(nan, 3)", "(inf, 3)", "(-1, 3)", "(8, 11)", "(80, 90)", "(-1, 3) x", "(8, 99) x", f"({'9' * 400}, 1)",
        )),
    ],
)  # fmt: skip
def test_unreadable_has_a_reason_and_no_score(review: str, reason: str) -> None:
    assert read_scores(review) == ScoreReading(None, None, reason)


def test_labels_are_obeyed() -> None:
    assert parse_scores("[Scores]: (Model B: 9, Model A: 8)") == (9, 8)
    assert read_scores("[Scores]: (Model B: 9, Model A: 8)") == ScoreReading((8, 9), "forgiving")


@pytest.mark.parametrize("tail", ["(Model B: 9, 8)", "(8, Model A: 9)", "(B: 9, B: 8)"])
def test_labels_that_contradict_the_order(tail: str) -> None:
    assert read_scores(f"[Scores]: {tail}").reason == "the scores' labels contradict their order"


def test_the_prompt_itself_holds_no_scores() -> None:
    turns = [{"from": "user", "value": "Q?"}, {"from": "assistant", "value": "truth", "answer": "given"}]
    row = {"conversations": turns, "role": "Ada", "script": "The Engine", "other_role": "a curious human"}
    for system, text in review_prompts(row).values():
        assert read_scores(f"{system}\n{text}").pair is None
        assert read_scores(f"{text}\n8, 9").pair is None


LONG = 500_000


@pytest.mark.parametrize("text", ["[" * LONG, "[ " * LONG, "\n" * LONG, "[Scores]: A 8" + " b" * LONG, " " * LONG])
def test_long_nonsense_is_refused(text: str) -> None:
    """A pattern whose time grows with the square of the length would not end."""
    assert read_scores(text).pair is None


def test_stored_forms() -> None:
    published, forgiven = read_scores("[Scores]: (8, 9)"), read_scores("[scores]: (8, 9)")
    failed = read_scores("none")
    assert review_record("t", published) == {"review": "t", "score": [8.0, 9.0]}
    assert review_record("t", published, 2) == {"review": "t", "score": [8.0, 9.0], "attempts": 2}
    assert review_record("t", forgiven) == {"review": "t", "score": [8.0, 9.0], "read_by": "forgiving"}
    assert review_record("t", failed, 4) == {"review": "t", "score": [], "failure": "no [Scores] marker", "attempts": 4}


@pytest.mark.parametrize("review", ["[Scores]: (8, 9)", "[scores]: (8, 9)", "none"])
def test_what_is_stored_is_read_back(review: str) -> None:
    reading = read_scores(review)
    record = json.loads(json.dumps(review_record(review, reading, 3)))
    assert read_record(record) == reading
    assert stored_pair(record) == reading.pair


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "no review stored"),
        ({}, "no review stored"),  # published: a failed row may hold an empty record
        ({"review": "x", "score": {}}, "no scores stored"),  # published: get_review_score returns {} when it fails
        ({"review": "x", "score": []}, "no scores stored"),
        ({"review": "x"}, "no scores stored"),
        ({"score": [], "failure": "the reviewer broke down"}, "the reviewer broke down"),
        ({"score": [8]}, "the stored score is not a pair of numbers"),
        ({"score": [8, "9"]}, "the stored score is not a pair of numbers"),
        ({"score": [True, 9]}, "the stored score is not a pair of numbers"),
        ({"score": "89"}, "the stored score is not a pair of numbers"),
        ({"score": {"a": 8, "b": 9}}, "the stored score is not a pair of numbers"),
        ({"score": [8, float("nan")]}, "a score outside 0 to 10"),
        ({"score": [8, 10**400]}, "a score outside 0 to 10"),
        ("text", "the stored review is not an object"),
    ],
)
def test_stored_failures(record: Any, reason: str) -> None:
    assert read_record(record) == ScoreReading(None, None, reason)


def test_a_pair_mended_by_hand_counts() -> None:
    assert stored_pair({"review": "unreadable", "score": [8, 9]}) == (8, 9)
