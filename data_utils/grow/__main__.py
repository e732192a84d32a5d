"""Grows the data as the paper did, with a strong model behind an OpenAI-compatible endpoint (the key: OPENAI_API_KEY).

    python -m data_utils.grow profile ROOT --model M --name "Ada" --script "My Novel" --text ada.txt
    python -m data_utils.grow person ROOT --model M --facts facts.json
    python -m data_utils.grow dialogues ROOT --model M --characters "Ada" --images my_pictures/01.jpg

It writes a profile from a text, the profile of a hypothetical person from a few facts, and dialogues of the three
kinds from profile and image, in the published layout below ROOT. An answer that data_utils.check would complain about
is requested again, and never kept. Every accepted answer is in ROOT/grown.jsonl at once; the same command resumes a
stopped run. The prompts are the templates in data_utils/grow/prompts; --prompts FOLDER uses an edited copy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_utils.endpoint import Endpoint
from data_utils.errors import MMRoleError, run_main
from data_utils.grow.plan import Plan, Record, plan_dialogues, plan_people, plan_profile
from data_utils.grow.run import Settings, grow
from data_utils.grow.templates import PROMPTS, Templates
from data_utils.layout import KINDS, SPLITS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 if something is missing at the end."""
    options = _parser().parse_args(arguments)
    for name in ("tries", "workers", "max_tokens", "max_requests", "max_tokens_total", "images_per_character"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise MMRoleError("a number must be at least 1", value, f"--{name}", "give a larger number")
    templates = Templates(options.prompts)
    settings = Settings(options.temperature, options.max_tokens, options.tries, options.workers)

    def plan(grown: Mapping[str, Record]) -> list[Plan]:
        if options.command == "profile":
            return plan_profile(
                options.root, options.split, options.name, options.script, options.text, grown, options.overwrite
            )
        if options.command == "person":
            return plan_people(options.root, options.split, options.facts, grown, options.overwrite)
        return plan_dialogues(
            options.root, options.source or options.root, options.split, templates.questions, grown,
            characters=options.characters, partner=options.partner, kinds=options.kinds, images=options.images,
            most=options.images_per_character, seed=options.seed, overwrite=options.overwrite,
        )  # fmt: skip

    budget = {"max_requests": options.max_requests, "max_tokens_total": options.max_tokens_total}
    with Endpoint([options.base_url], options.model, **budget) as endpoint:
        outcome = grow(options.root, plan, endpoint, templates, settings)
        print(f"{outcome.summary()}; {endpoint.summary()}")
    return 1 if outcome.failed or outcome.left else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.grow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="profile|person|dialogues")
    profile = commands.add_parser("profile", help="a profile from a text")
    profile.add_argument("--name", required=True, help="the character")
    profile.add_argument("--script", required=True, help="the story, time or world it comes from")
    profile.add_argument("--text", type=Path, required=True, help="facts, e.g. an encyclopedia article")
    person = commands.add_parser("person", help="the profile of a hypothetical person, from a few facts")
    person.add_argument("--facts", type=Path, required=True, help='JSON: {"name": ..., "age": ..., ...}, or a list')
    dialogues = commands.add_parser("dialogues", help="dialogues from profiles and images")
    dialogues.add_argument("--source", type=Path, help="a data root with the profiles and images (default: ROOT)")
    dialogues.add_argument("--characters", nargs="+", help="names (default: all that have a profile)")
    dialogues.add_argument("--partner", help="the other inter-role speaker (default: drawn from the same script)")
    dialogues.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    dialogues.add_argument("--images", nargs="+", help="names below images/ (default: the folder of the script)")
    dialogues.add_argument("--images_per_character", type=int, help="draw at most so many images (default: all)")
    dialogues.add_argument("--seed", type=int, default=0, help="seed of the drawn images, partners and questions")
    for command in (profile, person, dialogues):
        command.add_argument("root", type=Path, help="the data root to write to; best not the published one")
        command.add_argument("--model", required=True, help="the model's name at the endpoint; it must see images")
        command.add_argument("--base_url", help="the endpoint (default: OPENAI_BASE_URL, else OpenAI's)")
        command.add_argument("--split", choices=SPLITS, default=SPLITS[0])
        command.add_argument("--prompts", type=Path, default=PROMPTS, help="folder of templates (default: built in)")
        command.add_argument("--max_requests", type=int, help="budget: requests of this run, failed ones included")
        command.add_argument("--max_tokens_total", type=int, help="budget: tokens of this run, prompts and answers")
        command.add_argument("--max_tokens", type=int, default=4096, help="tokens of one answer (%(default)s)")
        command.add_argument("--temperature", type=float, help="default: the model's own")
        command.add_argument("--tries", type=int, default=3, help="attempts to get a usable answer (%(default)s)")
        command.add_argument("--workers", type=int, default=4, help="requests at once (%(default)s)")
        command.add_argument("--overwrite", action="store_true", help="request again, and replace earlier results")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
