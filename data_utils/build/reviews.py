"""Builds the reward model's files from reviews: training samples, and the paper's 320 for validation."""

from __future__ import annotations

import pkgutil
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError, raise_problems, shown
from data_utils.files import Row, write_rows
from data_utils.layout import RM_TEST_FILE, RM_TRAIN_FILE
from data_utils.prompts import picture_line
from data_utils.schema import ReviewedRow, read_rows

PUBLISHED_REVIEWS, PUBLISHED_VALIDATION = 23_520, 320

ReviewPrompts = Callable[[Mapping[str, Any]], Mapping[str, tuple[str, str]]]


def build_reviews(reviews: Path, out: Path, prompts: ReviewPrompts, *, validation: int, seed: int) -> None:
    """Write the reward model's files from a folder of reviews, and print their counts; see `write_reviews`."""
    if validation < 0:
        raise MMRoleError("a number must be at least 0", validation, "--validation", "give a larger number")
    rows = read_reviews(reviews)
    trained, held_out = write_reviews(out, rows, prompts, validation=validation, seed=seed)
    agents = len({agent for agent, _ in rows})
    print(f"{trained:,} reward-model samples and {held_out:,} for validation, of {agents} agents")
    if trained + held_out != PUBLISHED_REVIEWS:
        print(f"not the paper's {PUBLISHED_REVIEWS:,} reviews of 10 agents")
    print(f"written to {(out / RM_TRAIN_FILE).resolve()} and {Path(RM_TEST_FILE).name}")


def read_reviews(folder: Path) -> list[tuple[str, Row]]:
    """Return the reviewed rows below a folder, each with the reviewed agent (the name of its file's folder).

    If it has folders `<split>-test_reviews`, only these are read: in an evaluation folder the released judge's, not
    those below `judges/`.

    Raises:
        ProblemsError: There are none, or files are wrong; every problem is reported.
    """
    files = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    files = [path for path in files if path.relative_to(folder).parts[0] != "judges"]  # reviews by other judges
    inside = [path for path in files if any(part.endswith("_reviews") for part in path.parts)]
    problems: list[MMRoleError] = []
    found: list[tuple[str, Row]] = []
    for path in inside or files:
        rows, wrong = read_rows(path, ReviewedRow)
        problems += wrong
        found += [(path.parent.name, row) for row in rows]
        swapped = [
            row["id"] for row in rows if any(review.get("swapped") for review in row.get("rm_review", {}).values())
        ]
        if swapped:
            fix = "give reviews of the usual order: the published prompt shows the answer first"
            problems.append(MMRoleError("the two answers were exchanged for these reviews", swapped[:5], path, fix))
    if not problems and not any(row.get("rm_review") for _, row in found):
        problems.append(MMRoleError("no reviews", None, folder, "give the folder that eval/RM_review.sh wrote to"))
    raise_problems(problems)
    return found


def write_reviews(
    data_root: Path, reviews: Sequence[tuple[str, Row]], prompts: ReviewPrompts, *, validation: int, seed: int
) -> tuple[int, int]:
    """Write the reward model's training and validation files.

    Args:
        data_root: Where `RM_data/` is.
        reviews: Agents and their reviewed rows.
        prompts: Makes {metric: (system, text)} from a row.
        validation: How many reviews are kept for validation, drawn from all.
        seed: Seed of the draw.

    Returns:
        The numbers of training and of validation samples.

    Raises:
        MMRoleError: There are too few reviews, ids are repeated, or a file cannot be written.
    """
    names = [sample["id"] for sample in _review_samples(reviews, lambda row: dict.fromkeys(row["rm_review"], ("", "")))]
    again = [name for name, count in Counter(names).items() if count > 1]
    if again:
        fix = "give the reviews of one reviewer, one folder per agent"
        raise MMRoleError(f"{len(again)} reviews are repeated", again[:5], "--reviews", fix)
    if len(names) <= validation:
        fix = "give more reviews, or a smaller --validation"
        raise MMRoleError("too few reviews", f"{len(names)} reviews, {validation} for validation", "--reviews", fix)
    drawn = set(random.Random(seed).sample(sorted(names), validation))  # noqa: S311 - draws samples, keeps no secret

    def part(held_out: bool) -> Iterator[Row]:
        samples = _review_samples(reviews, prompts)
        return (sample for sample in samples if (sample["id"] in drawn) == held_out)

    return write_rows(data_root / RM_TRAIN_FILE, part(False)), write_rows(data_root / RM_TEST_FILE, part(True))


def named_function(name: str) -> ReviewPrompts:
    """Return the function that `module:function` names, with its result checked at each call.

    Raises:
        MMRoleError: There is no such function.
    """
    try:
        function = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        fix = f"give it as module:function ({error})"
        raise MMRoleError("no such function", name, "--review_prompts", fix) from error

    def checked(row: Mapping[str, Any]) -> Mapping[str, tuple[str, str]]:
        fix = "name a function that takes a reviewed row and gives {metric: (system, text)}"
        try:
            found = function(row)
        except TypeError as error:  # it takes something else, or is not a function
            raise MMRoleError(f"it makes no prompts: {error}", name, "--review_prompts", fix) from error
        if not isinstance(found, Mapping) or not all(map(_is_prompt, found.values())):
            raise MMRoleError(f"it makes no prompts, but {shown(repr(found))}", name, "--review_prompts", fix)
        return found

    return checked


def _is_prompt(prompt: object) -> bool:
    return isinstance(prompt, tuple | list) and len(prompt) == 2 and all(isinstance(part, str) for part in prompt)


def _review_samples(reviews: Sequence[tuple[str, Row]], prompts: ReviewPrompts) -> Iterator[Row]:
    for agent, row in reviews:
        yield from reward_model_samples([row], prompts, agent=agent)


def reward_model_samples(
    rows: Iterable[Mapping[str, Any]], review_prompts: ReviewPrompts, *, agent: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield a reward-model training sample per review: the review prompt as user turn, the review as the assistant's.

    Args:
        rows: Reviewed rows in the published form; a row without ``rm_review`` (an empty answer) gives nothing.
        review_prompts: Makes {metric: (system, text)} from a row; the data tools know no prompts of the evaluation.
        agent: The reviewed agent; put before the ids, which would otherwise repeat from agent to agent.

    Raises:
        MMRoleError: A review has a metric without a prompt.
    """
    for row in rows:
        if not row.get("rm_review"):
            continue
        prompts = review_prompts(row)
        for metric, review in row["rm_review"].items():
            if not review["score"]:
                continue  # without a readable score it would teach the judge to write none
            if metric not in prompts:
                raise MMRoleError(
                    "a review of an unknown metric",
                    value=metric,
                    where=f"row {row['id']}",
                    fix=f"use the published names: {', '.join(prompts)}",
                )
            system, text = prompts[metric]
            yield {
                "id": "_".join(filter(None, [agent, row["id"], metric])),
                "system": system,
                "image": row["image"],
                "conversations": [
                    {"from": "user", "value": picture_line(row["image"]) + text},
                    {"from": "assistant", "value": review["review"]},
                ],
            }
