"""Asks for everything planned, journals each accepted answer, and writes the files of the data root."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_utils.endpoint import BudgetSpentError, ChatRequest, Endpoint
from data_utils.errors import raise_problems
from data_utils.files import make_folder, write_json, write_text
from data_utils.grow.plan import Plan, Record, check_images, dialogue_number
from data_utils.grow.templates import Templates
from data_utils.grow.validation import UnusableError
from data_utils.journal import Journal, read_journal
from data_utils.layout import COCO, dialogues_folder, file_name, profiles_folder
from data_utils.paths import is_file
from data_utils.prompts import prompt_language
from data_utils.roots import add_profile
from data_utils.schema import Dialogue, read_rows

JOURNAL = "grown.jsonl"  # of the data root
_WRITTEN = "written"  # key of the number of records that are in files; keys of plans have a slash
_SHOWN = 10  # failures that are printed


class _NoAnswerError(Exception):
    """The endpoint gave no answer after all retries."""


@dataclass(frozen=True)
class Settings:
    """The settings of the requests.

    Attributes:
        temperature: None is the model's own.
        max_tokens: Limit of an answer.
        tries: Attempts to get a usable answer.
        workers: Requests at once.
    """

    temperature: float | None = None
    max_tokens: int = 4096
    tries: int = 3
    workers: int = 4


@dataclass
class Outcome:
    """The result of a run: the number of accepted answers, failures by key, and how many the budget left out."""

    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left: int = 0
    left_because: str = ""

    def summary(self) -> str:
        """Return a one-line summary, after a line for each failure."""
        lines = [f"failed: {key}: {reason}" for key, reason in list(self.failed.items())[:_SHOWN]]
        lines += [f"left after this: {self.left_because}"] if self.left_because else []
        lines += ["run the same command again to request what is missing"] if self.failed or self.left else []
        counts = f"{self.passed} grown, {len(self.failed)} failed, {self.left} left because the budget is spent"
        return "\n".join([*lines, counts])


def grow(
    root: Path,
    plan: Callable[[Mapping[str, Record]], list[Plan]],
    endpoint: Endpoint,
    templates: Templates,
    settings: Settings,
) -> Outcome:
    """Plan, ask, validate, journal and write.

    Args:
        root: The data root to write to.
        plan: Makes the plans, given all earlier results by key.
        endpoint: The model.
        templates: The prompts.
        settings: The settings of the requests.

    Raises:
        MMRoleError: A plan cannot work, the endpoint refuses all requests, or a file cannot be written.
        KeyboardInterrupt: After Ctrl-C; finished and pending answers are kept first, unless a second one comes.
    """
    content = read_journal(root / JOURNAL)
    plans = plan(_records(content.entries if content is not None else {}))
    check_images(plans)
    make_folder(root, "nothing was started")
    with Journal.open(root / JOURNAL, {}, {}) as journal:
        try:
            return _Growth(journal, endpoint, templates, settings).run(plans)
        finally:
            _write_files(root, journal)


def _records(entries: Mapping[str, Any]) -> dict[str, Record]:
    return {key: entry["grown"] for key, entry in entries.items() if key != _WRITTEN}


class _Growth:
    """Asks in several threads; each journals an accepted answer at once."""

    def __init__(self, journal: Journal, endpoint: Endpoint, templates: Templates, settings: Settings) -> None:
        self._journal, self._endpoint, self._templates, self._settings = journal, endpoint, templates, settings
        # Stored with each record.
        self._by = {"model": endpoint.model, "temperature": settings.temperature, "templates": templates.hash}
        self._outcome = Outcome()
        self._lock = threading.Lock()
        self._number = max((entry["number"] for entry in journal.entries.values()), default=0)
        self._answers = {_last_words(record): key for key, record in _records(journal.entries).items()}

    def run(self, plans: Sequence[Plan]) -> Outcome:
        """Ask for all; see `grow`."""
        pool = ThreadPoolExecutor(self._settings.workers)
        futures: list[Future[None]] = []
        try:
            futures += (pool.submit(self._grow, plan) for plan in plans)
            for future in tqdm(as_completed(futures), "growing", len(futures), disable=None):
                future.result()
        except BaseException as error:
            running = sum(future.running() for future in futures)
            self._endpoint.end()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt) and running:
                text = f"waiting for {running} answer(s) under way, which are kept; Ctrl-C again gives them up"
                print(text, file=sys.stderr, flush=True)
            pool.shutdown()  # requests under way are paid for; not in `finally`, so that a second Ctrl-C skips it
            raise
        return self._outcome

    def _grow(self, plan: Plan) -> None:
        problem = ""
        try:
            for _ in range(self._settings.tries):
                try:
                    return self._keep(plan.key, plan.write(self._ask, self._templates.fill))
                except UnusableError as error:
                    problem = self._endpoint.scrub(str(error))
        except _NoAnswerError as error:  # the endpoint has retried already
            problem = str(error)
        except BudgetSpentError as error:
            with self._lock:
                self._outcome.left += 1
                self._outcome.left_because = self._outcome.left_because or problem or str(error)
            return None
        with self._lock:
            self._outcome.failed[plan.key] = problem
        return None

    def _ask(self, system: str, user: str, image: str | None) -> str:
        temperature, max_tokens = self._settings.temperature, self._settings.max_tokens
        request = ChatRequest(user, system, image, temperature=temperature, max_tokens=max_tokens)
        reply = self._endpoint.submit(request).result()
        if reply.error is not None:
            raise _NoAnswerError(reply.error)
        if reply.refusal is not None:
            raise UnusableError(f"the model refused: {reply.refusal}")
        if reply.cut:
            raise UnusableError("the answer was cut off at --max_tokens")
        return reply.text

    def _keep(self, key: str, record: Record) -> None:
        if self._endpoint.holds_key(repr(record)):
            raise UnusableError("the answer holds the key for the endpoint")
        with self._lock:
            words = _last_words(record)
            if words and self._answers.get(words, key) != key:
                raise UnusableError("another dialogue has exactly the same answer")
            self._answers[words] = key
            self._number += 1
            self._journal.add(key, {"number": self._number, "by": self._by, "grown": record})
            self._outcome.passed += 1


def _last_words(record: Record) -> str:
    """Return the last turn of a dialogue; an empty text for a profile."""
    return record["dialogue"]["conversations"][-1]["value"] if "dialogue" in record else ""


def _write_files(root: Path, journal: Journal) -> None:
    """Write what was journalled since the files were last written; older content may have been edited by the user."""
    written = journal.entries.get(_WRITTEN, {"number": 0})["number"]
    entries = [entry for entry in list(journal.entries.values()) if entry["number"] > written]
    if not entries:
        return
    dialogues: dict[Path, list[Record]] = {}
    for record in sorted((entry["grown"] for entry in entries), key=lambda record: record["name"]):
        if "dialogue" in record:
            image_source = "COCO" if record["dialogue"]["image"].startswith(COCO) else "script"
            folder = dialogues_folder(root, record["split"], record["kind"])
            path = folder / f"{file_name(record['name'])}_{image_source}.json"
            dialogues.setdefault(path, []).append(record["dialogue"])
        else:
            _write_profile(root, record)
    for path, new in dialogues.items():
        rows, problems = read_rows(path, Dialogue) if is_file(path) else ([], [])
        raise_problems(problems)
        by_id = {row["id"]: row for row in rows}
        by_id |= {row["id"]: row for row in sorted(new, key=lambda row: dialogue_number(row["id"]))}
        write_json(path, list(by_id.values()))
    journal.add(_WRITTEN, {"number": max(entry["number"] for entry in entries)})


def _write_profile(root: Path, record: Record) -> None:
    folder, name = profiles_folder(root, record["split"]), file_name(record["name"])
    if record["facts"]:
        write_json(folder / "meta_info_hypo" / f"{name}.json", json.loads(record["facts"]))
    else:
        language = "zh" if prompt_language(record["script"]) == "Chinese" else "en"
        write_text(folder / f"raw_info_{language}" / f"{name}.txt", record["text"])
    write_json(folder / "detailed_profiles" / f"{name}.json", record["detailed"])
    add_profile(root, record["split"], record["name"], record["script"], record["profile"])
