"""Finished answers of other tools become the published files, or everything that is wrong with them is listed."""

import json
from pathlib import Path

import pytest

import inference
from data_utils.answers.__main__ import main
from data_utils.errors import MMRoleError
from tests.fake_backend import FakeBackend, flags, make_world, results


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path / "world")


def lines_of(world: Path) -> list[dict[str, str]]:
    files = sorted((world / "data/test").rglob("*.json"))
    return [{"id": row["id"], "answer": f"I am {row['id']}"} for path in files for row in json.loads(path.read_text())]


def write(world: Path, lines: list[dict[str, str]], *more: str) -> int:
    path = world / "answers.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8-sig")  # as Windows editors write it
    flags = ["--answers", str(path), "--agent", "mine", "--eval_dir", str(world / "eval"), *more]
    return main([str(world), *flags])


def test_the_files_are_those_that_inference_writes(world: Path) -> None:
    answers = {line["id"]: line["answer"] for line in lines_of(world)}
    assert write(world, lines_of(world)[::-1]) == 0
    made = results(world / "eval")
    reply = lambda prompt: answers[prompt.text.rsplit(" ", 1)[1]]  # noqa: E731
    assert inference.main(flags(world, "--agent", "other"), FakeBackend(reply)) == 0
    others = {k.replace("/other/", "/mine/"): v for k, v in results(world / "eval").items() if "/other/" in k}
    assert made == others
    with pytest.raises(MMRoleError, match="answers of this name exist already"):
        write(world, lines_of(world))
    assert write(world, lines_of(world), "--overwrite") == 0


def test_everything_wrong_is_listed_and_nothing_written(world: Path) -> None:
    lines = lines_of(world)
    lines = [*lines[2:], {"id": "stranger", "answer": "x"}, lines[5]]
    with pytest.raises(MMRoleError) as caught:
        write(world, lines)
    for part in ("2 samples have no answer", "1 ids belong to no test sample", "stranger", "1 ids are repeated"):
        assert part in str(caught.value)
    with pytest.raises(MMRoleError, match=r"answer: "):
        write(world, [{"id": "a"}])
    assert not (world / "eval").exists()


def test_some_answers_only(world: Path) -> None:
    assert write(world, lines_of(world)[:1], "--partial") == 0
    (data,) = results(world / "eval").values()
    assert len(json.loads(data)) == 1
