"""Converts lines of ids and answers to the published files of answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from data_utils.errors import MMRoleError, first_of, raise_problems
from data_utils.files import make_folder, read_json, write_json
from data_utils.layout import KINDS, SHORT_SPLITS, answers_folder, check_folder_name, file_of_tests
from data_utils.paths import is_there
from data_utils.schema import Record, Row, TestSample, Text, read_rows, validate_row


class _Answer(Record):
    """A line of finished answers."""

    id: Text
    answer: Text


def write_answers(
    data_root: Path, answers: Path, agent: str, eval_dir: Path, *, partial: bool = False, overwrite: bool = False
) -> dict[Path, int]:
    """Writes the published files of an agent's finished answers.

    Args:
        data_root: Holds the test files.
        answers: A file of JSON lines (or a JSON list) with `id` and `answer`.
        agent: The folder name of the answers.
        eval_dir: The evaluation folder.
        partial: Leaves out samples without an answer, and files without any.
        overwrite: Replaces files that exist.

    Returns:
        How many answers each file has.

    Raises:
        ProblemsError: Ids are missing, repeated or unknown, or a file cannot be read or exists; nothing is written.
    """
    check_folder_name(agent, "--agent")
    texts, problems = _read(answers)
    files: dict[Path, list[Row]] = {}
    missing: list[str] = []
    known: set[str] = set()
    for split, folder in SHORT_SPLITS.items():
        for kind in KINDS:
            rows, wrong = read_rows(data_root / "data" / "test" / folder / file_of_tests(kind), TestSample)
            problems += wrong
            known |= {row["id"] for row in rows}
            missing += [row["id"] for row in rows if row["id"] not in texts]
            answered = [_with_answer(row, texts[row["id"]]) for row in rows if row["id"] in texts]
            if answered:
                files[answers_folder(eval_dir, split, agent) / file_of_tests(kind)] = answered
    if missing and not partial:
        fix = "answer these samples too, or give --partial to leave them out"
        problems.append(MMRoleError(f"{len(missing)} samples have no answer", first_of(missing), answers, fix))
    if unknown := [name for name in texts if name not in known]:
        fix = "use the ids of the test files below data/test/"
        problems.append(MMRoleError(f"{len(unknown)} ids belong to no test sample", first_of(unknown), answers, fix))
    for path in files:
        if not overwrite and is_there(path):
            fix = "give another --agent, or --overwrite"
            problems.append(MMRoleError("answers of this name exist already", path, fix=fix))
    raise_problems(problems)
    for path, rows in files.items():
        make_folder(path.parent, "nothing was written")
        write_json(path, rows)
    return {path: len(rows) for path, rows in files.items()}


def _read(path: Path) -> tuple[dict[str, str], list[MMRoleError]]:
    try:
        lines = read_json(path)
    except MMRoleError as error:
        return {}, [error]
    lines = lines if isinstance(lines, list) else [lines]  # one line alone is a JSON object
    problems = [
        problem for number, line in enumerate(lines, 1) for problem in validate_row(line, _Answer, number, path)
    ]
    if problems:
        return {}, problems
    counts = Counter(line["id"] for line in lines)
    if double := [name for name, count in counts.items() if count > 1]:
        fix = "keep one answer for each id"
        problems.append(MMRoleError(f"{len(double)} ids are repeated", first_of(double), path, fix))
    return {line["id"]: line["answer"] for line in lines}, problems


def _with_answer(row: Row, answer: str) -> Row:
    user, assistant = row["conversations"]
    return {**row, "conversations": [user, {**assistant, "answer": answer}]}
