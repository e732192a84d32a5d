"""Answers the test sets of MMRole: every sample's image and prompt to a role-playing agent's words.

Without --input_dir both test sets below --data_root are answered into <eval_dir>/{in,out}-test_answers/<agent>/; with
it, the .json files of that folder into --output_dir, as in the released script. An answer stands in
`conversations[1].answer`, in the published format.

A run that ended early goes on where it stopped. A sample that fails (an unreadable image, a prompt that is too long)
gets an empty answer, which is not reviewed; it is counted, tried again by the next run, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_utils.errors import MMRoleError
from data_utils.layout import KINDS, SHORT_SPLITS, answers_folder, check_folder_name, file_of_tests
from data_utils.schema import Row, TestSample
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
from eval.running.inputs import Input, Source, json_sources, output_problems, read_inputs
from eval.running.jobs import Job, run_job
from eval.running.result_files import FileReport, Outcome, ResultFile, Unit
from eval.running.team import run_script


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser, model_path=ROOT / "model_weights" / "MMRole-Agent")
    parser.add_argument("--agent", default="mmrole-agent", help="folder name of the answers (%(default)s)")
    return resolved(parser.parse_args(argv))


def find_sources(options: argparse.Namespace) -> tuple[list[Source], list[MMRoleError]]:
    """The files to answer and where their answers go, and what is wrong with the flags about them."""
    problems = flag_problems(options)
    if problems:
        return [], problems
    try:
        if options.input_dir:
            return json_sources(options.input_dir, options.output_dir, options.input_file), []
        return _test_sets(options.data_root, options.eval_dir, options.agent), []
    except MMRoleError as error:
        return [], [error]


def answer_file(source: Input) -> ResultFile:
    """The file of answers to be made from a file of samples: one text per row."""
    units = [
        Unit(
            key=row["id"],
            image=source.images[row["id"]],
            image_name=row["image"],
            system=row["system"],
            text=row["conversations"][0]["value"],
        )
        for row in source.rows
    ]

    def assemble(outcomes: Mapping[str, Outcome]) -> list[Row]:
        return [with_answer(row, outcomes[row["id"]].text) for row in source.rows]

    return ResultFile(source.source.output, units, len(source.rows), assemble, frozenset(source.ids))


def with_answer(row: Row, answer: str) -> Row:
    """A copy of the row with an answer in its published place."""
    user, assistant = row["conversations"]
    return {**row, "conversations": [user, {**assistant, "answer": answer}]}


def main(argv: Sequence[str] | None = None, make_backend: BackendFactory = native_backend) -> int:
    """Answers what the command line asks for.

    Returns:
        The exit status: 0, or 1 if a sample failed.

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
    inputs, wrong = read_inputs(sources, TestSample, selection(options)) if sources else ([], [])
    problems += [*wrong, *output_problems(sources)]
    files = [answer_file(source) for source in inputs]
    settings, reports = check_run(options, problems, lambda: run_settings(options, "answers"), files)
    advice = "the same command again tries them once more"
    return Job(options, inputs, settings, reports, unit_name="answer", notes=_notes, advice=advice)


def _test_sets(data_root: Path, eval_dir: Path, agent: str) -> list[Source]:
    check_folder_name(agent, "--agent")
    test = data_root / "data" / "test"
    if not test.is_dir():
        fix = "fetch the data set with scripts/download_data.sh, or give its folder with --data_root"
        raise MMRoleError("the data root holds no test sets", test, "--data_root", fix)
    return [
        Source(test / folder / file_of_tests(kind), answers_folder(eval_dir, split, agent) / file_of_tests(kind))
        for split, folder in SHORT_SPLITS.items()
        for kind in KINDS
    ]


def _notes(report: FileReport) -> str:
    empty = [outcome for outcome in report.outcomes.values() if not outcome.text and not outcome.error]
    return f"{len(empty)} empty answers" if empty else ""


if __name__ == "__main__":
    sys.exit(run_script(main))
