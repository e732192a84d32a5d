"""Turns dialogues into samples: one for every turn that a character speaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import Row
from data_utils.layout import KINDS, SPLITS
from data_utils.prompts import CURIOUS_HUMAN, HUMAN, SYSTEM_MESSAGE, ImageInformation, picture_line, role_play_prompt
from data_utils.roots import Characters, DataRoots


def build_sample(
    dialogue: Mapping[str, Any],
    turn: int,
    characters: Characters,
    *,
    sane_partner: bool = False,
    training: bool = False,
) -> dict[str, Any]:
    """Return the sample in which the speaker of ``turn`` answers, in the published form and key order.

    Args:
        dialogue: A record of a dialogue file: id, image, conversations, and maybe role_info, place_info, scene_info.
        turn: Index (from 0) of a turn that a character speaks.
        characters: The profiles and scripts of the data root.
        sane_partner: The partner is the dialogue's other speaker, instead of the published rule.
        training: Put the picture line before the user's turn, as in training files.

    Raises:
        MMRoleError: No such turn, the human's turn, an unknown speaker or a missing profile; names the dialogue.
    """
    conversation = dialogue["conversations"]
    if not 0 <= turn < len(conversation):
        raise _problem(dialogue, "no such turn", turn, f"choose a turn from 0 to {len(conversation) - 1}")
    name = speaker(conversation[turn])
    if name == HUMAN:
        raise _problem(
            dialogue, "a sample cannot be made of the human's turn", turn, "choose a turn that a character speaks"
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
        ImageInformation.of(dialogue),
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
    """Return the speaker of a turn, a character's name or "human"; a comment's first turn has "from" for "role"."""
    return turn["role"] if "role" in turn else turn["from"]


def iterate_samples(
    dialogues: Iterable[Mapping[str, Any]],
    characters: Characters,
    *,
    sane_partner: bool = False,
    training: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a sample for every turn of a character, the first turn and both speakers of a dialogue included."""
    for dialogue in dialogues:
        for turn, said in enumerate(dialogue["conversations"]):
            if speaker(said) != HUMAN:
                yield build_sample(dialogue, turn, characters, sane_partner=sane_partner, training=training)


def training_samples(
    roots: DataRoots,
    *,
    kinds: Sequence[str] = KINDS,
    sane_partner: bool = False,
    counts: Counter[str] | None = None,
) -> Iterator[Row]:
    """Yield the in-distribution training samples of data roots, one kind after the other.

    A dialogue from which a test sample was drawn is left out completely. All 14,346 published dialogues give the 85,456
    samples of train_85k.json.

    Args:
        roots: Where dialogues and characters come from.
        kinds: The kinds of dialogues.
        sane_partner: The partner is the dialogue's other speaker, instead of the published rule.
        counts: Counts samples by kind, and dialogues ("dialogues", "held out").

    Raises:
        ProblemsError: After the last sample, if files are wrong, dialogues cannot be built, or there is no sample;
            every problem is reported.
    """
    counts = Counter() if counts is None else counts
    tested = roots.tested()
    for kind in kinds:
        for dialogue in roots.dialogues(SPLITS[0], kind):
            counts["held out" if dialogue["id"] in tested else "dialogues"] += 1
            if dialogue["id"] in tested:
                continue
            try:
                for sample in iterate_samples([dialogue], roots.characters, sane_partner=sane_partner, training=True):
                    counts[kind] += 1
                    yield sample
            except MMRoleError as error:
                roots.problems.append(error)
    if not any(counts[kind] for kind in kinds) and not roots.problems:
        fix = "data_utils.grow makes dialogues; data_utils.check reports what is wrong"
        roots.problems.append(MMRoleError("no dialogue gives a training sample", None, roots.roots[0], fix))
    raise_problems(roots.problems)


def _published_partner(conversation: Sequence[Mapping[str, str]], turn: int) -> str:
    # published: the partner is who speaks next, wrapping round, so that the last turn of an inter-role dialogue of odd
    # length talks with itself (Plato_role-role-dialogue_COCO_8: Socrates with Socrates).
    return speaker(conversation[(turn + 1) % len(conversation)])


def _sane_partner(conversation: Sequence[Mapping[str, str]], turn: int) -> str:
    name = speaker(conversation[turn])
    round_from_here = [*conversation[turn + 1 :], *conversation[:turn]]
    return next((other for other in map(speaker, round_from_here) if other != name), name)


def _problem(dialogue: Mapping[str, Any], what: str, value: Any, fix: str) -> MMRoleError:
    return MMRoleError(what, value=value, where=f"dialogue {dialogue['id']}", fix=fix)
