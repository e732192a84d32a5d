"""From dialogues and profiles to test and training samples; from reviews to reward-model samples.

`python -m data_utils.build DATA_ROOT` writes their files; `--help` tells more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError, raise_problems, run_main
from data_utils.presence import SHOWN, is_file, is_folder, listed
from data_utils.prompts import (
    CURIOUS_HUMAN,
    HUMAN,
    SYSTEM_MESSAGE,
    ImageInformation,
    Role,
    picture_line,
    role_play_prompt,
)
from data_utils.schema import Dialogue, Named, Profiles, Roles, read_rows, read_value

SPLITS = ("in-distribution", "out-of-distribution")
KINDS = ("comment", "human-role", "inter-role")

ReviewPrompts = Callable[[Mapping[str, Any]], Mapping[str, tuple[str, str]]]


@dataclass(frozen=True)
class Characters:
    """Who can speak: ``profiles`` maps a name to its profile text, ``scripts`` a name to the script that lists it."""

    profiles: Mapping[str, str]
    scripts: Mapping[str, str]

    def role(self, name: str) -> Role:
        """Gives the character ``name``.

        Raises:
            MMRoleError: no script lists it, or it has no profile.
        """
        if name not in self.scripts:
            raise MMRoleError(
                "unknown speaker",
                value=name,
                where="roles.json",
                fix="list the character under its script in roles.json",
            )
        if name not in self.profiles:
            raise MMRoleError(
                "a speaker without a profile", value=name, where="profiles.json", fix="add its profile to profiles.json"
            )
        return Role(name, self.scripts[name], self.profiles[name])


def load_characters(data_root: str | Path, splits: Sequence[str] = SPLITS) -> Characters:
    """Reads ``profiles/<split>/{profiles,roles}.json`` of a data root, all splits into one.

    Raises:
        ProblemsError: files are missing or wrong, with everything that is.
    """
    profiles: dict[str, str] = {}
    scripts: dict[str, str] = {}
    problems: list[MMRoleError] = []
    for split in splits:
        folder = Path(data_root) / "profiles" / split
        own, wrong = read_value(folder / "profiles.json", Profiles)
        roles, wrong_roles = read_value(folder / "roles.json", Roles)
        problems += [*wrong, *wrong_roles]
        profiles.update(own)
        scripts.update({name: script for script, names in roles.items() for name in names})
    raise_problems(problems)
    return Characters(profiles, scripts)


def build_sample(
    dialogue: Mapping[str, Any],
    turn: int,
    characters: Characters,
    *,
    sane_partner: bool = False,
    training: bool = False,
) -> dict[str, Any]:
    """Makes the sample in which the speaker of ``turn`` answers, in the published form and key order.

    Args:
        dialogue: A record of a dialogue file: id, image, conversations, and maybe role_info, place_info, scene_info.
        turn: Index (from 0) of a turn that a character speaks.
        characters: The profiles and scripts of the data root.
        sane_partner: The partner is the dialogue's other speaker, instead of the published rule.
        training: Put the picture line before the user's turn, as training files have it.

    Raises:
        MMRoleError: no such turn, the human's turn, an unknown speaker or a missing profile; names the dialogue.
    """
    conversation = dialogue["conversations"]
    if not 0 <= turn < len(conversation):
        raise _problem(dialogue, "no such turn", turn, f"choose a turn from 0 to {len(conversation) - 1}")
    name = speaker(conversation[turn])
    if name == HUMAN:
        raise _problem(
            dialogue, "a sample is asked for the human's turn", turn, "choose a turn that a character speaks"
        )
    partner_name = _sane_partner(conversation, turn) if sane_partner else _published_partner(conversation, turn)
    try:
        role = characters.role(name)
        partner = None if partner_name == HUMAN else characters.role(partner_name)
    except MMRoleError as error:
        raise _problem(dialogue, error.what, error.value, error.fix) from error
    prompt = role_play_prompt(
        role,
        partner,
        _image_information(dialogue),
        history=[(speaker(said), said["value"]) for said in conversation[: max(turn - 1, 0)]],
        last_words=conversation[turn - 1]["value"] if turn else None,
    )
    return {
        "id": f"{dialogue['id']}_{turn}",
        "system": SYSTEM_MESSAGE,
        "image": dialogue["image"],
        "conversations": [
            {"from": "user", "value": picture_line(dialogue["image"]) + prompt if training else prompt},
            {"from": "assistant", "value": conversation[turn]["value"]},
        ],
        "role": role.name,
        "script": role.script,
        "other_role": CURIOUS_HUMAN if partner is None else partner.name,
    }


def speaker(turn: Mapping[str, str]) -> str:
    """Gives who speaks a turn: a character's name or "human"; the first turn of a comment has "from" for "role"."""
    return turn["role"] if "role" in turn else turn["from"]


def iterate_samples(
    dialogues: Iterable[Mapping[str, Any]],
    characters: Characters,
    *,
    sane_partner: bool = False,
    training: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields a sample for every turn a character speaks, the first turn and both speakers of a dialogue included."""
    for dialogue in dialogues:
        for turn, said in enumerate(dialogue["conversations"]):
            if speaker(said) != HUMAN:
                yield build_sample(dialogue, turn, characters, sane_partner=sane_partner, training=training)


def dialogue_files(data_root: str | Path, split: str, kind: str) -> list[Path]:
    """Gives the files of ``dialogues/<split>/<kind>``: the single file first, then a folder's in order of file name.

    Published splits have the one or the other; new dialogues beside a published single file make a folder.

    Raises:
        UnreadableError: a folder may not be read.
    """
    place = Path(data_root) / "dialogues" / split / kind
    single = place.with_name(f"{kind}.json")
    return [*([single] if is_file(single) else []), *listed(place, f"{SHOWN}.json")]


def iterate_dialogues(data_root: str | Path, split: str, kind: str) -> Iterator[dict[str, Any]]:
    """Yields the dialogues of ``dialogues/<split>/<kind>``, in order of file name.

    Raises:
        MMRoleError: there is neither a folder nor a file.
        ProblemsError: a file is broken or its rows are wrong, with everything that is wrong in it.
    """
    place = Path(data_root) / "dialogues" / split / kind
    files = dialogue_files(data_root, split, kind)
    if not files and not is_folder(place):
        raise MMRoleError(
            "no dialogues", value=f"{kind} ({split})", where=str(place), fix="check the data root, or download the data"
        )
    for file in files:
        rows, problems = read_rows(file, Dialogue)
        raise_problems(problems)
        yield from rows


def training_samples(
    data_root: str | Path, *, kinds: Sequence[str] = KINDS, sane_partner: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields the in-distribution training samples of a data root, one kind after the other.

    A dialogue from which a test sample was drawn is left out whole. On all 14,346 published dialogues this gives the
    85,456 samples of train_85k.json.

    Raises:
        MMRoleError: a file of the data root is missing or a dialogue cannot be built.
    """
    characters = load_characters(data_root, SPLITS[:1])
    tested = tested_dialogues(data_root)
    for kind in kinds:
        kept = (d for d in iterate_dialogues(data_root, SPLITS[0], kind) if d["id"] not in tested)
        yield from iterate_samples(kept, characters, sane_partner=sane_partner, training=True)


def tested_dialogues(data_root: str | Path) -> frozenset[str]:
    """Gives the ids of the dialogues from which the data root's test samples were drawn.

    Raises:
        ProblemsError: a test file is missing or wrong, with everything that is.
    """
    ids: list[str] = []
    problems: list[MMRoleError] = []
    for path in paths_of_tests(data_root):
        rows, wrong = read_rows(path, Named)
        ids += [row["id"] for row in rows]
        problems += wrong if is_file(path) else [_no_test_file(path)]
    raise_problems(problems)
    return frozenset(map(dialogue_id, ids))


def paths_of_tests(data_root: str | Path) -> list[Path]:
    """Gives the paths of the six test files of a data root, whether they are there or not."""
    return [Path(data_root) / "data" / "test" / split / f"{kind}_test.json" for split in SPLITS for kind in KINDS]


def dialogue_id(sample_id: str) -> str:
    """Gives the id of the dialogue a sample was made from (``<dialogue id>_<turn>``)."""
    return sample_id.rpartition("_")[0]


def reward_model_samples(
    rows: Iterable[Mapping[str, Any]], review_prompts: ReviewPrompts, *, agent: str = ""
) -> Iterator[dict[str, Any]]:
    """Yields a reward-model training sample per review: the review prompt as user turn, the review as the assistant's.

    Args:
        rows: Reviewed rows in the published form; a row without ``rm_review`` (an empty answer) gives nothing.
        review_prompts: Makes {metric: (system, text)} from a row; the data tools know no prompts of the evaluation.
        agent: Who gave the answers; put before the ids, which would otherwise repeat from agent to agent.

    Raises:
        MMRoleError: a review is of a metric for which there is no prompt.
    """
    for row in rows:
        if not row.get("rm_review"):
            continue
        prompts = review_prompts(row)
        for metric, review in row["rm_review"].items():
            if not review["score"]:
                continue  # nobody could read a score in it: it would teach the judge to be unreadable
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


def _published_partner(conversation: Sequence[Mapping[str, str]], turn: int) -> str:
    # published: the partner is who speaks next, wrapping round, so that the last turn of an inter-role dialogue of odd
    # length talks with itself (Plato_role-role-dialogue_COCO_8: Socrates with Socrates).
    return speaker(conversation[(turn + 1) % len(conversation)])


def _sane_partner(conversation: Sequence[Mapping[str, str]], turn: int) -> str:
    own = speaker(conversation[turn])
    round_from_here = [*conversation[turn + 1 :], *conversation[:turn]]
    return next((name for name in map(speaker, round_from_here) if name != own), own)


def _image_information(dialogue: Mapping[str, Any]) -> ImageInformation:
    return ImageInformation(
        dialogue.get("role_info") or "", dialogue.get("place_info") or "", dialogue.get("scene_info") or ""
    )


def _no_test_file(path: Path) -> MMRoleError:
    # Without it nobody knows which dialogues must not train.
    fix = "fetch or build the test files anew; one that has no samples holds []"
    return MMRoleError("cannot read the file: a test set has six, and this one is missing", path, fix=fix)


def _problem(dialogue: Mapping[str, Any], what: str, value: Any, fix: str) -> MMRoleError:
    return MMRoleError(what, value=value, where=f"dialogue {dialogue['id']}", fix=fix)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see `data_utils.build_files`."""
    from data_utils.build_files import main as write_files  # which imports this module

    return write_files(arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
