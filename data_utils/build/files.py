"""Writes the files that train and test: `python -m data_utils.build DATA_ROOT`.

    python -m data_utils.build DATA_ROOT                     data/train/train_85k.json
    python -m data_utils.build DATA_ROOT --test --out DIR    DIR/{in,out-of}-distribution/<kind>_test.json
    python -m data_utils.build DATA_ROOT --reviews FOLDER    RM_data/{train/RM-train_23k,test/RM-test_320}.json

Training samples come from the in-distribution dialogues, without those that a test sample of data/test was drawn from.
--test builds the samples that data/test names; without its six files, one turn of each out-of-distribution dialogue,
drawn.
--reviews takes reviewed rows of any reviewer, as eval/RM_review.sh writes them (<split>-test_reviews/<agent>/*.json).
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from data_utils.build.reviews import (
    PUBLISHED_REVIEWS,
    PUBLISHED_VALIDATION,
    RM_TEST_FILE,
    RM_TRAIN_FILE,
    named_function,
    read_reviews,
    write_reviews,
)
from data_utils.errors import MMRoleError, raise_problems, shown
from data_utils.files import write_error
from data_utils.images import images_below
from data_utils.layout import KINDS, SPLITS, paths_of_tests
from data_utils.paths import is_file, is_folder
from data_utils.prompts import HUMAN
from data_utils.roots import Sources, dialogue_id
from data_utils.row_files import first_problems, write_row_files, write_rows
from data_utils.samples import build_sample, iterate_samples, speaker
from data_utils.schema import Named, Row

TRAIN_FILE = "data/train/train_85k.json"
PUBLISHED_SAMPLES = 85_456


def training_rows(sources: Sources, *, sane_partner: bool = False, counts: Counter[str] | None = None) -> Iterator[Row]:
    """Yields the training samples of all roots, one kind after the other; what is wrong goes to `sources.problems`.

    Args:
        sources: Where they come from.
        sane_partner: The partner is the dialogue's other speaker, instead of the published rule.
        counts: Counts samples by kind, and dialogues ("dialogues", "held out").
    """
    counts = Counter() if counts is None else counts
    tested = sources.tested()
    for kind in KINDS:
        for dialogue in sources.dialogues(SPLITS[0], kind):
            counts["held out" if dialogue["id"] in tested else "dialogues"] += 1
            if dialogue["id"] in tested:
                continue
            try:
                samples = iterate_samples([dialogue], sources.characters, sane_partner=sane_partner, training=True)
                for sample in samples:
                    counts[kind] += 1
                    yield sample
            except MMRoleError as error:
                sources.problems.append(error)


def test_rows(
    sources: Sources, named: Sequence[Path], split: str, kind: str, *, sane_partner: bool, seed: int
) -> tuple[list[Row], list[str]]:
    """The test samples of a split and kind.

    Args:
        sources: Where they come from.
        named: The roots whose data/test names the samples; see `Sources.whole_tests`.
        split: Of the dialogues.
        kind: Of the dialogues.
        sane_partner: The partner is the dialogue's other speaker, instead of the published rule.
        seed: Of the turns that are drawn.

    Returns:
        Those that data/test names, in its order, and the ids of those whose dialogue is not here. Without data/test,
        one drawn turn of each out-of-distribution dialogue, and no ids.
    """
    paths = [root / "data" / "test" / split / f"{kind}_test.json" for root in named]
    wanted = list(dict.fromkeys(row["id"] for path in paths for row in sources.rows(path, Named)))
    ids = {dialogue_id(name) for name in wanted}
    dialogues = {d["id"]: d for d in sources.dialogues(split, kind) if not named or d["id"] in ids}
    if not named:
        wanted = [] if split == SPLITS[0] else list(filter(None, (_drawn(d, seed) for d in dialogues.values())))
    rows, absent = [], []
    for name in wanted:
        if dialogue_id(name) not in dialogues:
            absent.append(name)
            continue
        dialogue, turn = dialogues[dialogue_id(name)], int(name.rpartition("_")[2])
        try:
            rows.append(build_sample(dialogue, turn, sources.characters, sane_partner=sane_partner))
        except MMRoleError as error:
            sources.problems.append(error)
    return rows, absent


def missing_images(data_root: Path, extra_roots: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The images of further roots that `data_root` does not hold: where they are, and where they are looked for."""
    pairs: dict[Path, Path] = {}
    for root in extra_roots:
        for name, path in images_below(root):
            there = data_root / "images" / name
            if not there.exists():
                pairs.setdefault(there, path.resolve())
    return [(path, there) for there, path in pairs.items()]


def _drawn(dialogue: Row, seed: int) -> str | None:
    turns = [number for number, turn in enumerate(dialogue["conversations"]) if speaker(turn) != HUMAN]
    rng = random.Random(f"{seed}/{dialogue['id']}")  # noqa: S311 - draws samples, keeps no secret
    return f"{dialogue['id']}_{rng.choice(turns)}" if turns else None


def _build_training(options: argparse.Namespace) -> None:
    sources = Sources([options.data_root, *options.extra_root])
    sources.compare_images()
    out = options.out or options.data_root / TRAIN_FILE
    counts: Counter[str] = Counter()
    rows = training_rows(sources, sane_partner=options.sane_partner, counts=counts)
    if not any(is_folder(root / "data" / "test") for root in sources.roots):
        print("no data/test here: no dialogue is held out")
    with_bar = tqdm(rows, "training samples", disable=None, unit=" samples")
    total = write_rows(out, _some(with_bar, sources), sources.problems)
    of_kinds = ", ".join(f"{kind} {counts[kind]:,}" for kind in KINDS)
    held_out = counts["held out"]
    print(
        f"{total:,} training samples ({of_kinds}) of {counts['dialogues']:,} dialogues; {held_out:,} held out for tests"
    )
    if total != PUBLISHED_SAMPLES:
        print(f"not the published {PUBLISHED_SAMPLES:,}, which all 14,346 published dialogues give")
    print(f"written to {out.resolve()}")
    _tell_images(options)


def _some(rows: Iterable[Row], sources: Sources) -> Iterator[Row]:
    """Passes rows on; that there are none is a problem."""
    some = False
    for row in rows:
        some = True
        yield row
    if not some and not sources.problems:
        fix = "see data_utils.grow for how to get dialogues, data_utils.check for what is there"
        sources.problems.append(MMRoleError("no dialogue gives a training sample", None, sources.roots[0], fix))


def _tell_images(options: argparse.Namespace) -> None:
    """Training looks for all images below one root."""
    pairs = missing_images(options.data_root, options.extra_root)
    if not pairs:
        return
    if not options.link_images:
        print(f"{len(pairs):,} images of the further roots are not below {options.data_root / 'images'}: --link_images")
        return
    for source, link in pairs:
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)  # it led to a file that has gone
            link.symlink_to(source)
        except OSError as error:
            raise write_error(link, error, "the samples are written, not all of their images linked") from error
    print(f"{len(pairs):,} images of the further roots linked below {options.data_root / 'images'}")


def _build_tests(options: argparse.Namespace) -> None:
    if options.out is None:
        raise MMRoleError(
            "--test needs a folder to write to", None, "--out", "give one; data/test is never overwritten"
        )
    sources = Sources([options.data_root, *options.extra_root])
    sources.compare_images()
    named = sources.whole_tests(options.out)
    files: dict[str, list[Row]] = {}  # all six: a test set has none missing, and [] where it has no rows
    absent: list[str] = []
    for split in SPLITS:
        for kind in KINDS:
            rows, names = test_rows(sources, named, split, kind, sane_partner=options.sane_partner, seed=options.seed)
            files[f"{split}/{kind}_test.json"] = rows
            absent += names
    if not sources.problems:
        _keep_tests(sources, options.out, files)
    raise_problems(first_problems(sources.problems))
    total = write_row_files(options.out, files)
    print(f"{total:,} test samples written to {options.out.resolve()}")
    if absent:
        print(f"{len(absent):,} of data/test left out, their dialogues are not here: {shown(', '.join(absent[:3]))} …")


def _keep_tests(sources: Sources, out: Path, files: Mapping[str, Sequence[Row]]) -> None:
    """That samples of a root's test set would be lost when files are written over it is a problem."""
    over = [root for root in sources.roots if out.resolve() == (root / "data" / "test").resolve()]
    there = [path for path in paths_of_tests(over[0]) if is_file(path)] if over else []
    built = {row["id"] for rows in files.values() for row in rows}
    lost = [row["id"] for path in there for row in sources.rows(path, Named) if row["id"] not in built]
    if lost and not sources.problems:
        problem = f"{len(lost):,} test samples would be lost, whose dialogues are not here or that are not drawn again"
        fix = "choose another folder, bring in the dialogues, or draw with the same --seed"
        sources.problems.append(MMRoleError(problem, lost[:5], "--out", fix))


def _build_reviews(options: argparse.Namespace) -> None:
    if options.validation < 0:
        raise MMRoleError("a number must be at least 0", options.validation, "--validation", "give a larger number")
    prompts = named_function(options.review_prompts)
    reviews = read_reviews(options.reviews)
    root = options.out or options.data_root
    trained, held_out = write_reviews(root, reviews, prompts, validation=options.validation, seed=options.seed)
    agents = len({agent for agent, _ in reviews})
    print(f"{trained:,} reward-model samples and {held_out:,} for validation, of {agents} agents")
    if trained + held_out != PUBLISHED_REVIEWS:
        print(f"not the paper's {PUBLISHED_REVIEWS:,} reviews of 10 agents")
    print(f"written to {(root / RM_TRAIN_FILE).resolve()} and {Path(RM_TEST_FILE).name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line of `data_utils.build`."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_root", type=Path, metavar="DATA_ROOT", help="the folder that holds dialogues/, profiles/")
    parser.add_argument("--out", type=Path, help="another file than data/train/…; a folder with --test or --reviews")
    parser.add_argument("--extra_root", type=Path, action="append", default=[], help="a further root; repeatable")
    parser.add_argument("--link_images", action="store_true", help="link the further roots' images below DATA_ROOT")
    parser.add_argument(
        "--sane_partner", action="store_true", help="the partner is always the dialogue's other speaker"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--test", action="store_true", help="write test samples")
    what.add_argument("--reviews", type=Path, metavar="FOLDER", help="write reward-model samples from these reviews")
    parser.add_argument("--validation", type=int, default=PUBLISHED_VALIDATION, help="reviews held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument(
        "--review_prompts",
        metavar="MODULE:FUNCTION",
        default="eval.review_prompt:review_prompts",
        help="what makes the reviewer's prompts (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.reviews:
        _build_reviews(options)
    elif options.test:
        _build_tests(options)
    else:
        _build_training(options)
    return 0
