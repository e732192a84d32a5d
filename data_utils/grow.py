"""Grows the data as the paper did, with a strong model behind an OpenAI-compatible endpoint (the key: OPENAI_API_KEY).

    python -m data_utils.grow profile ROOT --model M --name "Ada" --script "My Novel" --text ada.txt
    python -m data_utils.grow person ROOT --model M --facts facts.json
    python -m data_utils.grow dialogues ROOT --model M --characters "Ada" --images my_pictures/01.jpg

From a raw text to a profile, from a few facts to the profile of a person who might exist, from profile and image to
dialogues of the three kinds, in the published layout below ROOT. What does not pass the data doctor's checks is asked
for again, and never kept. Stopped, or out of budget, the same command goes on later. The prompts are the templates in
`data_utils/grow_prompts`; `--prompts FOLDER` uses a changed copy.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from tqdm import tqdm

from data_utils.build import KINDS, SPLITS
from data_utils.errors import MMRoleError, run_main
from data_utils.files import Journal, make_folder
from data_utils.grow_checks import UnusableError
from data_utils.grow_client import Budget, BudgetSpentError, Endpoint, NoAnswerError, Settings
from data_utils.grow_files import JOURNAL, forget, write_dialogues, write_profile
from data_utils.grow_plan import (
    DialoguePlan,
    ProfilePlan,
    plan_dialogues,
    plan_person,
    plan_profile,
)

PROMPTS = Path(__file__).parent / "grow_prompts"
INTERRUPTED = 130
_SEPARATOR = "\n---\n"

Plan = DialoguePlan | ProfilePlan


class Templates:
    """The prompt templates of a folder: system message and text, parted by a line of three hyphens.

    Raises:
        MMRoleError: A file is missing or is not of this form.
    """

    NAMES = ("profile_from_text", "profile_from_facts", "profile_summary", *KINDS)
    QUESTIONS = ("questions_English", "questions_Chinese")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = {name: self._read(name) for name in (*self.NAMES, *self.QUESTIONS)}
        self.hash = hashlib.sha256(repr(texts).encode()).hexdigest()[:16]
        self.questions = {name.partition("_")[2]: texts[name].split("\n") for name in self.QUESTIONS}
        self._parts = {name: texts[name].partition(_SEPARATOR) for name in self.NAMES}
        for name, (_, separator, _) in self._parts.items():
            if not separator:
                raise MMRoleError("a template has no line ---", None, folder / f"{name}.txt", "put one before the text")

    def fill(self, name: str, values: dict[str, str]) -> tuple[str, str]:
        """System message and text of a template, with the values put in.

        Raises:
            MMRoleError: The template names a value that there is none of.
        """
        system, _, text = self._parts[name]
        try:
            return Template(system).substitute(values), Template(text).substitute(values)
        except (KeyError, ValueError) as error:
            raise MMRoleError(
                "a template cannot be filled", str(error), self.folder / f"{name}.txt",
                f"use these: {', '.join('$' + value for value in sorted(values))}; write a dollar sign as $$",
            ) from None  # fmt: skip

    def _read(self, name: str) -> str:
        path = self.folder / f"{name}.txt"
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise MMRoleError(
                "a template cannot be read", str(error), path, "copy it from data_utils/grow_prompts"
            ) from None


@dataclass
class Outcome:
    """What became of a run."""

    done: int = 0
    failed: int = 0
    left: int = 0  # when the budget was spent

    def told(self, budget: Budget) -> str:
        """A line for the user."""
        parts = [f"{self.done} grown", f"{self.failed} failed", f"{self.left} left for want of budget"]
        return f"{', '.join(parts)}; {budget.requests:,} requests, {budget.tokens:,} tokens"


def grow(
    plans: Sequence[Plan],
    journal: Journal,
    endpoint: Endpoint,
    templates: Templates,
    *,
    tries: int,
    workers: int,
) -> Outcome:
    """Has everything written that is planned.

    Args:
        plans: What is wanted.
        journal: Keeps what is written, by the plan's key, as soon as it has passed the checks.
        endpoint: The model.
        templates: The prompts.
        tries: Answers asked for, until one passes the checks.
        workers: How many are asked for at once.

    Raises:
        MMRoleError: The endpoint will not answer at all, or a file cannot be read or written.
        KeyboardInterrupt: Ctrl-C; what was finished or under way is kept before, unless it comes again.
    """
    keeper = _Keeper(journal, endpoint)
    pool = ThreadPoolExecutor(workers)
    futures = {pool.submit(_write, plan, endpoint, templates, tries): plan for plan in plans}
    given_up = False
    try:
        keeper.collect(tqdm(as_completed(futures), "growing", len(futures), disable=None), futures)
    except KeyboardInterrupt:
        given_up = True  # by a second one
        keeper.end(futures)
        given_up = False
        raise
    finally:
        _drop(futures)
        endpoint.end()
        pool.shutdown(wait=not given_up)
    if keeper.fatal is not None:
        raise keeper.fatal
    return keeper.outcome


Futures = Mapping[Future[dict[str, Any]], Plan]


class _Keeper:
    """Journals what was written, or why it cannot be kept."""

    def __init__(self, journal: Journal, endpoint: Endpoint) -> None:
        self.outcome = Outcome()
        self.fatal: BaseException | None = None
        self._journal, self._endpoint = journal, endpoint
        self._answers = {text for entry in journal.entries.values() for text in _answers(entry.get("grown", {}))}
        self._seen: set[Future[dict[str, Any]]] = set()

    def collect(self, finished: Iterable[Future[dict[str, Any]]], futures: Futures) -> None:
        """Keeps all as they are finished; an error of the user's drops those that have not begun."""
        for future in finished:
            if future.cancelled() or future in self._seen:
                continue
            if isinstance(future.exception(), MMRoleError):  # what is under way is paid for, and still kept
                self.fatal = self.fatal or future.exception()
                _drop(futures)
            else:
                self._keep(future, futures[future].key)
            self._seen.add(future)

    def end(self, futures: Futures) -> None:
        """After Ctrl-C: asks for nothing more, and keeps what is finished or under way, which is paid for."""
        _drop(futures)
        self._endpoint.end()
        running = sum(not future.done() for future in futures)
        if running:
            told = f"waiting for {running} answer(s) under way, which are kept; Ctrl-C again gives them up"
            print(told, file=sys.stderr, flush=True)
        self.collect(as_completed(futures), futures)

    def _keep(self, future: Future[dict[str, Any]], key: str) -> None:
        try:
            record = future.result()
            if self._journal.entries.get(key) == {"grown": record}:
                return  # Ctrl-C came right after it
            self._refuse(record)
        except BudgetSpentError:
            self.outcome.left += 1
        except UnusableError as error:
            self._journal.add(key, {"failed": self._endpoint.scrub(str(error))})
            self.outcome.failed += 1
        else:
            self._journal.add(key, {"grown": record})
            self._answers.update(_answers(record))
            self.outcome.done += 1

    def _refuse(self, record: Mapping[str, Any]) -> None:
        if self._answers.intersection(_answers(record)):
            raise UnusableError("another dialogue has the same answer, word for word")
        if self._endpoint.holds_key(repr(record)):  # written in a way that only reading it as JSON brought to light
            raise UnusableError("the answer holds the key for the endpoint")


def _drop(futures: Iterable[Future[dict[str, Any]]]) -> None:
    for future in futures:
        future.cancel()


def _write(plan: Plan, endpoint: Endpoint, templates: Templates, tries: int) -> dict[str, Any]:
    problem = ""
    for number in range(tries):
        if number and endpoint.ending:
            break
        try:
            return plan.write(endpoint.ask, templates.fill)
        except NoAnswerError as error:  # it was asked often enough
            raise UnusableError(str(error)) from None
        except UnusableError as error:
            problem = str(error)
    raise UnusableError(problem)


def _answers(record: Mapping[str, Any]) -> list[str]:
    """What a dialogue ends with: in a comment, all that the character says."""
    return [record["dialogue"]["conversations"][-1]["value"]] if "dialogue" in record else []


def run(options: argparse.Namespace) -> int:
    """Runs a command; 1 if something failed or was left for want of budget."""
    templates = Templates(options.prompts)
    wanted = options.plan(options, templates)  # all that is wrong with them is told before anything is written
    budget = Budget(options.max_requests, options.max_tokens_total)
    settings = Settings(options.model, options.base_url, options.max_tokens, options.temperature)
    endpoint = Endpoint(settings, budget)
    with _open_journal(options, templates) as journal:
        options.write(options.root, _as_planned(wanted, journal))  # what a run that was killed could not
        plans = [plan for plan in options.plan(options, templates) if _wanted(plan, journal, options)]
        try:
            outcome = grow(plans, journal, endpoint, templates, tries=options.tries, workers=options.workers)
        finally:
            options.write(options.root, _as_planned(wanted, journal))
        failed = {plan.key: journal.entries.get(plan.key, {}).get("failed") for plan in plans}
    print(outcome.told(budget))
    for key, reason in [(key, reason) for key, reason in failed.items() if reason][:10]:
        print(f"  failed: {key}: {endpoint.scrub(reason)}")
    if outcome.failed or outcome.left:
        print("  the same command asks for the missing ones again")
    return 1 if outcome.failed or outcome.left else 0


def _open_journal(options: argparse.Namespace, templates: Templates) -> Journal:
    """A file of dialogues is grown by one model with one set of templates; profiles are written one by one."""
    path = options.root / options.place / JOURNAL
    make_folder(path.parent, "nothing was started")
    alike = options.place == "dialogues"
    by = {"model": options.model, "temperature": options.temperature, "templates": templates.hash}
    if options.overwrite and alike:
        forget(options.root, path)
    return Journal.open(path, by if alike else {}, by, overwrite=options.overwrite and alike)


def _as_planned(plans: Sequence[Plan], journal: Journal) -> dict[str, Any]:
    """A journal's entries in the order of the plans, whichever was finished first; those of earlier plans before."""
    place = {plan.key: number for number, plan in enumerate(plans)}
    return dict(sorted(journal.entries.items(), key=lambda entry: place.get(entry[0], -1)))


def _wanted(plan: Plan, journal: Journal, options: argparse.Namespace) -> bool:
    return "grown" not in journal.entries.get(plan.key, {}) or options.overwrite


def _plan_profile(options: argparse.Namespace, _: Templates) -> list[ProfilePlan]:
    return [plan_profile(options.root, options.split, options.name, options.script, options.text)]


def _plan_person(options: argparse.Namespace, _: Templates) -> list[ProfilePlan]:
    return plan_person(options.root, options.split, options.facts)


def _plan_dialogues(options: argparse.Namespace, templates: Templates) -> list[DialoguePlan]:
    return plan_dialogues(
        options.root, options.source or options.root, options.split, templates.questions,
        characters=options.characters, partner=options.partner, kinds=options.kinds, images=options.images,
        most=options.images_per_character, seed=options.seed,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.grow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="profile|person|dialogues")
    profile = commands.add_parser("profile", help="a profile from a raw text")
    profile.add_argument("--name", required=True, help="the character")
    profile.add_argument("--script", required=True, help="the story, time or world it comes from")
    profile.add_argument("--text", type=Path, required=True, help="what is known, e.g. an encyclopedia's article")
    profile.set_defaults(plan=_plan_profile, write=write_profile, place="profiles")
    person = commands.add_parser("person", help="the profile of a person who might exist, from a few facts")
    person.add_argument("--facts", type=Path, required=True, help='JSON: {"name": ..., "age": ..., ...}, or a list')
    person.set_defaults(plan=_plan_person, write=write_profile, place="profiles")
    dialogues = commands.add_parser("dialogues", help="dialogues from profiles and images")
    dialogues.add_argument("--source", type=Path, help="a data root with the profiles and images (default: ROOT)")
    dialogues.add_argument("--characters", nargs="+", help="names (default: all that have a profile)")
    dialogues.add_argument("--partner", help="who else speaks in inter-role (default: drawn from the same script)")
    dialogues.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    dialogues.add_argument("--images", nargs="+", help="names below images/ (default: the folder of the script)")
    dialogues.add_argument("--images_per_character", type=int, help="so many, drawn by the seed (default: all)")
    dialogues.add_argument("--seed", type=int, default=0, help="what images, partners, questions are drawn from")
    dialogues.set_defaults(plan=_plan_dialogues, write=write_dialogues, place="dialogues")
    for command in (profile, person, dialogues):
        _add_common(command)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("root", type=Path, help="the data root to write to; better your own than the published one")
    command.add_argument("--model", required=True, help="the model's name at the endpoint; it must see images")
    command.add_argument("--base_url", help="the endpoint (default: OPENAI_BASE_URL, else OpenAI's)")
    command.add_argument("--split", choices=SPLITS, default=SPLITS[0])
    command.add_argument("--prompts", type=Path, default=PROMPTS, help="folder of templates (default: the ones here)")
    command.add_argument("--max_requests", type=int, help="budget: requests of this run, failed ones included")
    command.add_argument("--max_tokens_total", type=int, help="budget: tokens of this run, prompts and answers")
    command.add_argument("--max_tokens", type=int, default=4096, help="of one answer (%(default)s)")
    command.add_argument("--temperature", type=float, help="default: the model's own")
    command.add_argument("--tries", type=int, default=3, help="answers asked for until one is usable (%(default)s)")
    command.add_argument("--workers", type=int, default=4, help="requests at once (%(default)s)")
    command.add_argument("--overwrite", action="store_true", help="throw away the dialogues grown here, or the profile")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    options = _parser().parse_args(arguments)
    for name in ("tries", "workers", "max_tokens", "max_requests", "max_tokens_total", "images_per_character"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise MMRoleError("a number must be at least 1", value, f"--{name}", "give a larger number")
    return run(options)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        status = run_main(main)
        if status == INTERRUPTED:
            sys.stdout.flush()
            os._exit(status)  # an exit would wait for the requests that were given up
        sys.exit(status)
