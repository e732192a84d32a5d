# ruff: noqa: N999 - the released file name
"""Reviews agents' answers on the eight metrics with the reward model.

Without --input_dir the answers of every agent below <eval_dir>/{in,out}-test_answers/ (or those named with --agent)
are reviewed into <eval_dir>/{in,out}-test_reviews/<agent>/; with it, the .json files of that folder into --output_dir,
as in the released script. A row gets `rm_review[metric] = {"review": text, "score": [a, b]}`; one with an empty answer
gets none.

A run that ended early goes on where it stopped. A review whose scores cannot be read is asked for again with fresh
seeds, --retries times; what stays unreadable is stored with its text and the reason, counted, and makes the exit status
1. A later run tries again what ended in an error, and with a larger --retries what stayed unreadable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_utils.errors import MMRoleError
from data_utils.layout import SHORT_SPLITS, answers_folder, reviews_folder
from data_utils.paths import SHOWN, is_folder, listed
from data_utils.schema import AnswerRow, Row
from eval.judging.metrics import METRIC_NAMES
from eval.judging.prompt import is_reviewable, review_prompts
from eval.judging.scores import ScoreReading, read_scores, review_record
from eval.running.flag_types import natural
from eval.running.flags import (
    ROOT,
    BackendFactory,
    add_run_flags,
    check_run,
    flag_problems,
    native_backend,
    resolved,
    run_settings,
    selection,
)
from eval.running.inputs import SHOWN_JSON, Input, Source, json_sources, output_problems, read_inputs
from eval.running.jobs import Job, run_job
from eval.running.result_files import FileReport, Outcome, ResultFile, Unit
from eval.running.team import run_script


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser, model_path=ROOT / "model_weights" / "MMRole-Eval_RM")
    parser.add_argument("--agent", nargs="+", action="extend", help="agents to review (all that have answers)")
    parser.add_argument("--retries", type=natural, default=3, help="more tries for unreadable scores (%(default)s)")
    return resolved(parser.parse_args(argv))


def find_sources(options: argparse.Namespace) -> tuple[list[Source], list[MMRoleError]]:
    """The answers to review and where their reviews go, and what is wrong with the flags about them."""
    problems = flag_problems(options)
    if problems:
        return [], problems
    try:
        if options.input_dir:
            return json_sources(options.input_dir, options.output_dir, options.input_file), []
        sources = _agents_sources(options.eval_dir, options.agent)
    except MMRoleError as error:
        return [], [error]
    found = {source.output.parent.name for source in sources}
    missing = [agent for agent in options.agent or [] if agent not in found]
    if missing or not sources:
        where = f"{options.eval_dir}/{{in,out}}-test_answers/"
        fix = "answer the test sets first (bash inference.sh), or check --agent and --eval_dir"
        return sources, [MMRoleError("no answers are there to review", missing or None, where, fix)]
    return sources, []


def review_file(source: Input) -> ResultFile:
    """The file of reviews to be made from a file of answers: eight texts per row that has an answer."""
    units = []
    for row in filter(is_reviewable, source.rows):
        for metric, (system, text) in review_prompts(row).items():
            key, image = review_key(row, metric), source.images[row["id"]]
            units.append(Unit(key, image, row["image"], system, text, row=row["id"]))

    def assemble(outcomes: Mapping[str, Outcome]) -> list[Row]:
        return [with_reviews(row, outcomes) for row in source.rows]

    return ResultFile(source.source.output, units, len(source.rows), assemble, frozenset(source.ids))


def review_key(row: Row, metric: str) -> str:
    """What names a review within its file."""
    return f"{metric}: {row['id']}"


def with_reviews(row: Row, outcomes: Mapping[str, Outcome]) -> Row:
    """A copy of the row with its reviews at the end; without any if its answer is empty."""
    copy = {key: value for key, value in row.items() if key != "rm_review"}
    if is_reviewable(row):
        copy["rm_review"] = {metric: _record(outcomes[review_key(row, metric)]) for metric in METRIC_NAMES}
    return copy


def main(argv: Sequence[str] | None = None, make_backend: BackendFactory = native_backend) -> int:
    """Reviews what the command line asks for.

    Returns:
        The exit status: 0, or 1 if a review failed.

    Raises:
        MMRoleError: If anything is wrong that can be known before the model is loaded, or a file cannot be written.
    """
    return run_job(lambda: prepare(parse_arguments(argv)), make_backend)


def prepare(options: argparse.Namespace) -> Job:
    """Reads and checks everything that the command line asks for.

    Raises:
        ProblemsError: If anything is wrong, with everything that is.
    """
    sources, problems = find_sources(options)
    inputs, wrong = read_inputs(sources, AnswerRow, selection(options, is_reviewable)) if sources else ([], [])
    problems += [*wrong, *output_problems(sources)]
    files = [review_file(source) for source in inputs]
    attempts = 1 + options.retries
    settings, reports = check_run(
        options, problems, lambda: run_settings(options, "reviews", attempts=attempts, complaint=_complaint), files
    )
    advice = "the same command again repeats what ended in an error; for unreadable scores give a larger --retries"
    return Job(options, inputs, settings, reports, unit_name="review", notes=_notes, advice=advice)


def _agents_sources(eval_dir: Path, agents: Sequence[str] | None) -> list[Source]:
    sources = []
    for split in SHORT_SPLITS:
        folders = filter(is_folder, listed(answers_folder(eval_dir, split), SHOWN))
        for folder in folders:
            if (agents is None or folder.name in agents) and listed(folder, SHOWN_JSON):
                sources += json_sources(folder, reviews_folder(eval_dir, split, folder.name))
    return sources


def _complaint(text: str) -> str | None:
    reading = read_scores(text)
    return reading.reason if reading.pair is None else None


def _record(outcome: Outcome) -> dict[str, object]:
    failed = outcome.failure(_complaint) if outcome.error else None
    reading = ScoreReading(None, reason=failed) if failed else read_scores(outcome.text)
    return review_record(outcome.text, reading, outcome.attempt + 1)


def _notes(report: FileReport) -> str:
    rows = {unit.key.split(": ", 1)[1] for unit in report.file.units}
    readers = [read_scores(outcome.text).reader for outcome in report.outcomes.values() if not outcome.error]
    parts = [f"{len(report.file.units)} reviews"]
    if len(rows) < report.file.rows:
        parts.append(f"{report.file.rows - len(rows)} rows without an answer, not reviewed")
    if "forgiving" in readers:
        parts.append(f"{readers.count('forgiving')} read by the forgiving reader")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(run_script(main))
