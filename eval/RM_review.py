# ruff: noqa: N999 - the released file name
"""Reviews agents' answers on the eight metrics with the reward model, or any model behind an endpoint.

Without --input_dir the answers of every agent below <eval_dir>/{in,out}-test_answers/ (or those named with --agent)
are reviewed into <eval_dir>/{in,out}-test_reviews/<agent>/; with it, the .json files of that folder into --output_dir,
as in the released script. The reviews of another --judge go to <eval_dir>/judges/<judge>/. A row gets
`rm_review[metric] = {"review": text, "score": [a, b]}`; one with an empty answer gets none.

A run that ended early resumes where it stopped. A review without readable scores is requested again with fresh seeds,
--retries times; one that stays unreadable is stored with its text and the reason, counted, and makes the exit status
1. A later run retries reviews that ended in an error, and with a larger --retries also the unreadable ones.

--swap reviews with the two answers exchanged, and --repeat N reviews N times with other seeds; both show how far the
judge can be trusted (eval/RM_result.sh reports it). Their reviews go to <eval_dir>/judges/<judge>-swapped/ and
<eval_dir>/judges/<judge>-repeat-2/ to -N/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from data_utils.console import ignore_lost_output
from data_utils.errors import MMRoleError, run_main
from data_utils.flag_types import natural, positive
from data_utils.journal import JournalContent, read_journal
from data_utils.layout import (
    RELEASED_JUDGE,
    SHORT_SPLITS,
    answers_folder,
    check_folder_name,
    journal_path,
    nested_agents,
    repeated_judge,
    reviews_folder,
    swapped_judge,
)
from data_utils.paths import is_folder, listed
from data_utils.schema import AnswerRow, Row
from eval.backends.backend import Completion, MakeBackend, Prompt, backend_of
from eval.judging.metrics import METRIC_NAMES
from eval.judging.prompt import is_reviewable, review_prompts
from eval.judging.scores import ScoreReading, read_scores, review_record
from eval.running.flags import ROOT, add_run_flags, flag_problems, resolved
from eval.running.inputs import SHOWN_JSON, Source, json_sources
from eval.running.job import run_job
from eval.running.task import Task

_MODEL_PATH = ROOT / "model_weights" / "MMRole-Eval_RM"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser, model_path=_MODEL_PATH)
    parser.add_argument("--agent", nargs="+", action="extend", help="agents to review (all that have answers)")
    parser.add_argument("--retries", type=natural, default=3, help="more tries for unreadable scores (%(default)s)")
    parser.add_argument("--judge", default=RELEASED_JUDGE, help="the judge's name (%(default)s)")
    parser.add_argument("--swap", action="store_true", help="review with the two answers exchanged")
    parser.add_argument(
        "--repeat", type=positive, default=1, help="review so many times with other seeds (%(default)s)"
    )
    return resolved(parser.parse_args(argv), model_path=_MODEL_PATH)


def find_sources(options: argparse.Namespace, number: int = 1) -> tuple[list[Source], list[MMRoleError]]:
    """Return the answers to review and the targets of a repetition's reviews, and what is wrong with their flags."""
    problems = flag_problems(options)
    if options.input_dir and options.judge != RELEASED_JUDGE:
        fix = "leave out --judge, and choose another --output_dir for each judge"
        problems.append(MMRoleError("--judge has no effect with --input_dir", options.judge, "--judge", fix))
    if options.input_dir and options.repeat > 1:
        fix = "give another --output_dir and --seed for each repetition"
        problems.append(MMRoleError("--repeat names its output folders itself", options.repeat, "--repeat", fix))
    if options.repeat > 1 and options.no_random:
        fix = "leave out one of the two"
        problems.append(
            MMRoleError("greedy reviews are the same each time", options.repeat, "--repeat, --no_random", fix)
        )
    if problems:
        return [], problems
    try:
        check_folder_name(options.judge, "--judge")
        if options.input_dir:
            return json_sources(options.input_dir, options.output_dir, options.input_file), []
        sources = _agents_sources(options.eval_dir, options.agent, _place(options, number))
    except MMRoleError as error:
        return [], [error]
    folders = [] if options.agent else [answers_folder(options.eval_dir, split) for split in SHORT_SPLITS]
    if nested := [problem for folder in folders for problem in nested_agents(folder)]:
        return sources, nested
    found = {source.output.parent.name for source in sources}
    missing = [agent for agent in options.agent or [] if agent not in found]
    if missing or not sources:
        where = f"{options.eval_dir}/{{in,out}}-test_answers/"
        fix = "answer the test sets first (bash inference.sh), or check --agent and --eval_dir"
        return sources, [MMRoleError("there are no answers to review", missing or None, where, fix)]
    return sources, []


def prompts(row: Row, image: Path, *, swap: bool = False) -> list[Prompt]:
    """Return the prompts of an answered row, one per metric."""
    return [
        Prompt(review_key(row, metric), row["id"], image, row["image"], system, text)
        for metric, (system, text) in review_prompts(with_answers_swapped(row) if swap else row).items()
    ]


def with_answers_swapped(row: Row) -> Row:
    """Return a copy of the row with answer and reference exchanged."""
    question, last, *others = row["conversations"]
    return {**row, "conversations": [question, {**last, "value": last["answer"], "answer": last["value"]}, *others]}


def review_key(row: Row, metric: str) -> str:
    """Return the key of a review within its file."""
    return f"{metric}: {row['id']}"


def with_reviews(row: Row, completions: Mapping[str, Completion], task: Task, *, swap: bool = False) -> Row:
    """Return a copy of the row with its reviews at the end; without any if its answer is empty."""
    copy = {key: value for key, value in row.items() if key != "rm_review"}
    if is_reviewable(row):
        copy["rm_review"] = {
            metric: _record(completions[review_key(row, metric)], task, swap) for metric in METRIC_NAMES
        }
    return copy


def judging(retries: int, sources: Sequence[Source] = (), *, swap: bool = False) -> Task:
    """Return the task of reviewing.

    Args:
        retries: How often a review without readable scores is requested again.
        sources: Answers and reviews, whose journals say which models wrote them.
        swap: The reference is model A, and the answer model B.
    """
    task = Task(
        name="swapped reviews" if swap else "reviews",
        unit="review",
        record=AnswerRow,
        prompts=partial(prompts, swap=swap),
        fill=lambda row, completions: with_reviews(row, completions, task, swap=swap),
        notes=_notes,
        advice="run the same command again to repeat failed reviews; for unreadable scores give a larger --retries",
        is_wanted=is_reviewable,
        complaint=_complaint,
        attempts=1 + retries,
        remarks=lambda: _own_answers(sources),
    )
    return task


def main(argv: Sequence[str] | None = None, make_backend: MakeBackend = backend_of) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 if a review failed.

    Raises:
        MMRoleError: If a check before the load of the model fails, or a file cannot be written.
    """
    options = parse_arguments(argv)
    backend = make_backend(options)
    status, seed = 0, options.seed
    for number in range(1, options.repeat + 1):
        options.seed = seed + number - 1
        sources, problems = find_sources(options, number)
        task = judging(options.retries, sources, swap=options.swap)
        status = max(status, run_job(task, options, sources, problems, backend, make_backend))
    return status


def _place(options: argparse.Namespace, number: int) -> str:
    """Return the judge's name for the reviews of a repetition."""
    judge = swapped_judge(options.judge) if options.swap else options.judge
    return judge if number == 1 else repeated_judge(judge, number)


def _agents_sources(eval_dir: Path, agents: Sequence[str] | None, judge: str) -> list[Source]:
    sources = []
    for split in SHORT_SPLITS:
        folders = filter(is_folder, listed(answers_folder(eval_dir, split)))
        for folder in folders:
            if (agents is None or folder.name in agents) and listed(folder, SHOWN_JSON):
                sources += json_sources(folder, reviews_folder(eval_dir, split, folder.name, judge=judge))
    return sources


def _own_answers(sources: Sequence[Source]) -> list[str]:
    """Return a remark if the judge has reviewed its own answers."""
    agents: dict[str, None] = {}
    for source in sources:
        with suppress(MMRoleError):
            answers, reviews = read_journal(journal_path(source.input)), read_journal(journal_path(source.output))
            if answers and reviews and _same_model(answers, reviews):
                agents[source.input.parent.name] = None
    return [f"the judge and the agent are the same model: {', '.join(agents)}"] if agents else []


def _same_model(answers: JournalContent, reviews: JournalContent) -> bool:
    """Compares fingerprints of checkpoints, or names if one is served: a checkpoint is called as its folder then."""
    journals = answers, reviews
    one, other = [journal.settings.get("model") for journal in journals]
    if one == other or all("backend" not in journal.settings for journal in journals):
        return one == other
    return bool(_names(answers) & _names(reviews))


def _names(journal: JournalContent) -> set[str]:
    names = [journal.settings.get("model"), *(entry.get("served") for entry in journal.entries.values())]
    if "backend" not in journal.settings:
        names.append(journal.info.get("names", {}).get("model"))
    return {Path(name).name for name in names if name}


def _complaint(text: str) -> str | None:
    reading = read_scores(text)
    return reading.reason if reading.pair is None else None


def _record(completion: Completion, task: Task, swap: bool) -> dict[str, object]:
    failed = task.failure(completion) if completion.error or completion.refusal is not None else None
    reading = ScoreReading(None, reason=failed) if failed else read_scores(completion.text)
    return review_record(completion.text, reading, completion.attempt + 1, swapped=swap)


def _notes(rows: Sequence[Row], completions: Sequence[Completion]) -> list[str]:
    unanswered = sum(not is_reviewable(row) for row in rows)
    readers = [read_scores(completion.text).reader for completion in completions if not completion.error]
    parts = [f"{(len(rows) - unanswered) * len(METRIC_NAMES)} reviews"]
    if unanswered:
        parts.append(f"{unanswered} rows without an answer, not reviewed")
    if "forgiving" in readers:
        parts.append(f"{readers.count('forgiving')} read by the forgiving reader")
    return parts


if __name__ == "__main__":
    ignore_lost_output()
    sys.exit(run_main(main))
