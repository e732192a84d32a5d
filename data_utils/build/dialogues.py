"""Training and test files from the dialogues of data roots."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from data_utils.errors import MMRoleError, raise_problems, shown
from data_utils.files import Row, write_error, write_json, write_rows
from data_utils.images import images_below
from data_utils.layout import KINDS, SPLITS, TRAIN_FILE, file_of_tests, paths_of_tests
from data_utils.paths import is_file, is_folder
from data_utils.prompts import HUMAN
from data_utils.roots import DataRoots, dialogue_id
from data_utils.samples import build_sample, speaker, training_samples
from data_utils.schema import Named

PUBLISHED_SAMPLES = 85_456


def build_training(
    data_roots: Sequence[Path], out: Path | None = None, *, sane_partner: bool = False, link_images: bool = False
) -> None:
    """Write the training file and print its counts.

    Args:
        data_roots: The data root, and further ones.
        out: The file; None is `TRAIN_FILE` of the data root.
        sane_partner: The partner is the dialogue's other speaker, instead of the published rule.
        link_images: Link the further roots' images below the data root.

    Raises:
        MMRoleError: Roots, dialogues or images are wrong, or the file cannot be written; the old one is unchanged.
    """
    roots = DataRoots(data_roots)
    roots.compare_images()
    out = out or data_roots[0] / TRAIN_FILE
    if not any(is_folder(root / "data" / "test") for root in data_roots):
        print("no data/test here: no dialogue is held out")
    counts: Counter[str] = Counter()
    samples = training_samples(roots, sane_partner=sane_partner, counts=counts)
    total = write_rows(out, tqdm(samples, "training samples", disable=None, unit=" samples"))
    of_kinds = ", ".join(f"{kind} {counts[kind]:,}" for kind in KINDS)
    held_out = f"{counts['held out']:,} held out for tests"
    print(f"{total:,} training samples ({of_kinds}) of {counts['dialogues']:,} dialogues; {held_out}")
    if total != PUBLISHED_SAMPLES:
        print(f"not the published {PUBLISHED_SAMPLES:,}, which all 14,346 published dialogues give")
    print(f"written to {out.resolve()}")
    _link_images(data_roots[0], data_roots[1:], link=link_images)


def build_tests(data_roots: Sequence[Path], out: Path, *, sane_partner: bool = False, seed: int = 0) -> None:
    """Write the six test files and print their counts.

    Args:
        data_roots: The data root, and further ones.
        out: The folder to write to.
        sane_partner: The partner is the dialogue's other speaker, instead of the published rule.
        seed: Seed of the drawn turns, if there is no data/test.

    Raises:
        MMRoleError: Roots, dialogues or images are wrong, test samples would be lost, or a file cannot be written.
    """
    roots = DataRoots(data_roots)
    roots.compare_images()
    named = roots.complete_tests(out)
    files: dict[Path, list[Row]] = {}  # always six: a file without samples holds []
    absent: list[str] = []
    for split in SPLITS:
        for kind in KINDS:
            rows, names = _test_rows(roots, named, split, kind, sane_partner=sane_partner, seed=seed)
            files[out / split / file_of_tests(kind)] = rows
            absent += names
    if not roots.problems:
        _check_lost_tests(roots, out, {row["id"] for rows in files.values() for row in rows})
    raise_problems(roots.problems)
    for path, rows in files.items():
        write_json(path, rows)
    print(f"{sum(map(len, files.values())):,} test samples written to {out.resolve()}")
    if absent:
        print(f"{len(absent):,} of data/test left out, their dialogues are not here: {shown(', '.join(absent[:3]))} …")


def _test_rows(
    roots: DataRoots, named: Sequence[Path], split: str, kind: str, *, sane_partner: bool, seed: int
) -> tuple[list[Row], list[str]]:
    """Return the test samples of a split and kind, and the ids of those whose dialogue is missing.

    The samples are those listed in data/test of the roots `named`, in the same order; without such roots, one drawn
    turn of each out-of-distribution dialogue.
    """
    paths = [root / "data" / "test" / split / file_of_tests(kind) for root in named]
    wanted = list(dict.fromkeys(row["id"] for path in paths for row in roots.rows(path, Named)))
    ids = {dialogue_id(name) for name in wanted}
    dialogues = {d["id"]: d for d in roots.dialogues(split, kind) if not named or d["id"] in ids}
    if not named:
        wanted = [] if split == SPLITS[0] else list(filter(None, (_drawn(d, seed) for d in dialogues.values())))
    rows, absent = [], []
    for name in wanted:
        if dialogue_id(name) not in dialogues:
            absent.append(name)
            continue
        dialogue, turn = dialogues[dialogue_id(name)], int(name.rpartition("_")[2])
        try:
            rows.append(build_sample(dialogue, turn, roots.characters, sane_partner=sane_partner))
        except MMRoleError as error:
            roots.problems.append(error)
    return rows, absent


def _drawn(dialogue: Row, seed: int) -> str | None:
    turns = [number for number, turn in enumerate(dialogue["conversations"]) if speaker(turn) != HUMAN]
    rng = random.Random(f"{seed}/{dialogue['id']}")  # noqa: S311 - draws samples, keeps no secret
    return f"{dialogue['id']}_{rng.choice(turns)}" if turns else None


def _check_lost_tests(roots: DataRoots, out: Path, built: set[str]) -> None:
    """Add to `roots.problems` the samples of a root's test set that would be lost when it is overwritten."""
    over = [root for root in roots.roots if out.resolve() == (root / "data" / "test").resolve()]
    files = [path for path in paths_of_tests(over[0]) if is_file(path)] if over else []
    lost = [row["id"] for path in files for row in roots.rows(path, Named) if row["id"] not in built]
    if lost and not roots.problems:
        problem = f"{len(lost):,} test samples would be lost, whose dialogues are missing or that are not drawn again"
        fix = "choose another folder, add the dialogues, or draw with the same --seed"
        roots.problems.append(MMRoleError(problem, lost[:5], "--out", fix))


def _link_images(data_root: Path, extra_roots: Sequence[Path], *, link: bool) -> None:
    """Link the images of further roots below the data root, where training looks for all images, or count them."""
    missing: Mapping[Path, Path] = {
        data_root / "images" / name: path.resolve()
        for root in reversed(extra_roots)
        for name, path in images_below(root)
        if not (data_root / "images" / name).exists()
    }
    if not missing:
        return
    if not link:
        print(f"{len(missing):,} images of the further roots are not below {data_root / 'images'}: --link_images")
        return
    for place, source in missing.items():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)  # a link to a file that has moved
            place.symlink_to(source)
        except OSError as error:
            kept = "the samples are written, but not all of their images are linked"
            raise write_error(place, error, kept) from error
    print(f"{len(missing):,} images of the further roots linked below {data_root / 'images'}")
