"""The data doctor: everything that is wrong with a data root at once: `python -m data_utils.check DATA_ROOT`.

It looks at characters, annotations, dialogues, images, and test, training and reward-model files; what is not there is
named and not looked at. Exit status:

    0  nothing is wrong, or warnings and notes only (quirks of the published data are warnings)
    1  errors: what stops training or evaluation, or makes their results wrong
    2  it could not be run: no data root, a wrong option
    3  no errors, but MS-COCO images are missing, which scripts/download_data.sh fetches
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_utils.check.dialogues import check_annotations, check_dialogues, read_characters
from data_utils.check.findings import Report
from data_utils.check.root import COCO, Examination, image_files
from data_utils.check.samples import LengthMeter, check_reward_model, check_tests, check_training
from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import write_text
from data_utils.images import clashing_images
from data_utils.layout import SPLITS
from data_utils.roots import Characters, root_problems
from qwen_vl import QwenVLImageProcessor, QwenVLTokenizer

PARTS = ("dialogues", "profiles", "data", "RM_data")


def check_roots(
    data_root: Path,
    extra_roots: Sequence[Path] = (),
    *,
    decode: bool = False,
    meter: LengthMeter | None = None,
    examples: int = 5,
) -> list[tuple[Path, Report]]:
    """Looks at a data root, and at further ones that add characters or dialogues to it.

    Args:
        data_root: The data set's folder.
        extra_roots: Further folders of the same layout; they may use the first one's characters and images.
        decode: Also decodes every image that is referred to.
        meter: Also measures the training samples.
        examples: How many examples of each kind of finding to keep.

    Returns:
        Each root with its report.

    Raises:
        MMRoleError: A folder is not there, holds nothing of a data root, or is given twice.
    """
    roots = [data_root, *extra_roots]
    for root in roots:
        if not any((root / part).is_dir() for part in PARTS):
            fix = f"choose a folder that holds {', '.join(PARTS)}"
            raise MMRoleError("the folder holds no data", None if root.is_dir() else "not there", root, fix)
    raise_problems(root_problems(roots))
    profiles: dict[str, str] = {}
    scripts: dict[str, str] = {}
    everybody = Characters(profiles, scripts)
    all_of_them = [
        Examination(root, Report(examples), everybody, [root, *(other for other in roots if other != root)])
        for root in roots
    ]
    for examination in all_of_them:
        _join(examination, profiles, scripts)
    for number, examination in enumerate(all_of_them):
        check_tests(examination)
        for image, other in clashing_images(examination.root, roots[:number]):
            examination.report.add("clashing_image", f"images/{image}", detail=f"another one in {other}")
    tested = {name for examination in all_of_them for name in examination.tested}
    ids: dict[tuple[str, str], tuple[Path, str]] = {}
    for examination in all_of_them:
        examination.tested = tested
        examination.ids = ids = {**ids, **examination.ids}
        check_annotations(examination)
        check_dialogues(examination)
        check_training(examination, meter)
        check_reward_model(examination, meter)
        _check_images(examination, decode)
        _check_test_images(examination)
        if meter is not None:
            lengths = [f"{file}: the longest sample has {n:,} tokens" for file, n in meter.longest.items()]
            examination.report.remarks += lengths or ["no training file here to measure: build it first"]
            meter.longest.clear()
    return [(examination.root, examination.report) for examination in all_of_them]


def _join(examination: Examination, profiles: dict[str, str], scripts: dict[str, str]) -> None:
    own_profiles, own_scripts = read_characters(examination)
    for name in own_scripts.keys() & scripts.keys():
        examination.report.add("duplicate_id", "profiles", name, "a character of another data root has this name")
    profiles.update(own_profiles)
    scripts.update(own_scripts)


def _check_images(examination: Examination, decode: bool) -> None:
    """Looks for all images that are referred to, and for those that nothing refers to."""
    report = examination.report
    processor = QwenVLImageProcessor()
    for image, (file, name) in sorted(examination.images.items()):
        report.checked["images referred to"] += 1
        try:
            path = examination.find_image(image)
        except MMRoleError as error:
            report.add("wrong_field", file, f"{name}, image", f"{error.what}: {image}")
            continue
        if path is None:
            report.add("missing_coco" if image.startswith(COCO) else "missing_image", file, name, image)
            continue
        examination.check_link(file, name, image, path)
        if decode:
            report.checked["images decoded"] += 1
            try:
                processor.load(path)
            except (OSError, ValueError) as error:
                report.add("broken_image", f"images/{image}", name, str(error).replace(str(path), "").strip())
    for image in image_files(examination.root):
        if image not in examination.images and not image.startswith("play/"):
            report.add("unused_image", f"images/{image}")


def _check_test_images(examination: Examination) -> None:
    prefix = f"data/test/{SPLITS[0]}/"
    tests = {
        row["image"]: file for rows in examination.wanted.values() for file, row in rows if file.startswith(prefix)
    }
    for image in sorted(tests.keys() & examination.trained):
        if not image.startswith(COCO):
            examination.report.add("test_image_trains", tests[image], image)
    of_script = sum(not image.startswith(COCO) for image in tests)
    examination.report.remark("test_image_trains", f"of {of_script}")


def as_text(reports: Sequence[tuple[Path, Report]]) -> str:
    """The reports for a person, one below the other."""
    return "\n\n".join(f"{root}\n{report.as_text()}" for root, report in reports)


def as_json(reports: Sequence[tuple[Path, Report]]) -> str:
    """The reports as JSON: the data root's, and `extra_roots` in it."""
    first, *others = ({"root": str(root), **report.as_json()} for root, report in reports)
    return json.dumps({**first, "extra_roots": others}, ensure_ascii=False, indent=4) + "\n"


def exit_status(reports: Sequence[tuple[Path, Report]]) -> int:
    """The status of all roots together: 1 before 3 before 0."""
    return min((report.exit_status() for _, report in reports), key=[1, 3, 0].index)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_root", type=Path, metavar="DATA_ROOT", help="the folder that holds data/, dialogues/, …")
    parser.add_argument("--extra_root", type=Path, action="append", default=[], help="a further root; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there, as JSON")
    parser.add_argument("--decode", action="store_true", help="decode every image that is referred to")
    parser.add_argument("--tokenizer", type=Path, metavar="CHECKPOINT", help="measure training samples in its tokens")
    parser.add_argument("--max_length", type=_at_least(1), default=3072, help="tokens the trainer keeps (%(default)s)")
    parser.add_argument(
        "--examples", type=_at_least(0), default=5, help="how many to show of each finding (%(default)s)"
    )
    options = parser.parse_args(arguments)
    meter = _meter(options.tokenizer, options.max_length) if options.tokenizer else None
    reports = check_roots(
        options.data_root, options.extra_root, decode=options.decode, meter=meter, examples=options.examples
    )
    if options.json:
        write_text(options.json, as_json(reports))
    _show(as_text(reports))
    return exit_status(reports)


def _at_least(least: int) -> Callable[[str], int]:
    """What reads a flag's whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def _show(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, errors="backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; the status still counts
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _meter(checkpoint: Path, max_length: int) -> LengthMeter:
    try:
        return LengthMeter(QwenVLTokenizer.from_pretrained(checkpoint), max_length)
    except (FileNotFoundError, ValueError) as error:
        raise MMRoleError("no tokenizer there", str(error), "--tokenizer", "choose a checkpoint's folder") from error
