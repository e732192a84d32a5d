"""The records of MMRole-Data and of its evaluation, and a check that reports everything wrong with a file at once.

Rows are checked, never changed: the functions return the dicts of the file with their key order and extra keys, so that
a file written from them has the same bytes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from data_utils.errors import MMRoleError
from data_utils.files import Row, read_json
from data_utils.images import image_name_problem


def _check_image_name(name: str) -> str:
    problem = image_name_problem(name)
    if problem:
        raise ValueError(problem)
    return name


def _check_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}, which no file can hold") from None
    return text


def _check_sample_id(name: str) -> str:
    if not re.fullmatch(r".+_[0-9]{1,6}", name, re.DOTALL):
        raise ValueError("an id must be that of the dialogue, _ and the number of a turn")
    return name


Text = Annotated[str, AfterValidator(_check_text)]
Name = Annotated[Text, Field(min_length=1)]
SampleId = Annotated[Name, AfterValidator(_check_sample_id)]
ImageName = Annotated[Text, AfterValidator(_check_image_name)]


class Record(BaseModel):
    """A record of a data file; types are strict, extra keys are allowed."""

    model_config = ConfigDict(strict=True, extra="allow", populate_by_name=False)

    @model_validator(mode="after")
    def _further_keys_can_be_written(self) -> Record:
        if self.__pydantic_extra__:
            _check_text(json.dumps(self.__pydantic_extra__, ensure_ascii=False))
        return self


class Annotation(Record):
    """The annotation of an image; texts may be empty."""

    image: ImageName
    role_info: Text
    place_info: Text
    scene_info: Text


class DialogueTurn(Record):
    """A turn of a dialogue, of a character or of "human", under `role` or (in a comment) `from`."""

    role: Name | None = None
    sender: Literal["human"] | None = Field(default=None, alias="from")
    value: Text

    @model_validator(mode="after")
    def _someone_speaks(self) -> DialogueTurn:
        if (self.role is None) == (self.sender is None):
            raise ValueError('a turn must have either "role" or "from" to name the speaker')
        return self


class Dialogue(Record):
    """A dialogue about an image, possibly with the image's information; published ones may have no turns."""

    id: Name
    image: ImageName
    role_info: Text | None = None
    place_info: Text | None = None
    scene_info: Text | None = None
    conversations: list[DialogueTurn]


class UserTurn(Record):
    """The prompt."""

    sender: Literal["user"] = Field(alias="from")
    value: Name


class AssistantTurn(Record):
    """The ground truth."""

    sender: Literal["assistant"] = Field(alias="from")
    value: Text


class AnsweredTurn(AssistantTurn):
    """The ground truth, and an agent's answer; it is empty if the agent gave none."""

    answer: Text


class Turn(Record):
    """A turn of a training sample."""

    sender: Literal["user", "assistant"] = Field(alias="from")
    value: Text


class TestSample(Record):
    """A sample of the test sets."""

    __test__ = False  # tells pytest that it is not a test class

    id: Name
    system: Text
    image: ImageName
    conversations: tuple[UserTurn, AssistantTurn] = Field(strict=False)
    role: Name
    script: Name
    other_role: Name


class Named(Record):
    """The part of a test sample that the data tools read: its id, `<id of its dialogue>_<turn>`."""

    id: SampleId


class TrainSample(Record):
    """A training sample, of the agent or of the reward model; the trainer reads nothing but `conversations`."""

    id: Name
    system: Text | None = None
    image: ImageName | None = None
    conversations: Annotated[list[Turn], Field(min_length=1)]


class RewardSample(Record):
    """A reward-model sample: a review prompt with its picture, and the review."""

    id: Name
    system: Text
    image: ImageName
    conversations: tuple[UserTurn, AssistantTurn] = Field(strict=False)


class AnswerRow(TestSample):
    """A test sample with an agent's answer in `conversations[1]`."""

    conversations: tuple[UserTurn, AnsweredTurn] = Field(strict=False)


class Review(Record):
    """One review: the text, and its scores of the answer and of the ground truth, if they could be read."""

    review: Text = ""
    score: list[float] | dict[str, float] = []  # published: a review that could not be read has the score {}


class ReviewedRow(AnswerRow):
    """An answered sample with its reviews, one per metric; none if the answer is empty."""

    rm_review: dict[str, Review] = {}


Profiles = TypeAdapter(dict[Name, Name], config=ConfigDict(strict=True))  # profiles.json: a character's profile
Roles = TypeAdapter(dict[Name, list[Name]], config=ConfigDict(strict=True))  # roles.json: a script's characters


def validate_value(value: object, form: TypeAdapter[Any], source: str | Path) -> list[MMRoleError]:
    """Return everything wrong with a file that is not a list of records.

    Args:
        value: The file's content.
        form: Its type: `Profiles` or `Roles`.
        source: The file, for the messages.
    """
    try:
        form.validate_python(value)
    except ValidationError as error:
        return [_detail_problem(detail, "the file", source) for detail in error.errors()]
    return []


def validate_row(row: object, record: type[Record], number: int, source: str | Path) -> list[MMRoleError]:
    """Return everything wrong with one row: one problem per wrong or missing field.

    Args:
        row: The row.
        record: The type of the row.
        number: Its place in the file, from 1.
        source: The file, for the messages.
    """
    try:
        record.model_validate(row)
    except ValidationError as error:
        return [_detail_problem(detail, "the row", _place(row, number, source)) for detail in error.errors()]
    return []


def validate_rows(rows: object, record: type[Record], source: str | Path) -> list[MMRoleError]:
    """Return everything wrong with the rows of a file.

    Args:
        rows: The file's content.
        record: The type of each row.
        source: The file, for the messages.

    Returns:
        One problem per wrong field, missing field or repeated id, in file order.
    """
    if not isinstance(rows, list):
        return [
            MMRoleError(
                "a list of samples is expected",
                f"a JSON {type(rows).__name__}",
                source,
                "check that it is the right file",
            )
        ]
    problems = []
    for number, row in enumerate(rows, 1):
        problems += validate_row(row, record, number, source)
    return problems + _repeated_ids(rows, source)


def read_rows(path: str | Path, record: type[Record]) -> tuple[list[Row], list[MMRoleError]]:
    """Read and check a file of records.

    Args:
        path: A JSON file.
        record: The type of its rows.

    Returns:
        The rows exactly as they stand in the file and no problems; or no rows and everything that is wrong.
    """
    try:
        rows = read_json(path)
    except MMRoleError as error:
        return [], [error]
    problems = validate_rows(rows, record, path)
    return ([], problems) if problems else (rows, [])


def read_value(path: str | Path, form: TypeAdapter[Any]) -> tuple[dict[str, Any], list[MMRoleError]]:
    """Read and check a file that is not a list of records.

    Args:
        path: A JSON file.
        form: Its type: `Profiles` or `Roles`.

    Returns:
        Its content and no problems; or an empty one and everything that is wrong.
    """
    try:
        value = read_json(path)
    except MMRoleError as error:
        return {}, [error]
    problems = validate_value(value, form, path)
    return ({}, problems) if problems else (value, [])


def _detail_problem(detail: Any, whole: str, where: str | Path) -> MMRoleError:
    location = [str(part) for part in detail["loc"]]
    name = ".".join(location) or whole
    message = detail["msg"].removeprefix("Value error, ")
    value = None if detail["type"] == "missing" else detail["input"]
    return MMRoleError(
        f"{name}: {message[:1].lower()}{message[1:]}",
        value if value is None or isinstance(value, str) else f"{value!r}",
        where,
        "correct this field in the file, or build or download the file again",
    )


def _repeated_ids(rows: Sequence[object], source: str | Path) -> list[MMRoleError]:
    ids = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
    return [
        MMRoleError(f"id: {count} rows have the same id", name, source, "give each row a different id")
        for name, count in Counter(ids).items()
        if count > 1
    ]


def _place(row: object, number: int, source: str | Path) -> str:
    sample = row.get("id") if isinstance(row, dict) else None
    return f"{source}, row {number}" + (f", sample {sample}" if isinstance(sample, str) and sample else "")
