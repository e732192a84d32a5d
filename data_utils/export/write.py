"""Writes the exported files of data roots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data_utils.errors import MMRoleError, raise_problems
from data_utils.export.formats import Format, dataset_info, exported
from data_utils.files import Row, write_json, write_rows
from data_utils.layout import KINDS, RM_TEST_FILE, RM_TRAIN_FILE, SPLITS, paths_of_tests
from data_utils.paths import is_file
from data_utils.roots import DataRoots, dialogue_files
from data_utils.samples import training_samples
from data_utils.schema import RewardSample, TestSample


def export(
    data_roots: Sequence[Path],
    output: Path,
    form: Format,
    *,
    system: str,
    image_dir: Path | None = None,
    sane_partner: bool = False,
) -> None:
    """Write the files of a format and print their counts.

    Args:
        data_roots: The data root, and further ones that add dialogues and characters.
        output: The folder to write to.
        form: The format.
        system: The system message of training samples; see `exported`.
        image_dir: The image folder on the machine that trains; None is the data root's.
        sane_partner: The partner is the dialogue's other speaker, instead of the published rule.

    Raises:
        MMRoleError: There is nothing to export, files are wrong, or a file cannot be written.
    """
    roots = DataRoots(data_roots)
    roots.compare_images()
    folders = [image_dir] if image_dir else [root / "images" for root in data_roots]
    images = _Images([folder.absolute() for folder in folders])
    sources: dict[str, Iterator[Row]] = {}
    if any(dialogue_files(root, SPLITS[0], kind) for root in data_roots for kind in KINDS):
        sources["train"] = training_samples(roots, sane_partner=sane_partner)
    for name, file in (("rm_train", RM_TRAIN_FILE), ("rm_test", RM_TEST_FILE)):
        paths = [root / file for root in data_roots if is_file(root / file)]
        if paths:
            sources[name] = _rows(roots, paths, RewardSample)
    tests = [path for root in data_roots for path in paths_of_tests(root) if is_file(path)]
    if tests:
        sources["test"] = _rows(roots, tests, TestSample)
    if not sources:
        fix = "choose a folder that holds dialogues/, data/test/ or RM_data/"
        raise MMRoleError("there is nothing to export", None, data_roots[0], fix)
    for name, samples in sources.items():
        of_part = "role-play" if name == "test" else system

        def rows(samples: Iterator[Row] = samples, of_part: str = of_part) -> Iterator[Row]:
            for sample in samples:
                yield exported(sample, form, system=of_part, image=images.path(sample["image"]))

        path = output / f"{name}.jsonl"
        count = write_rows(path, tqdm(rows(), name, disable=None, unit=" samples", leave=False), as_lines=True)
        print(f"{name}: {count:,} samples written to {path.resolve()}")
    if form.dataset_info:
        write_json(output / "dataset_info.json", dataset_info({f"mmrole_{name}": f"{name}.jsonl" for name in sources}))
    if images.missing:
        print(f"{images.missing:,} pictures are not below {' or '.join(map(str, folders))}: see data_utils.check")


class _Images:
    """Finds each picture once, in the first folder that holds it."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._paths: dict[str, str] = {}
        self.missing = 0

    def path(self, image: str) -> str:
        if image not in self._paths:
            found = next((folder / image for folder in self._folders if (folder / image).is_file()), None)
            self.missing += found is None
            self._paths[image] = str(found or self._folders[0] / image)
        return self._paths[image]


def _rows(roots: DataRoots, paths: Sequence[Path], record: type) -> Iterator[Row]:
    for path in paths:
        yield from roots.rows(path, record)
    raise_problems(roots.problems)
