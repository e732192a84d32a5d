"""Reads and checks the inputs of a run, and checks its outputs, before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_utils.errors import MMRoleError
from data_utils.images import find_image
from data_utils.layout import journal_path
from data_utils.paths import UnreadableError, is_file, is_folder, listed
from data_utils.schema import Record, Row, read_rows

SHOWN_JSON = "*.json"


@dataclass(frozen=True)
class Source:
    """An input file and its output file."""

    input: Path
    output: Path


@dataclass
class Input:
    """The selected rows of an input file.

    Attributes:
        source: The input file and its output file.
        rows: The selected rows, unchanged.
        images: The image file of each row, by sample id.
        skipped: Ids of rows without their image, which are left out.
        ids: Ids of all rows in the file.
    """

    source: Source
    rows: list[Row] = field(default_factory=list)
    images: dict[str, Path] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Selection:
    """The rules that select rows.

    Attributes:
        image_dir: The image folder.
        skip_missing: Leave out rows whose image is missing, instead of refusing to start.
        limit: The largest number of rows per file, not counting those left out; None for all.
        follow_links: Allow links that lead out of the image folder.
        needs_image: Return whether a row needs its image.
        overwrite: Also read the inputs of results that were made elsewhere, which are otherwise left alone.
    """

    image_dir: Path
    skip_missing: bool = False
    limit: int | None = None
    follow_links: bool = False
    needs_image: Callable[[Row], bool] = lambda row: True
    overwrite: bool = False


def json_sources(input_dir: Path, output_dir: Path, input_file: str | None = None) -> list[Source]:
    """Return the visible `.json` files of a folder, or the named one, each with an output of the same name.

    Raises:
        MMRoleError: If the folder does not exist, cannot be read, or holds no such file.
    """
    if not is_folder(input_dir):
        raise MMRoleError("there is no such input folder", input_dir, "--input_dir", "check the path")
    names = [input_file] if input_file else [path.name for path in listed(input_dir, SHOWN_JSON)]
    if not names:
        raise MMRoleError("the input folder holds no .json file", input_dir, "--input_dir", "check the path")
    return [Source(input_dir / name, output_dir / Path(name).name) for name in names]


def read_inputs(
    sources: Sequence[Source], record: type[Record], selection: Selection
) -> tuple[list[Input], list[MMRoleError]]:
    """Read and check all input files, and find their images.

    Args:
        sources: Input and output files.
        record: The type of their rows.
        selection: The rules that select rows.

    Returns:
        The inputs, and all problems. The input of a result that was made elsewhere is not read, and has no rows.
    """
    inputs: list[Input] = []
    problems: list[MMRoleError] = []
    no_images = _image_dir_problem(selection.image_dir)
    problems += [no_images] if no_images else []
    missing: list[str] = []
    for source in sources:
        if not selection.overwrite and _was_made_elsewhere(source.output):
            inputs.append(Input(source))
            continue
        rows, wrong = read_rows(source.input, record)
        problems += wrong
        if not (no_images or wrong):
            inputs.append(_select(source, rows, selection, problems, missing))
    if missing:
        problems.append(_missing_images(missing, selection.image_dir))
    elif any(entry.skipped for entry in inputs) and not any(entry.rows for entry in inputs):
        fix = "give the folder that holds the images with --image_dir"
        problems.append(MMRoleError("no row has its image", selection.image_dir, "--image_dir", fix))
    return inputs, problems


def output_problems(sources: Sequence[Source]) -> list[MMRoleError]:
    """Return the reasons why outputs could not be written, without creating anything."""
    problems = []
    for source in sources:
        if source.output.resolve() == source.input.resolve():
            problems.append(
                MMRoleError(
                    "the output would overwrite the input",
                    source.output,
                    "--output_dir",
                    "choose another output folder",
                )
            )
        elif _is_writable(source.output.parent) and source.output.is_dir():
            problems.append(MMRoleError("the output is a folder", source.output, fix="choose another output folder"))
    return problems + [_unwritable(folder) for folder in _folders(sources) if not _is_writable(folder)]


def _image_dir_problem(image_dir: Path) -> MMRoleError | None:
    try:
        if is_folder(image_dir):
            return None
    except UnreadableError as error:
        return error
    fix = "give the folder that holds the images with --image_dir, or the data set's with --data_root"
    return MMRoleError("there is no such image folder", image_dir, "--image_dir", fix)


def _was_made_elsewhere(output: Path) -> bool:
    try:
        return is_file(output) and not is_file(journal_path(output))
    except UnreadableError:
        return False  # reported by `output_problems`


def _select(
    source: Source, rows: list[Row], selection: Selection, problems: list[MMRoleError], missing: list[str]
) -> Input:
    """Return the selected rows; bad links are added to `problems`, missing images to `missing`."""
    selected = Input(source, ids=[row["id"] for row in rows])
    for number, row in enumerate(rows, 1):
        if selection.limit is not None and len(selected.rows) >= selection.limit:
            break
        if selection.needs_image(row):
            try:
                image = find_image(selection.image_dir, row["image"], follow_links=selection.follow_links)
            except UnreadableError as error:  # one unreadable folder hides many images
                if str(error) not in map(str, problems):
                    problems.append(error)
                continue
            except MMRoleError as error:
                where = f"{source.input}, row {number}, sample {row['id']}"
                problems.append(MMRoleError(error.what, error.value, where, error.fix))
                continue
            if image is None and selection.skip_missing:
                selected.skipped.append(row["id"])
                continue
            if image is None:
                missing.append(row["image"])
            selected.images[row["id"]] = image or selection.image_dir / row["image"]
        selected.rows.append(row)
    return selected


def _missing_images(missing: list[str], image_dir: Path) -> MMRoleError:
    names = list(dict.fromkeys(missing))
    return MMRoleError(
        f"{len(names)} image(s) are missing, {len(missing)} row(s) need them",
        names,
        image_dir,
        "put them there (COCO/train2017/ comes from MS-COCO), or give --image_dir, or leave these rows out with "
        "--missing_image skip",
    )


def _folders(sources: Sequence[Source]) -> list[Path]:
    return list(dict.fromkeys(source.output.parent for source in sources))


def _is_writable(folder: Path) -> bool:
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:  # a folder above it cannot be read
        return False


def _unwritable(folder: Path) -> MMRoleError:
    return MMRoleError(
        "the output folder cannot be written or created", folder, fix="check its permissions, or choose another one"
    )
