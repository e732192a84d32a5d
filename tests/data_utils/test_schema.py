import copy
import json

import pytest

from data_utils.schema import AnswerRow, ReviewedRow, TestSample, TrainSample, read_rows, validate_rows

SAMPLE = {
    "id": "a_1",
    "system": "s",
    "image": "西游记/01.png",
    "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}],
    "role": "r",
    "script": "s",
    "other_role": "o",
}


def changed(**changes):
    return {**copy.deepcopy(SAMPLE), **changes}


def messages(rows, record=TestSample):
    return [str(problem) for problem in validate_rows(rows, record, "x.json")]


def test_a_good_row_has_no_problems():
    assert messages([SAMPLE]) == []
    assert messages([changed(extra={"kept": True})]) == []


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({key: value for key, value in SAMPLE.items() if key != "role"}, "role: field required"),
        (changed(id=7), "id: "),
        (changed(id=""), "id: "),
        (changed(system=None), "system: "),
        (changed(conversations=SAMPLE["conversations"][:1]), "conversations.1: "),
        (changed(conversations=SAMPLE["conversations"] * 2), "conversations: "),
        (changed(conversations="q"), "conversations: "),
        (changed(conversations=SAMPLE["conversations"][::-1]), "conversations.0.from: "),
        (changed(conversations=[{"from": "user", "value": 3}, SAMPLE["conversations"][1]]), "conversations.0.value: "),
        (changed(role="\ud83d"), "half of a surrogate pair"),
        (changed(note={"of mine": ["\ud83d"]}), "half of a surrogate pair"),
        ("not a row", "the row: "),
    ],
)
def test_what_is_wrong_is_named(row, field):
    (problem,) = [text for text in messages([SAMPLE | {"id": "other"}, row]) if field in text]
    assert "x.json, row 2" in problem
    assert "to do:" in problem


@pytest.mark.parametrize(
    "image",
    ["/etc/passwd", "../x.png", "a/../../x.png", "..", "a\\..\\x.png", "http://x/y.png", "file:///x.png",
     "data:image/png,", "C:\\x.png", "\\\\host\\x.png", "", " ", "a\0.png", "a\n.png"],
)  # fmt: skip
def test_images_stay_below_the_image_folder(image):
    assert len(messages([changed(image=image)])) == 1


@pytest.mark.parametrize(
    "image", ["COCO/train2017/000000224155.jpg", "成龙历险记/1.png", "a..b/x y.png", "…/x.png", "　.png"]
)
def test_ordinary_image_names_are_allowed(image):
    assert messages([changed(image=image)]) == []


def test_everything_is_reported_at_once_with_file_row_and_sample():
    rows = [changed(role=1, script=None), changed(id="b", image="/x"), changed(id="b")]
    problems = messages(rows)
    assert len(problems) == 4
    assert "row 1, sample a_1" in problems[0]
    assert "role: " in problems[0]
    assert "script: " in problems[1]
    assert "row 2, sample b" in problems[2]
    assert "2 rows have the same id" in problems[3]


def test_answers_must_exist_and_may_be_empty():
    answered = changed()
    answered["conversations"][1]["answer"] = ""
    assert messages([answered], AnswerRow) == []
    assert "conversations.1.answer: field required" in messages([SAMPLE], AnswerRow)[0]


@pytest.mark.parametrize("score", [[8.0, 9], [], {}])
def test_reviewed_rows(score):
    answered = changed(rm_review={"Fluency": {"review": "r", "score": score}, "Coherency": {}})
    answered["conversations"][1]["answer"] = "x"
    assert messages([answered], ReviewedRow) == []
    answered["rm_review"]["Fluency"]["score"] = "8"
    assert messages([answered], ReviewedRow)


def test_train_samples_may_have_many_turns_and_no_image():
    turns = [{"from": "assistant", "value": "hi"}, *SAMPLE["conversations"]]
    assert messages([{"id": "x", "conversations": turns}], TrainSample) == []
    assert messages([{"id": "x", "conversations": []}], TrainSample)


def test_rows_come_back_as_they_stand_in_the_file(tmp_path):
    text = json.dumps([{"z": 1, **SAMPLE, "a": None}], ensure_ascii=False, indent=4)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    rows, problems = read_rows(tmp_path / "x.json", TestSample)
    assert problems == []
    assert json.dumps(rows, ensure_ascii=False, indent=4) == text


def test_a_file_that_is_no_list_or_no_json(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    assert "a list of samples is expected" in str(read_rows(tmp_path / "x.json", TestSample)[1][0])
    (tmp_path / "x.json").write_text("[")
    assert "not valid JSON" in str(read_rows(tmp_path / "x.json", TestSample)[1][0])


def test_every_published_file_is_valid(shared):
    root = shared / "mmrole_data"
    for pattern, record, count in (
        ("data/test/*/*.json", TestSample, 6),
        ("published/*_answers/*/*.json", AnswerRow, 48),
        ("published/*_reviews/*/*.json", ReviewedRow, 48),
    ):
        paths = sorted(root.glob(pattern))
        assert len(paths) == count
        for path in paths:
            assert read_rows(path, record)[1] == []
