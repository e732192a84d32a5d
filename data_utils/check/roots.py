"""Checks data roots and reports everything that is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data_utils.check.checker import Checker
from data_utils.check.dialogues import check_annotations, check_characters, check_dialogues
from data_utils.check.report import Report
from data_utils.check.samples import LengthMeter, check_reward_model, check_tests, check_training
from data_utils.errors import MMRoleError, raise_problems
from data_utils.images import clashing_images, image_forms, images_below
from data_utils.layout import COCO, SPLITS
from data_utils.roots import Characters, root_problems

PARTS = ("dialogues", "profiles", "data", "RM_data")


def check_roots(
    data_root: Path,
    extra_roots: Sequence[Path] = (),
    *,
    decode: bool = False,
    meter: LengthMeter | None = None,
    examples: int = 5,
) -> list[tuple[Path, Report]]:
    """Check a data root, and further ones that add characters or dialogues to it.

    Args:
        data_root: The data set's folder.
        extra_roots: Further folders of the same layout; they may use the first one's characters and images.
        decode: Also decodes every image that is referred to.
        meter: Also measures the training samples.
        examples: How many examples of each kind of finding to keep.

    Returns:
        Each root with its report.

    Raises:
        MMRoleError: A folder does not exist, is not a data root, or is given twice.
    """
    roots = [data_root, *extra_roots]
    for root in roots:
        if not any((root / part).is_dir() for part in PARTS):
            fix = f"choose a folder that holds {', '.join(PARTS)}"
            raise MMRoleError("the folder holds no data", None if root.is_dir() else "not there", root, fix)
    raise_problems(root_problems(roots))
    characters = Characters({}, {})
    checkers = [
        Checker(root, Report(examples), characters, [root, *(other for other in roots if other != root)])
        for root in roots
    ]
    for checker in checkers:
        _add_characters(checker, check_characters(checker))
    for number, checker in enumerate(checkers):
        check_tests(checker)
        for image, other in clashing_images(checker.root, roots[:number]):
            checker.report.add("clashing_image", f"images/{image}", detail=f"another one in {other}")
    tested = {name for checker in checkers for name in checker.tested}
    ids: dict[tuple[str, str], tuple[Path, str]] = {}
    for checker in checkers:
        checker.tested = tested
        checker.ids = ids = {**ids, **checker.ids}
        check_annotations(checker)
        check_dialogues(checker)
        check_training(checker, meter)
        check_reward_model(checker, meter)
        _check_images(checker, decode)
        _check_test_images(checker)
        if meter is not None:
            lengths = [f"{file}: the longest sample has {n:,} tokens" for file, n in meter.longest.items()]
            checker.report.remarks += lengths or ["no training file to measure: build it first"]
            meter.longest.clear()
    return [(checker.root, checker.report) for checker in checkers]


def _add_characters(checker: Checker, new: Characters) -> None:
    """Add a root's characters to those of all roots."""
    characters = checker.characters
    for name in new.scripts.keys() & characters.scripts.keys():
        checker.report.add("duplicate_id", "profiles", name, "a character of another data root has this name")
    characters.profiles.update(new.profiles)
    characters.scripts.update(new.scripts)


def _check_images(checker: Checker, decode: bool) -> None:
    """Report referenced images that are missing or broken, and unreferenced images."""
    report = checker.report
    if decode:
        from qwen_vl import QwenVLImageProcessor

        processor = QwenVLImageProcessor()
    for image, (file, name) in sorted(checker.images.items()):
        report.checked["images referred to"] += 1
        try:
            path = checker.find_image(image)
        except MMRoleError as error:
            report.add("wrong_field", file, f"{name}, image", f"{error.what}: {image}")
            continue
        if path is None:
            report.add("missing_coco" if image.startswith(COCO) else "missing_image", file, name, image)
            continue
        checker.check_link(file, name, image, path)
        if decode:
            report.checked["images decoded"] += 1
            try:
                processor.decode(path)
                with Image.open(path) as picture:
                    forms = image_forms(picture)
            except (OSError, ValueError) as error:
                report.add("broken_image", f"images/{image}", name, str(error).replace(str(path), "").strip())
                continue
            for form in forms:
                report.add(form, f"images/{image}", name)
    for image, _ in images_below(checker.root):
        if image not in checker.images and not image.startswith(("play/", COCO)):
            report.add("unused_image", f"images/{image}")


def _check_test_images(checker: Checker) -> None:
    prefix = f"data/test/{SPLITS[0]}/"
    tests = {
        row["image"]: file for rows in checker.test_samples.values() for file, row in rows if file.startswith(prefix)
    }
    for image in sorted(tests.keys() & checker.trained):
        if not image.startswith(COCO):
            checker.report.add("test_image_trains", tests[image], image)
    of_script = sum(not image.startswith(COCO) for image in tests)
    checker.report.remark("test_image_trains", f"of {of_script}")


def as_text(reports: Sequence[tuple[Path, Report]]) -> str:
    """Return the reports as text, one below the other."""
    return "\n\n".join(f"{root}\n{report.as_text()}" for root, report in reports)


def as_json(reports: Sequence[tuple[Path, Report]]) -> str:
    """Return the reports as JSON: the data root's, and `extra_roots` in it."""
    first, *others = ({"root": str(root), **report.as_json()} for root, report in reports)
    return json.dumps({**first, "extra_roots": others}, ensure_ascii=False, indent=4) + "\n"


def exit_status(reports: Sequence[tuple[Path, Report]]) -> int:
    """Return the status of all roots together: 1 before 3 before 0."""
    return min((report.exit_status() for _, report in reports), key=[1, 3, 0].index)
