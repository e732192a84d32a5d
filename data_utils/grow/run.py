"""Grows the data as the paper did, with a strong model behind an OpenAI-compatible endpoint (the key: OPENAI_API_KEY).

    python -m data_utils.grow profile ROOT --model M --name "Ada" --script "My Novel" --text ada.txt
    python -m data_utils.grow person ROOT --model M --facts facts.json
    python -m data_utils.grow dialogues ROOT --model M --characters "Ada" --images my_pictures/01.jpg

From a raw text to a profile, from a few facts to the profile of a person who might exist, from profile and image to
dialogues of the three kinds, in the published layout below ROOT. What does not pass the data doctor's checks is asked
for again, and never kept. Stopped, or out of budget, the same command goes on later. The prompts are the templates in
`data_utils/grow/prompts`; `--prompts FOLDER` uses a changed copy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_utils.errors import MMRoleError
from data_utils.files import make_folder
from data_utils.grow.client import Budget, BudgetSpentError, Endpoint, NoAnswerError, Settings
from data_utils.grow.files import JOURNAL, write_dialogues, write_profile
from data_utils.grow.journal import GrowthJournal, Record, again
from data_utils.grow.plan import (
    DialoguePlan,
    ProfilePlan,
    check_images,
    not_utf8,
    plan_dialogues,
    plan_person,
    plan_profile,
)
from data_utils.grow.templates import Templates
from data_utils.grow.validation import UnusableError
from data_utils.journal import read_journal
from data_utils.layout import KINDS, SPLITS

PROMPTS = Path(__file__).parent / "prompts"
INTERRUPTED = 130

Plan = DialoguePlan | ProfilePlan


@dataclass
class Outcome:
    """What became of a run."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # why, by key
    left: int = 0  # when the budget was spent
    left_since: str = ""  # what went wrong with one of those

    def told(self, budget: Budget) -> str:
        """A line for the user."""
        parts = [f"{self.done} grown", f"{len(self.failed)} failed", f"{self.left} left for want of budget"]
        return f"{', '.join(parts)}; {budget.requests:,} requests, {budget.tokens:,} tokens"


def grow(
    plans: Sequence[Plan],
    journal: GrowthJournal,
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

    def __init__(self, journal: GrowthJournal, endpoint: Endpoint) -> None:
        self.outcome = Outcome()
        self.fatal: BaseException | None = None
        self._journal, self._endpoint = journal, endpoint
        self._answers = {text: key for key, record in journal.records().items() for text in _answers(record)}
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
        if key in self._journal.kept:
            return  # Ctrl-C came right after it
        try:
            record = future.result()
            self._refuse(key, record)
        except BudgetSpentError as error:
            self.outcome.left += 1
            self.outcome.left_since = self.outcome.left_since or self._endpoint.scrub(str(error))
        except UnusableError as error:
            self.outcome.failed[key] = self._endpoint.scrub(str(error))
            self._journal.fail(key, self.outcome.failed[key])
        else:
            for answer in _answers(self._journal.record(key) or {}):
                self._answers.pop(answer, None)
            self._journal.keep(key, record)
            self._answers.update(dict.fromkeys(_answers(record), key))
            self.outcome.done += 1

    def _refuse(self, key: str, record: Record) -> None:
        if any(self._answers.get(answer, key) != key for answer in _answers(record)):
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
        except BudgetSpentError as error:
            raise BudgetSpentError(str(error) or problem) from None
        except UnusableError as error:
            problem = str(error)
    raise UnusableError(problem)


def _answers(record: Record) -> list[str]:
    """What a dialogue ends with: in a comment, all that the character says."""
    return [record["dialogue"]["conversations"][-1]["value"]] if "dialogue" in record else []


def run(options: argparse.Namespace) -> int:
    """Runs a command; 1 if something failed or was left for want of budget."""
    templates = Templates(options.prompts)
    by = {"model": options.model, "temperature": options.temperature, "templates": templates.hash}
    path = options.root / options.place / JOURNAL
    _check(options, templates, path, by)  # all that is wrong is told before anything is written
    budget = Budget(options.max_requests, options.max_tokens_total)
    settings = Settings(options.model, options.base_url, options.max_tokens, options.temperature)
    endpoint = Endpoint(settings, budget)
    make_folder(path.parent, "nothing was started")
    # A file of dialogues is grown by one model with one set of templates; profiles are written one by one.
    alike = options.place == "dialogues"
    with GrowthJournal.open(path, by, alike=alike, overwrite=options.overwrite) as journal:
        _write_files(options, journal)  # what a run that was killed could not
        planned = options.plan(options, templates, journal.again(overwrite=options.overwrite))
        wanted = journal.wants((plan.key for plan in planned), overwrite=options.overwrite)
        plans = [plan for plan in planned if plan.key in wanted]
        if options.overwrite:
            journal.grow_again(wanted)
        try:
            outcome = grow(plans, journal, endpoint, templates, tries=options.tries, workers=options.workers)
        finally:
            _write_files(options, journal, [plan.key for plan in plans])
    print(outcome.told(budget))
    for key, reason in list(outcome.failed.items())[:10]:
        print(f"  failed: {key}: {reason}")
    if outcome.left_since:
        print(f"  left after this: {outcome.left_since}")
    if outcome.failed or outcome.left:
        without = " without --overwrite" if options.overwrite else ""
        print(f"  the same command{without} asks for the missing ones again")
    return 1 if outcome.failed or outcome.left else 0


def _check(options: argparse.Namespace, templates: Templates, path: Path, by: Mapping[str, Any]) -> None:
    """Plans all and reads the images that will be sent; writes nothing."""
    content = read_journal(path)
    entries = content.entries if content is not None else {}
    once_more = again(entries, by, overwrite=options.overwrite)
    plans = options.plan(options, templates, once_more)
    check_images(plan for plan in plans if plan.key in once_more or "grown" not in entries.get(plan.key, {}))


def _write_files(options: argparse.Namespace, journal: GrowthJournal, order: Sequence[str] = ()) -> None:
    """Writes what was grown and never written, in the order of the plans, whichever was finished first."""
    place = {key: number for number, key in enumerate(order)}
    entries = dict(sorted(journal.unwritten().items(), key=lambda entry: place.get(entry[0], -1)))
    for name in options.write(options.root, entries):
        told = f"another profile of {name} is there, and stays; --overwrite has it grown again and replaced"
        print(told, file=sys.stderr, flush=True)
    journal.wrote(entries)


def _plan_profile(options: argparse.Namespace, *_: Any) -> list[ProfilePlan]:
    return [plan_profile(options.root, options.split, options.name, options.script, options.text)]


def _plan_person(options: argparse.Namespace, *_: Any) -> list[ProfilePlan]:
    return plan_person(options.root, options.split, options.facts)


def _plan_dialogues(
    options: argparse.Namespace, templates: Templates, once_more: Mapping[str, Record]
) -> list[DialoguePlan]:
    return plan_dialogues(
        options.root, options.source or options.root, options.split, templates.questions,
        characters=options.characters, partner=options.partner, kinds=options.kinds, images=options.images,
        most=options.images_per_character, seed=options.seed,
        again={key: record["dialogue"]["id"] for key, record in once_more.items()},
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
    command.add_argument("--overwrite", action="store_true", help="grow anew, in place of what was grown before")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    options = _parser().parse_args(arguments)
    for name in ("tries", "workers", "max_tokens", "max_requests", "max_tokens_total", "images_per_character"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise MMRoleError("a number must be at least 1", value, f"--{name}", "give a larger number")
    if not_utf8(options.model):
        raise MMRoleError("the model's name is not UTF-8 text", options.model, "--model", "correct it")
    return run(options)
