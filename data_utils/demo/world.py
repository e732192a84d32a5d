"""The demo data set: characters, pictures, dialogues and samples, drawn from a seed and written as a data root."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_utils.build.reviews import ReviewPrompts, reward_model_samples
from data_utils.demo.pictures import COLOURS, THINGS, TIMES, Scene, draw_scene, fitting_places
from data_utils.demo.reviews import FAULTS, answered_row
from data_utils.demo.story import Persona, annotate, comment_turns, draw_cast, human_turns, pair_turns, write_profile
from data_utils.errors import MMRoleError
from data_utils.files import read_json, write_bytes, write_json
from data_utils.layout import (
    COCO,
    KIND_IN_ID,
    KINDS,
    RM_TRAIN_FILE,
    SPLITS,
    TRAIN_FILE,
    dialogues_folder,
    file_name,
    file_of_tests,
)
from data_utils.paths import is_folder, is_there, listed
from data_utils.prompts import HUMAN
from data_utils.roots import Characters, DataRoots, SplitProfiles, dialogue_id, write_annotations, write_profiles
from data_utils.samples import build_sample, iterate_samples, speaker, training_samples

MARKER = "demo.json"
ROWS_PER_AGENT = 6
_COCO_PICTURES, _SCRIPT_PICTURES = 8, 4
_FIRST_COCO_NUMBER = 900001  # above all numbers of MS-COCO, so that no made-up picture is mistaken for one of them
_WRITERS = {"comment": comment_turns, "human-role": human_turns, "inter-role": pair_turns}
# In-distribution dialogues of one character, by kind: on pictures without and with annotations.
_DIALOGUES = {"comment": (8, 4), "human-role": (5, 3), "inter-role": (4, 2)}


@dataclass(frozen=True)
class Picture:
    """A picture of the demo: its name below images/, what it shows, and its annotation, empty for a COCO-like one."""

    image: str
    scene: Scene
    annotation: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """Everything that a seed draws; ``dialogues`` are by (split, kind) and file name, "" for a split in one file."""

    seed: int
    cast: list[Persona]
    pictures: list[Picture]
    dialogues: dict[tuple[str, str], dict[str, list[dict[str, Any]]]]

    def friend_of(self, persona: Persona) -> Persona:
        """Return the other character of the same script."""
        return next(other for other in self.cast if other.script == persona.script and other != persona)

    def characters(self, split: str) -> SplitProfiles:
        """Return the characters of a split."""
        profiles = {p.name: write_profile(p, self.friend_of(p)) for p in self.cast if p.split == split}
        scripts = dict.fromkeys(p.script for p in self.cast if p.split == split)
        return SplitProfiles(profiles, {s: [p.name for p in self.cast if p.script == s] for s in scripts})


def draw_world(seed: int) -> World:
    """Draw the characters, pictures and dialogues of ``seed``."""
    cast = draw_cast(_rng(seed, "cast"))
    world = World(seed, cast, _draw_pictures(seed, cast), {})
    for split in SPLITS:
        for kind in KINDS:
            world.dialogues[split, kind] = _draw_dialogues(world, split, kind)
    return world


def write_world(world: World, out_dir: Path, review_prompts: ReviewPrompts | None = None) -> dict[str, int]:
    """Write ``world`` as a data root.

    Args:
        world: What to write.
        out_dir: A new or empty folder, or one that already holds the demo of this seed.
        review_prompts: Makes {metric: (system, text)} from a reviewed row; without it no reward-model file is written.

    Returns:
        The number of each thing written.

    Raises:
        MMRoleError: ``out_dir`` holds something else, or cannot be written.
    """
    _claim(out_dir, world.seed)
    _write_pictures(world, out_dir)
    counts = {"characters": len(world.cast), "pictures": len(world.pictures)}
    for split in SPLITS:
        write_profiles(out_dir, split, world.characters(split))
    for (split, kind), files in world.dialogues.items():
        for name, dialogues in files.items():
            path = dialogues_folder(out_dir, split, kind)
            write_json(path / f"{name}.json" if name else path.with_name(f"{kind}.json"), dialogues)
    counts["dialogues"] = sum(1 for _ in _all_dialogues(world))
    counts["test samples"] = _write_test_files(world, out_dir)
    training = list(training_samples(DataRoots([out_dir])))
    write_json(out_dir / TRAIN_FILE, training)
    counts["training samples"] = len(training)
    if review_prompts is not None:
        reviews = list(_reward_model_samples(world, [sample["id"] for sample in training], review_prompts))
        write_json(out_dir / RM_TRAIN_FILE, reviews)
        counts["reward-model samples"] = len(reviews)
    return counts


def _draw_pictures(seed: int, cast: Sequence[Persona]) -> list[Picture]:
    rng = _rng(seed, "pictures")
    # Each thing appears equally often, in random order.
    things = iter([thing for _ in range(8) for thing in rng.sample(sorted(THINGS), len(THINGS))])

    def draw(people: Sequence[Persona] = ()) -> Scene:
        thing = next(things)
        taken = [person.coat for person in people]
        colour = rng.choice([name for name in COLOURS if name not in taken])
        return Scene(thing, colour, rng.choice(fitting_places(thing)), rng.choice(TIMES), tuple(taken))

    pictures = [
        Picture(f"{COCO}train2017/{number:012d}.jpg", draw())
        for number in range(_FIRST_COCO_NUMBER, _FIRST_COCO_NUMBER + _COCO_PICTURES)
    ]
    for script in dict.fromkeys(person.script for person in cast):
        pair = [person for person in cast if person.script == script]
        for number in range(1, _SCRIPT_PICTURES + 1):
            people = rng.sample(pair, rng.choice((1, 2)))
            scene = draw(people)
            image = f"{file_name(script)}/{number:02d}.jpg"
            pictures.append(Picture(image, scene, annotate(scene, people, rng)))
    return pictures


def _draw_dialogues(world: World, split: str, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Draw a split's dialogues of a kind: two files per character, or one with a dialogue on each sort of picture."""
    rng = _rng(world.seed, f"dialogues/{split}/{kind}")
    files: dict[str, list[dict[str, Any]]] = {}
    for persona in (p for p in world.cast if p.split == split):
        name = file_name(persona.name)
        folder = file_name(persona.script)
        for sort, place, count in zip(("COCO", "script"), (f"{COCO}train2017", folder), _DIALOGUES[kind], strict=True):
            choice = [picture for picture in world.pictures if picture.image.startswith(f"{place}/")]
            stem = f"{name}_{KIND_IN_ID[kind]}_{sort}"
            if split == SPLITS[0]:
                drawn = rng.sample(choice, count)
                ids = [f"{stem}_{number}" for number in range(count)]
                pairs = zip(ids, drawn, strict=True)
                files[f"{name}_{sort}"] = [_dialogue(world, kind, *pair, persona, rng) for pair in pairs]
            else:
                files.setdefault("", []).append(_dialogue(world, kind, stem, rng.choice(choice), persona, rng))
    return files


def _dialogue(
    world: World, kind: str, name: str, picture: Picture, persona: Persona, rng: random.Random
) -> dict[str, Any]:
    turns = _WRITERS[kind](picture.scene, persona, world.friend_of(persona), rng)
    return {"id": name, "image": picture.image, **picture.annotation, "conversations": turns}


def _all_dialogues(world: World) -> Iterator[dict[str, Any]]:
    for files in world.dialogues.values():
        for dialogues in files.values():
            yield from dialogues


def _characters(world: World) -> Characters:
    profiles = {name: text for split in SPLITS for name, text in world.characters(split).profiles.items()}
    return Characters(profiles, {person.name: person.script for person in world.cast})


def _write_test_files(world: World, out_dir: Path) -> int:
    """Write the six test files, one sample per character in each, alternately without and with annotations."""
    characters = _characters(world)
    total = 0
    for (split, kind), files in world.dialogues.items():
        rng = _rng(world.seed, f"test/{split}/{kind}")
        samples = []
        for number, persona in enumerate(p for p in world.cast if p.split == split):
            stem = f"{file_name(persona.name)}_{KIND_IN_ID[kind]}_{('COCO', 'script')[number % 2]}"
            own = [d for dialogues in files.values() for d in dialogues if d["id"].startswith(stem)]
            dialogue = rng.choice(own)
            turns = [turn for turn, said in enumerate(dialogue["conversations"]) if speaker(said) != HUMAN]
            samples.append(build_sample(dialogue, rng.choice(turns), characters))
        write_json(out_dir / "data" / "test" / split / file_of_tests(kind), samples)
        total += len(samples)
    return total


def _reward_model_samples(
    world: World, training_ids: Sequence[str], review_prompts: ReviewPrompts
) -> Iterator[dict[str, Any]]:
    """Yield reward-model samples: the made-up agents' answers to drawn training samples, reviewed by rule."""
    rng = _rng(world.seed, "reviews")
    scenes = {picture.image: picture.scene for picture in world.pictures}
    people = {person.name: person for person in world.cast}
    trained = {dialogue_id(sample) for sample in training_ids}
    rows = list(iterate_samples((d for d in _all_dialogues(world) if d["id"] in trained), _characters(world)))
    for agent in FAULTS:
        answered = []
        for row in rng.sample(rows, min(ROWS_PER_AGENT, len(rows))):
            persona = people[row["role"]]
            pair = (persona, world.friend_of(persona))
            answered.append(answered_row(agent, row, scenes[row["image"]], pair, rng))
        yield from reward_model_samples(answered, review_prompts, agent=agent)


def _claim(out_dir: Path, seed: int) -> None:
    """Mark the folder as a demo, so that no real data root is ever overwritten."""
    marker = out_dir / MARKER
    content = {"made_by": "python -m data_utils.demo", "seed": seed}
    if is_there(out_dir) and not is_folder(out_dir):
        raise MMRoleError("that is a file, not a folder", str(out_dir), "OUT_DIR", "choose a new or an empty folder")
    if is_there(marker):
        if read_json(marker) != content:
            raise MMRoleError(
                "the folder holds another demo", read_json(marker), str(marker), "choose another folder, or remove it"
            )
    elif listed(out_dir):
        raise MMRoleError(
            "the folder is not empty and holds no demo", str(out_dir), "OUT_DIR", "choose a new or an empty folder"
        )
    write_json(marker, content)


def _write_pictures(world: World, out_dir: Path) -> None:
    for picture in world.pictures:
        drawn = draw_scene(picture.scene, _rng(world.seed, picture.image))
        content = io.BytesIO()
        drawn.save(content, "JPEG", quality=90)
        write_bytes(out_dir / "images" / picture.image, content.getvalue())
    write_annotations(out_dir, [{"image": p.image, **p.annotation} for p in world.pictures if p.annotation])


def _rng(seed: int, part: str) -> random.Random:
    """Return a generator for one part, so that a change to it leaves the other parts unchanged."""
    return random.Random(f"{seed}/{part}")  # noqa: S311 - draws a demo, keeps no secret
