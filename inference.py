"""Answers the test sets of MMRole: shows every sample's image and prompt to a role-playing agent.

The agent is a Qwen-VL checkpoint (--model_path), or any model behind OpenAI-compatible endpoints (--endpoint, --model).

Without --input_dir both test sets below --data_root are answered into <eval_dir>/{in,out}-test_answers/<agent>/; with
it, the .json files of that folder into --output_dir, as in the released script. An answer is stored in
`conversations[1].answer`, in the published format.

A run that ended early resumes where it stopped. A sample that fails (an unreadable image, a prompt that is too long)
gets an empty answer, which is not reviewed; it is counted, retried by the next run, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_utils.console import ignore_lost_output
from data_utils.errors import MMRoleError, run_main
from data_utils.layout import KINDS, SHORT_SPLITS, answers_folder, check_folder_name, file_of_tests
from data_utils.schema import Row, TestSample
from eval.backends.backend import Completion, MakeBackend, Prompt, backend_of
from eval.running.flags import ROOT, add_run_flags, flag_problems, resolved
from eval.running.inputs import Source, json_sources
from eval.running.job import run_job
from eval.running.task import Task

_MODEL_PATH = ROOT / "model_weights" / "MMRole-Agent"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser, model_path=_MODEL_PATH)
    parser.add_argument("--agent", help="folder name of the answers (mmrole-agent, or that of a served --model)")
    options = resolved(parser.parse_args(argv), model_path=_MODEL_PATH)
    if not options.input_dir:
        options.agent = options.agent or (folder_name(options.model) if options.endpoint else "mmrole-agent")
    return options


def folder_name(model: str | None) -> str:
    """Return a served model's name as a folder name: `org/model:tag` becomes `org-model-tag`."""
    return re.sub(r"[^\w.-]+", "-", model or "").strip(".-")


def find_sources(options: argparse.Namespace) -> tuple[list[Source], list[MMRoleError]]:
    """Return the files to answer and the files of their answers, and what is wrong with the flags for them."""
    problems = flag_problems(options)
    if problems:
        return [], problems
    try:
        if options.input_dir:
            return json_sources(options.input_dir, options.output_dir, options.input_file), []
        return _test_sets(options.data_root, options.eval_dir, options.agent), []
    except MMRoleError as error:
        return [], [error]


def prompts(row: Row, image: Path) -> list[Prompt]:
    """Return the prompt of a sample."""
    return [Prompt(row["id"], row["id"], image, row["image"], row["system"], row["conversations"][0]["value"])]


def with_answer(row: Row, completions: Mapping[str, Completion]) -> Row:
    """Return a copy of the row with its answer in the published place."""
    user, assistant = row["conversations"]
    return {**row, "conversations": [user, {**assistant, "answer": completions[row["id"]].text}]}


def _notes(rows: Sequence[Row], completions: Sequence[Completion]) -> list[str]:
    empty = sum(not c.text and not c.error and c.refusal is None for c in completions)
    return [f"{empty} empty answers"] if empty else []


ANSWERING = Task(
    name="answers",
    unit="answer",
    record=TestSample,
    prompts=prompts,
    fill=with_answer,
    notes=_notes,
    advice="run the same command again to retry them",
)


def main(argv: Sequence[str] | None = None, make_backend: MakeBackend = backend_of) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 if a sample failed.

    Raises:
        MMRoleError: If a check before the load of the model fails, or a file cannot be written.
    """
    options = parse_arguments(argv)
    sources, problems = find_sources(options)
    return run_job(ANSWERING, options, sources, problems, make_backend(options), make_backend)


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


if __name__ == "__main__":
    ignore_lost_output()
    sys.exit(run_main(main))
