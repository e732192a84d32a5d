"""The files that train and test, from the command line: counts, bytes, leaks, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_utils.build.__main__ import main
from data_utils.build.reviews import write_reviews
from data_utils.check.roots import check_roots
from data_utils.errors import MMRoleError, ProblemsError
from data_utils.files import published_json, write_rows
from data_utils.layout import KINDS, PLAIN_IMAGE, RM_TEST_FILE, RM_TRAIN_FILE, SPLITS
from data_utils.layout import TRAIN_FILE as TRAIN
from data_utils.roots import DataRoots, dialogue_id
from data_utils.samples import training_samples
from data_utils.schema import RewardSample, validate_rows
from eval.judging.prompt import review_prompts

ROOT = Path(__file__).resolve().parents[2]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_training_file_is_the_published_format_to_the_byte(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(world)]) == 0
    samples = list(training_samples(DataRoots([world])))
    assert (world / TRAIN).read_bytes() == published_json(samples)
    out = capsys.readouterr().out
    assert f"{len(samples)} training samples" in out
    assert "not the published 85,456" in out
    assert not list((world / "data/train").glob(".*"))
    tests = [row["id"] for path in (world / "data/test").glob("*/*.json") for row in read(path)]
    assert tests and not {*map(dialogue_id, tests)} & {dialogue_id(row["id"]) for row in samples}


@pytest.mark.parametrize("rows", [[], [{"id": "a", "b": []}], [{"id": '中\n"\\', "b": [1, {}]}, {"id": "c"}]])
def test_written_row_by_row_as_at_once(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert write_rows(tmp_path / "new" / "x.json", iter(rows)) == len(rows)
    assert (tmp_path / "new" / "x.json").read_bytes() == published_json(rows)


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_rows(path, [{"id": "old"}])
    with pytest.raises(MMRoleError, match="surrogate"):
        write_rows(path, [{"id": "new"}, {"id": "half", "value": "\ud800"}])
    assert read(path) == [{"id": "old"}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_sane_partner(world: Path) -> None:
    main([str(world), "--sane_partner", "--out", str(world / "sane.json")])
    assert read(world / "sane.json") == list(training_samples(DataRoots([world]), sane_partner=True))
    assert all(row["role"] != row["other_role"] for row in read(world / "sane.json"))


def test_without_test_files_nothing_is_held_out(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = len(list(training_samples(DataRoots([world]))))
    shutil.rmtree(world / "data" / "test")
    main([str(world)])
    assert len(read(world / TRAIN)) > held
    assert "no data/test here" in capsys.readouterr().out


def test_incomplete_test_files_stop_the_build(world: Path) -> None:
    (world / "data/test/in-distribution/comment_test.json").unlink()
    with pytest.raises(MMRoleError, match="cannot read the file"):
        main([str(world)])
    assert not (world / TRAIN).exists()


def test_all_broken_dialogues_are_reported_at_once(world: Path) -> None:
    files = sorted((world / "dialogues/in-distribution/human-role").glob("*.json"))
    rows = read(files[0])
    rows[0]["conversations"][1]["role"] = "Nobody"
    files[0].write_text(json.dumps(rows), encoding="utf-8")
    files[1].write_text("[", encoding="utf-8")
    rows = read(files[2])
    rows[0]["image"] = 5
    files[2].write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(ProblemsError) as caught:
        main([str(world)])
    message = str(caught.value)
    for part in ("Nobody", files[1].name, f"{files[2]}, row 1", "image: "):
        assert part in message
    assert not (world / TRAIN).exists()


def test_test_files_are_rebuilt_to_the_byte(world: Path, tmp_path: Path) -> None:
    main([str(world), "--test", "--out", str(tmp_path / "built")])
    for split in SPLITS:
        for kind in KINDS:
            name = f"{split}/{kind}_test.json"
            assert (tmp_path / "built" / name).read_bytes() == (world / "data/test" / name).read_bytes()


def test_test_samples_are_drawn_without_test_files(world: Path, tmp_path: Path) -> None:
    shutil.rmtree(world / "data" / "test")
    for out in ("a", "b"):
        main([str(world), "--test", "--out", str(tmp_path / out)])
    drawn = read(tmp_path / "a/out-of-distribution/human-role_test.json")
    assert [row["id"] for row in drawn] == [
        row["id"] for row in read(tmp_path / "b/out-of-distribution/human-role_test.json")
    ]
    assert len(drawn) == len(read(world / "dialogues/out-of-distribution/human-role.json"))
    assert [read(tmp_path / f"a/in-distribution/{kind}_test.json") for kind in KINDS] == [[], [], []]


def test_tests_need_a_folder(world: Path) -> None:
    with pytest.raises(MMRoleError, match="folder to write to"):
        main([str(world), "--test"])


def test_extra_root(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(list(training_samples(DataRoots([world]))))
    extra = tmp_path / "extra"
    dialogue = read(sorted((world / "dialogues/in-distribution/comment").glob("*.json"))[0])[0]
    (extra / "dialogues/in-distribution").mkdir(parents=True)
    own = {**dialogue, "id": "extra_0", "image": "Mine/01.jpg"}
    (extra / "dialogues/in-distribution/comment.json").write_text(json.dumps([own]), encoding="utf-8")
    (extra / "images/Mine").mkdir(parents=True)
    (extra / "images/Mine/01.jpg").write_bytes(b"picture")
    main([str(world), "--extra_root", str(extra)])
    assert "1 images of the further roots are not below" in capsys.readouterr().out
    assert [row["id"] for row in read(world / TRAIN) if row["id"].startswith("extra")] == ["extra_0_1"]
    assert len(read(world / TRAIN)) == before + 1
    main([str(world), "--extra_root", str(extra), "--link_images"])
    assert (world / "images/Mine/01.jpg").read_bytes() == b"picture"


def give_image(root: Path, name: str, content: bytes) -> None:
    (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "images" / name).write_bytes(content)


def give_dialogue(root: Path, dialogue: dict[str, Any]) -> None:
    (root / "dialogues/in-distribution").mkdir(parents=True, exist_ok=True)
    (root / "dialogues/in-distribution/comment.json").write_text(json.dumps([dialogue]), encoding="utf-8")


@pytest.fixture
def extra(world: Path, tmp_path: Path) -> Path:
    """A further root, with a dialogue about a new picture."""
    root = tmp_path / "extra"
    dialogue = read(sorted((world / "dialogues/in-distribution/comment").glob("*.json"))[0])[0]
    give_dialogue(root, {**dialogue, "id": "extra_0", "image": "Mine/01.jpg"})
    give_image(root, "Mine/01.jpg", b"my picture")
    return root


@pytest.mark.parametrize("flags", [[], ["--link_images"], ["--test", "--out", "built"]])
def test_images_of_one_name_that_differ(world: Path, extra: Path, flags: list[str]) -> None:
    give_image(world, "Mine/01.jpg", b"another one")
    flags = [str(world / flag) if flag == "built" else flag for flag in flags]
    with pytest.raises(MMRoleError, match="have the same name but differ") as caught:
        main([str(world), "--extra_root", str(extra), *flags])
    for part in ("Mine/01.jpg", str(extra), str(world), "to do:"):
        assert part in str(caught.value)
    assert not (world / TRAIN).exists() and not (world / "built").exists()
    report = check_roots(world, [extra])[1][1]
    assert report.exit_status() == 1
    assert report.findings["clashing_image"].examples == [
        {"file": "images/Mine/01.jpg", "name": "", "detail": f"another one in {world}"}
    ]


def test_images_of_two_further_roots_that_differ(world: Path, extra: Path, tmp_path: Path) -> None:
    give_image(tmp_path / "third", "Mine/01.jpg", b"a third one")
    with pytest.raises(MMRoleError, match="have the same name but differ"):
        main([str(world), "--extra_root", str(extra), "--extra_root", str(tmp_path / "third"), "--link_images"])
    assert not (world / "images/Mine").exists()


def test_images_of_one_name_that_are_the_same(world: Path, extra: Path, capsys: pytest.CaptureFixture[str]) -> None:
    give_image(world, "Mine/01.jpg", b"my picture")
    for root in (world, extra):  # what is no picture of a sample
        give_image(root, PLAIN_IMAGE, str(root).encode())
        give_image(root, "Mine/.hidden", str(root).encode())
        give_image(root, "Mine/01.txt", str(root).encode())
    flags = [str(world), "--extra_root", str(extra), "--link_images"]
    assert main(flags) == 0
    assert "further roots" not in capsys.readouterr().out
    (world / "images/Mine/01.jpg").unlink()
    assert main(flags) == main(flags) == 0  # the second time it is linked already
    assert (world / "images/Mine/01.jpg").is_symlink()
    assert "clashing_image" not in check_roots(world, [extra])[1][1].counts()


@pytest.mark.parametrize("change", ["profile", "script"])
def test_characters_of_one_name_that_are_different_people(world: Path, extra: Path, change: str) -> None:
    shutil.copytree(world / "profiles", extra / "profiles")
    flags = [str(world), "--extra_root", str(extra)]
    assert main(flags) == 0  # the same people
    before = (world / TRAIN).read_bytes()
    path = extra / "profiles/in-distribution" / {"profile": "profiles.json", "script": "roles.json"}[change]
    content = read(path)
    if change == "profile":
        name = next(iter(content))
        content[name] += " And a sailor."
    else:
        script = next(iter(content))
        name = content[script].pop()
        content["Another story"] = [name]
    path.write_text(json.dumps(content), encoding="utf-8")
    for more in ([], ["--test", "--out", str(world / "built")]):
        with pytest.raises(MMRoleError, match="have the same name but differ") as caught:
            main([*flags, *more])
        for part in (name, str(extra / "profiles"), "to do:"):
            assert part in str(caught.value)
    assert (world / TRAIN).read_bytes() == before and not (world / "built").exists()
    assert check_roots(world, [extra])[1][1].exit_status() == 1


def test_link_to_an_image_that_has_moved_is_made_again(world: Path, extra: Path) -> None:
    flags = [str(world), "--extra_root", str(extra), "--link_images"]
    main(flags)
    extra = extra.rename(extra.with_name("moved"))
    flags[2] = str(extra)
    main(flags)
    assert (world / "images/Mine/01.jpg").read_bytes() == b"my picture"


def test_drawn_tests_leave_a_root_that_can_be_used_again(world: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(world / "profiles", own / "profiles")
    for kind in ("comment", "inter-role"):
        shutil.rmtree(world / "dialogues/in-distribution" / kind)
        (world / f"dialogues/out-of-distribution/{kind}.json").unlink()
    shutil.move(world / "dialogues", own / "dialogues")
    for _ in range(2):
        assert main([str(own), "--test", "--out", str(own / "data/test")]) == 0
        assert main([str(own)]) == 0
    assert len(list((own / "data/test").glob("*/*.json"))) == 6
    assert not set(check_roots(own)[0][1].counts()) & {"unreadable_file", "test_in_train"}


def test_tests_are_not_lost_for_want_of_their_dialogues(world: Path) -> None:
    path = world / "data/test/out-of-distribution/comment_test.json"
    (world / "dialogues/out-of-distribution/comment.json").unlink()
    before = path.read_bytes()
    with pytest.raises(MMRoleError, match="would be lost"):
        main([str(world), "--test", "--out", str(world / "data/test")])
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", [5, "", "no number", "Ada_comment_COCO_0_x"])
@pytest.mark.parametrize("flags", [[], ["--test", "--out", "built"]])
def test_ids_of_tests_that_name_no_turn(world: Path, name: object, flags: list[str]) -> None:
    for split in SPLITS:
        path = world / f"data/test/{split}/comment_test.json"
        path.write_text(json.dumps([{**read(path)[0], "id": name}]), encoding="utf-8")
    flags = [str(world / flag) if flag == "built" else flag for flag in flags]
    with pytest.raises(ProblemsError) as caught:
        main([str(world), *flags])
    assert all(f"{split}/comment_test.json, row 1" in str(caught.value) for split in SPLITS)
    assert len(caught.value.problems) == 2
    assert not (world / TRAIN).exists() and not (world / "built").exists()
    assert check_roots(world)[0][1].counts()["wrong_field"] == 2


def reviewed(world: Path, folder: Path, agents: int = 2) -> int:
    """Write reviews of the test samples in the layout of eval/; return their number."""
    total = 0
    for agent in range(agents):
        rows = read(world / "data/test/in-distribution/comment_test.json")
        for row in rows:
            row["conversations"][1]["answer"] = f"I am agent {agent}."
            scores = {"review": "Fine. [Scores]: (8, 9)", "score": [8.0, 9.0]}
            row["rm_review"] = dict.fromkeys(review_prompts(row), scores)
            total += len(row["rm_review"])
        rows[0]["conversations"][1]["answer"] = ""
        total -= len(rows[0].pop("rm_review"))
        place = folder / "in-test_reviews" / f"agent-{agent}"
        place.mkdir(parents=True)
        (place / "comment_test.json").write_bytes(published_json(rows))
    answers = folder / "in-test_answers" / "agent-0"
    answers.mkdir(parents=True)
    (answers / "comment_test.json").write_text('["not reviews"]', encoding="utf-8")
    return total


def test_reviews_are_split_for_validation(world: Path, tmp_path: Path) -> None:
    total = reviewed(world, tmp_path / "eval")
    command = [str(world), "--reviews", str(tmp_path / "eval"), "--validation", "10"]
    main([*command, "--seed", "1"])
    train, test = read(world / RM_TRAIN_FILE), read(world / RM_TEST_FILE)
    assert (len(train), len(test)) == (total - 10, 10)
    assert validate_rows([*train, *test], RewardSample, "") == []
    assert train[0]["conversations"][1]["value"] == "Fine. [Scores]: (8, 9)"
    assert "I am agent 0." in train[0]["conversations"][0]["value"]
    main([*command, "--seed", "1"])
    assert read(world / RM_TEST_FILE) == test
    main([*command, "--seed", "2"])
    assert read(world / RM_TEST_FILE) != test


def test_reviews_that_cannot_be_used(world: Path, tmp_path: Path) -> None:
    reviewed(world, tmp_path / "eval")
    with pytest.raises(MMRoleError, match="too few reviews"):
        main([str(world), "--reviews", str(tmp_path / "eval"), "--validation", "100000"])
    with pytest.raises(MMRoleError, match="at least 0"):
        main([str(world), "--reviews", str(tmp_path / "eval"), "--validation", "-1"])
    with pytest.raises(MMRoleError, match="no such function"):
        main([str(world), "--reviews", str(tmp_path / "eval"), "--review_prompts", "eval.nothing:here"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MMRoleError, match="no reviews"):
        main([str(world), "--reviews", str(tmp_path / "empty")])
    row = read(tmp_path / "eval/in-test_reviews/agent-0/comment_test.json")[1]
    with pytest.raises(MMRoleError, match="are repeated"):
        write_reviews(tmp_path, [("a", row), ("a", row)], review_prompts, validation=1, seed=0)


# Builds and reads the file in a separate process, because a child's peak memory includes its parent's.
BUILD_AND_READ = """
import json, resource, subprocess, sys

root, out = sys.argv[1:]
subprocess.run([sys.executable, "-m", "data_utils.build", root, "--out", out], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)

from pathlib import Path
from data_utils.schema import TrainSample, validate_rows

rows = json.loads(Path(out).read_text(encoding="utf-8"))
problems = validate_rows(rows[::50], TrainSample, out)
found = {"kilobytes": used.ru_maxrss, "rows": len(rows), "problems": [str(problem) for problem in problems]}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_snapshot_gives_all_training_samples(shared: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD_AND_READ, str(shared / "mmrole_data"), str(tmp_path / "train.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "72,551 training samples (comment 4,795, human-role 22,093, inter-role 45,663)" in done.stdout
    assert "not the published 85,456" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kilobytes"] < 1.5 * 2**20
    assert (found["rows"], found["problems"]) == (72_551, [])


def test_snapshot_gives_the_published_test_samples(shared: Path, tmp_path: Path) -> None:
    root = shared / "mmrole_data"
    main([str(root), "--test", "--out", str(tmp_path)])
    total = 0
    for split in SPLITS:
        for kind in KINDS:
            name = f"{split}/{kind}_test.json"
            published = {row["id"]: row for row in read(root / "data/test" / name)}
            for row in read(tmp_path / name):
                assert json.dumps(row) == json.dumps(published[row["id"]])
                total += 1
    assert total == 269


def test_snapshot_gives_reward_model_files(shared: Path, tmp_path: Path) -> None:
    root = shared / "mmrole_data"
    main([str(root), "--reviews", str(root / "published"), "--out", str(tmp_path)])
    assert len(read(tmp_path / RM_TEST_FILE)) == 320
    assert len(read(tmp_path / RM_TRAIN_FILE)) == 18_472
