"""`check`: exactly the known findings of the real snapshot, and each fault in a small world."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_utils.check.__main__ import main
from data_utils.check.report import KINDS, SEVERITIES
from data_utils.check.roots import as_json, as_text, check_roots, exit_status
from data_utils.check.samples import LengthMeter
from data_utils.demo.world import draw_world, write_world
from data_utils.errors import MMRoleError
from data_utils.layout import KINDS as BUILT_KINDS
from data_utils.supervised import preprocess
from eval.judging.prompt import review_prompts
from qwen_vl import QwenVLTokenizer
from tests.closed import close

# MMRole-Data's published snapshot. Two numbers differ from earlier counts, and were counted again by hand: 216
# are the turns with leading or trailing blanks, in 128 dialogues; and the five unreferenced images are not
# The_Big_Bang_Theory/06 to 10 but those below (06 and 09 are in dialogues).
SNAPSHOT = {
    "empty_dialogue": 641,
    "no_answer": 209,
    "ends_on_human": 81,
    "odd_inter_role": 1594,
    "misnamed_image": 15,
    "scene_blanks": 18,
    "turn_blanks": 216,
    "template_leftover": 1,
    "unused_image": 5,
    "duplicate_answer": 4,
    "test_image_trains": 47,
    "missing_coco": 10839,
}
UNUSED = [f"images/The_Big_Bang_Theory/{number}.jpg" for number in ("02", "05", "07", "08", "10")]
COMMENTS = "dialogues/in-distribution/comment"
HUMAN_ROLE = "dialogues/in-distribution/human-role"
INTER_ROLE = "dialogues/in-distribution/inter-role"
TEST = "data/test/in-distribution/comment_test.json"
TRAIN, RM_TRAIN = "data/train/train_85k.json", "RM_data/train/RM-train_23k.json"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clean") / "world"
    write_world(draw_world(3), root, review_prompts)
    return root


@pytest.fixture
def world(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "world"))


def counts(root: Path, **options: Any) -> dict[str, int]:
    return check_roots(root, **options)[0][1].counts()


def new_counts(root: Path, clean: Path, **options: Any) -> dict[str, int]:
    """Return the findings of a root that the clean world does not have."""
    before = counts(clean)
    after = counts(root, **options)
    found = {kind: n - before.get(kind, 0) for kind, n in after.items() if n != before.get(kind, 0)}
    found.pop("duplicate_answer", None)  # the tests' dialogues are copies; this has a separate test
    return found


def change(root: Path, name: str, edit: Callable[[Any], Any]) -> str:
    """Edit the content of a JSON file (the first of a folder); return its name."""
    path = root / name
    path = sorted(path.glob("*.json"))[0] if path.is_dir() else path
    content = json.loads(path.read_text(encoding="utf-8"))
    content = edit(content) or content
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path.relative_to(root).as_posix()


def test_snapshot_has_exactly_the_known_findings(shared: Path) -> None:
    reports = check_roots(shared / "mmrole_data")
    report = reports[0][1]
    assert report.counts() == {kind: SNAPSHOT[kind] for kind in KINDS if kind in SNAPSHOT}
    assert exit_status(reports) == 3
    assert report.checked["dialogues"] == 13_732
    assert report.checked["test samples"] == 294
    assert report.checked["test samples as built from their dialogue"] == 269
    assert report.checked["characters"] == 85
    assert [example["file"] for example in report.findings["unused_image"].examples] == UNUSED
    assert report.findings["turn_blanks"].remark == "in 128 dialogues"
    assert report.findings["test_image_trains"].remark == "of 47"
    assert "10 out-of-distribution" in report.findings["odd_inter_role"].remark


def test_examples_in_the_snapshot_name_file_and_id(shared: Path) -> None:
    report = check_roots(shared / "mmrole_data", examples=1)[0][1]
    leftover = report.findings["template_leftover"].examples[0]
    assert leftover["file"].endswith("human-role/Hawkeye_COCO.json")
    assert leftover["name"].startswith("Hawkeye_human-role-dialogue_COCO_43, turn ")
    assert leftover["detail"] == "{EIFSOMETHING_ELSE}"


def test_clean_world_has_no_errors(clean: Path) -> None:
    report = check_roots(clean, decode=True)[0][1]
    bad = [kind for kind in report.counts() if KINDS[kind].severity == "error"]
    # The demo's COCO-like pictures are there, so nothing is missing either.
    assert bad == []
    assert report.exit_status() == 0
    assert report.checked["training samples"] > 0
    assert report.checked["images decoded"] == report.checked["images referred to"]


def test_pictures_that_the_model_sees_otherwise_are_warned_of(world: Path, clean: Path) -> None:
    first, second, *_ = sorted((world / "images/COCO/train2017").glob("*.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(first) as picture:
        picture.save(first, exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(second, "PNG")
    assert new_counts(world, clean, decode=True) == {"rotated_image": 1, "transparent_image": 1}


def edit_first(field: str, value: Any) -> Callable[[list[Any]], None]:
    def edit(rows: list[Any]) -> None:
        rows[0][field] = value

    return edit


def edit_turn(number: int, field: str, value: Any) -> Callable[[list[Any]], None]:
    def edit(rows: list[Any]) -> None:
        rows[0]["conversations"][number][field] = value

    return edit


def test_dialogue_without_turns(world: Path, clean: Path) -> None:
    change(world, INTER_ROLE, lambda rows: rows.append({**rows[0], "id": "empty_1", "conversations": []}))
    assert new_counts(world, clean) == {"empty_dialogue": 1}


def test_comment_without_an_answer(world: Path, clean: Path) -> None:
    def edit(rows: list[Any]) -> None:
        rows.append({**rows[0], "id": "bare_1", "conversations": rows[0]["conversations"][:1]})

    change(world, COMMENTS, edit)
    assert new_counts(world, clean) == {"no_answer": 1}


def test_answers_that_dialogues_share(world: Path, clean: Path) -> None:
    before = counts(clean).get("duplicate_answer", 0)
    change(world, COMMENTS, lambda rows: rows.append({**rows[0], "id": "copy_1"}))
    assert counts(world)["duplicate_answer"] == before + 1


def test_edges_and_leftovers(world: Path, clean: Path) -> None:
    def edit(rows: list[Any]) -> None:
        turns = [{**turn, "value": f" {turn['value']} {{NAME_HERE}}"} for turn in rows[0]["conversations"]]
        rows.append({**rows[0], "id": "edges_1", "conversations": turns})

    change(world, COMMENTS, edit)
    found = new_counts(world, clean)
    assert found == {"turn_blanks": 2, "template_leftover": 2}


def test_speakers(world: Path, clean: Path) -> None:
    def edit(rows: list[Any]) -> None:
        first = rows[0]["conversations"]
        rows.append({**rows[0], "id": "stranger_1", "conversations": [first[0], {**first[1], "role": "Nobody"}]})
        rows.append({**rows[0], "id": "twice_1", "conversations": [*first[:2], {**first[1], "value": "Again, me!"}]})

    change(world, HUMAN_ROLE, edit)
    assert new_counts(world, clean) == {"unknown_speaker": 1, "broken_alternation": 1}


def test_missing_profile_and_unlisted_one(world: Path, clean: Path) -> None:
    def edit(profiles: dict[str, str]) -> None:
        name = next(iter(profiles))
        profiles["Somebody Else"] = profiles.pop(name)

    change(world, "profiles/in-distribution/profiles.json", edit)
    found = new_counts(world, clean)
    assert found.pop("unlisted_profile") == 1
    assert found.pop("missing_profile") > 1  # in roles.json, and in each dialogue
    assert set(found) <= {"test_differs", "test samples as built from their dialogue"}


def test_duplicate_ids_across_files(world: Path, clean: Path) -> None:
    row: list[Any] = []
    change(world, COMMENTS, lambda rows: row.append(rows[0]))
    change(world, "dialogues/out-of-distribution/comment.json", lambda rows: rows.append(row[0]))
    found = new_counts(world, clean)
    assert found.pop("duplicate_id") == 1
    assert set(found) <= {"duplicate_answer"}


def test_everything_broken_is_reported_at_once(world: Path, clean: Path) -> None:
    broken = change(world, COMMENTS, lambda rows: None)
    (world / broken).write_text('[{"id": "a",]', encoding="utf-8")
    wrong = change(world, HUMAN_ROLE, edit_turn(0, "value", 5))
    change(world, INTER_ROLE, edit_first("image", "../../secret.jpg"))
    (world / TEST).unlink()
    change(world, RM_TRAIN, lambda rows: rows[0].pop("system") and None)
    report = check_roots(world)[0][1]
    unreadable = {example["file"]: example for example in report.findings["unreadable_file"].examples}
    assert set(unreadable) == {broken, TEST}
    assert "line 1, column" in unreadable[broken]["name"]
    fields = report.findings["wrong_field"].examples
    assert len(fields) == 3
    assert any(e["file"] == wrong and "sample" in e["name"] and "conversations.0.value" in e["detail"] for e in fields)
    assert any("climb out" in e["detail"] for e in fields)
    assert any(e["file"] == RM_TRAIN and e["detail"].startswith("system: ") for e in fields)
    assert report.exit_status() == 1


def test_wrong_top_level_types(world: Path) -> None:
    (world / TRAIN).write_text('{"rows": []}', encoding="utf-8")
    (world / "profiles/in-distribution/roles.json").write_text('{"The Script": "Ada"}', encoding="utf-8")
    fields = check_roots(world, examples=50)[0][1].findings["wrong_field"].examples
    assert {(e["file"], e["name"]) for e in fields} >= {
        (TRAIN, "the file"),
        ("profiles/in-distribution/roles.json", ""),
    }


@pytest.mark.parametrize("name", [TEST, TRAIN, "images/annotations.json", "profiles/in-distribution/roles.json"])
def test_null_is_no_list_and_no_object(world: Path, name: str) -> None:
    (world / name).write_text("null", encoding="utf-8")
    fields = check_roots(world, examples=50)[0][1].findings["wrong_field"].examples
    assert name in {example["file"] for example in fields}


def test_a_split_without_its_test_files(world: Path, clean: Path) -> None:
    shutil.rmtree(world / "data/test/out-of-distribution")
    report = check_roots(world)[0][1]
    missing = [example["file"] for example in report.findings["unreadable_file"].examples]
    assert missing == [f"data/test/out-of-distribution/{kind}_test.json" for kind in BUILT_KINDS]
    shutil.rmtree(world / "data/test/in-distribution")
    report = check_roots(world)[0][1]
    assert "unreadable_file" not in report.findings and "data/test" in report.absent


@pytest.mark.parametrize("folder", [COMMENTS, "data/train", "data/test/in-distribution"])
def test_a_folder_that_may_not_be_read_is_not_taken_for_absent(
    world: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    close(monkeypatch, world / folder)
    found = check_roots(world, examples=50)[0][1].findings["unreadable_file"].examples
    assert {"file": folder, "name": "", "detail": "cannot read: Permission denied"} in found


def remove_coco_image(root: Path) -> None:
    path = sorted((root / COMMENTS).glob("*_COCO.json"))[0]
    (root / "images" / json.loads(path.read_text(encoding="utf-8"))[0]["image"]).unlink()


def test_images(world: Path, clean: Path) -> None:
    comments = sorted((world / COMMENTS).glob("*_script.json"))
    used = {row["image"] for path in comments for row in json.loads(path.read_text(encoding="utf-8"))}
    pictures = [world / "images" / image for image in sorted(used)]
    pictures[0].unlink()
    pictures[1].write_bytes(pictures[1].read_bytes()[:500])
    remove_coco_image(world)
    (world / "images" / "stray.png").write_bytes(b"never opened")
    found = new_counts(world, clean, decode=True)
    assert found == {
        "missing_image": 1,
        "unknown_image": 1,
        "broken_image": 1,
        "missing_coco": 1,
        "unused_image": 1,
    }
    report = check_roots(world, decode=True)[0][1]
    assert pictures[1].name in report.findings["broken_image"].examples[0]["file"]


def test_only_missing_coco_images_have_a_separate_status(world: Path) -> None:
    remove_coco_image(world)
    assert exit_status(check_roots(world)) == 3


def test_images_that_links_lead_out_for(world: Path, clean: Path, tmp_path: Path) -> None:
    coco = world / "images/COCO"
    shutil.move(coco, tmp_path / "elsewhere")
    coco.symlink_to(tmp_path / "elsewhere")
    report = check_roots(world)[0][1]
    referred = {path.name for path in (coco / "train2017").iterdir()} & {
        Path(image).name for path in world.rglob("*.json") for image in re.findall(r"COCO/\S+?\.jpg", path.read_text())
    }
    assert new_counts(world, clean) == {"image_outside": len(referred)}
    assert str(tmp_path / "elsewhere") in report.findings["image_outside"].examples[0]["detail"]
    assert "--follow_links" in KINDS["image_outside"].fix
    assert report.exit_status() == 0
    shutil.move(world / "images", tmp_path / "images")  # a linked image folder, and links inside of it, are fine
    (world / "images").symlink_to(tmp_path / "images")
    coco.unlink()
    shutil.move(tmp_path / "elsewhere", tmp_path / "images/real")
    coco.symlink_to(tmp_path / "images/real")
    assert "image_outside" not in counts(world)


def test_annotations(world: Path, clean: Path) -> None:
    def edit(rows: list[Any]) -> None:
        rows[0]["image"] = rows[0]["image"].swapcase()
        rows[1]["scene_info"] += " "
        rows.append(dict(rows[2]))

    change(world, "images/annotations.json", edit)
    assert new_counts(world, clean) == {"misnamed_image": 1, "scene_blanks": 1, "duplicate_id": 1}


def test_annotated_image_whose_link_leads_nowhere(world: Path, clean: Path) -> None:
    (world / "images/Gone").mkdir()
    (world / "images/Gone/01.jpg").symlink_to("nowhere.jpg")
    change(world, "images/annotations.json", lambda rows: rows.append({**rows[0], "image": "Gone/01.jpg"}))
    found = new_counts(world, clean)
    assert found["unknown_image"] == 1 and "misnamed_image" not in found
    assert check_roots(world)[0][1].findings["unknown_image"].examples[0]["detail"] == "its link is broken"


def test_leak_between_test_and_train(world: Path, clean: Path) -> None:
    sample = json.loads((world / TEST).read_text(encoding="utf-8"))[0]

    def edit(rows: list[Any]) -> None:
        rows[0]["id"] = sample["id"]
        rows[1]["id"] = sample["id"].rpartition("_")[0] + "_7"  # another turn of the same dialogue

    change(world, TRAIN, edit)
    assert new_counts(world, clean) == {"test_in_train": 2}


def test_leak_between_reviews(world: Path, clean: Path) -> None:
    rows = json.loads((world / RM_TRAIN).read_text(encoding="utf-8"))
    (world / "RM_data" / "test").mkdir()
    (world / "RM_data" / "test" / "RM-test_320.json").write_text(json.dumps(rows[:2]), encoding="utf-8")
    assert new_counts(world, clean) == {"review_in_both": 2}


def test_changed_test_sample(world: Path, clean: Path) -> None:
    change(world, TEST, edit_turn(0, "value", "Please say something."))
    report = check_roots(world)[0][1]
    assert new_counts(world, clean) == {"test_differs": 1}
    assert report.findings["test_differs"].examples[0]["detail"] == "another prompt"


def test_turns_and_tags_of_training_samples(world: Path, clean: Path) -> None:
    def edit(rows: list[Any]) -> None:
        ask = rows[0]["conversations"][0]
        rows[0]["conversations"].reverse()  # answers first, and then nobody answers
        rows[1]["conversations"][1]["value"] = "Look: <img>/etc/passwd</img>!"
        rows[2]["conversations"][1]["value"] = "An <img> that never ends"
        rows[3]["conversations"][1]["value"] = "I stop <|im_end|> here"
        rows[4]["conversations"][0]["value"] = "No picture line"
        rows[5]["conversations"][0]["value"] = ask["value"]  # another row's picture, if not the same by chance
        rows[5]["image"] = "elsewhere.jpg"

    change(world, TRAIN, edit)
    assert new_counts(world, clean) == {
        "wrong_turns": 1,
        "other_image_tag": 1,
        "broken_image_tag": 3,
        "special_token": 2,  # the open tag and the end mark
    }


def test_special_tokens_in_sources(world: Path, clean: Path) -> None:
    change(world, "profiles/in-distribution/profiles.json", lambda p: p.update({"Ghost": "Says <|endoftext|>."}))
    assert new_counts(world, clean) == {"special_token": 1, "unlisted_profile": 1}


def test_lengths_are_those_of_the_trainer(clean: Path, tokenizer: QwenVLTokenizer) -> None:
    rows = json.loads((clean / TRAIN).read_text(encoding="utf-8"))
    lengths = [len(preprocess(row["conversations"], tokenizer, max_length=10**6)[0]) for row in rows]
    answers = [len(tokenizer.encode(row["conversations"][1]["value"])) for row in rows]
    limit = sorted(lengths)[len(lengths) // 2]
    report = check_roots(clean, meter=LengthMeter(tokenizer, limit))[0][1]
    lost = [n - limit - 2 for n in lengths if n > limit]
    of_answer = [a for n, a in zip(lengths, answers, strict=True) if n > limit]
    expected = {
        "cut_end": sum(x <= 0 for x in lost),
        "lost_answer": sum(x >= a for x, a in zip(lost, of_answer, strict=True)),
        "cut_answer": sum(0 < x < a for x, a in zip(lost, of_answer, strict=True)),
    }
    in_train = {kind: report.findings[kind].files[TRAIN] if kind in report.findings else 0 for kind in expected}
    assert in_train == expected
    assert expected["lost_answer"] and expected["cut_answer"]
    assert f"{TRAIN}: the longest sample has {max(lengths):,} tokens" in report.remarks


def test_extra_root_uses_the_characters_and_images_of_the_first(world: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    dialogue = json.loads(sorted((world / COMMENTS).glob("*.json"))[0].read_text(encoding="utf-8"))[0]
    (extra / COMMENTS).mkdir(parents=True)
    own = {**dialogue, "id": "extra_1"}
    own["conversations"] = [{**turn, "value": f"Well! {turn['value']}"} for turn in own["conversations"]]
    (extra / COMMENTS / "a.json").write_text(json.dumps([own]), encoding="utf-8")
    reports = check_roots(world, [extra])
    assert reports[1][1].counts() == {}
    assert set(check_roots(extra)[0][1].counts()) >= {"unknown_speaker"}
    own["id"] = dialogue["id"]
    (extra / COMMENTS / "a.json").write_text(json.dumps([own]), encoding="utf-8")
    again = check_roots(world, [extra])[1][1].findings["duplicate_id"].examples
    assert [(e["name"], e["detail"].startswith(f"also in {COMMENTS}/")) for e in again] == [(own["id"], True)]
    assert again[0]["detail"].endswith(f".json of {world}")
    with pytest.raises(MMRoleError, match="given twice"):
        check_roots(world, [extra, extra / "dialogues" / ".."])


def test_report_as_text_and_json(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / TEST).unlink()
    assert main([str(world), "--json", str(tmp_path / "report.json")]) == 1
    text = capsys.readouterr().out
    assert f"error: 1 {KINDS['unreadable_file'].title} [unreadable_file]" in text
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["exit_status"] == 1
    found = {finding["kind"]: finding for finding in report["findings"]}
    assert found["unreadable_file"]["count"] == 1
    assert found["unreadable_file"]["examples"][0]["file"] == TEST
    reports = check_roots(world)
    assert json.loads(as_json(reports)) == report
    assert as_text(reports) == text.rstrip("\n")


def test_all_kinds_have_a_known_severity() -> None:
    assert {kind.severity for kind in KINDS.values()} == set(SEVERITIES)


def test_folder_that_is_no_data_root(tmp_path: Path) -> None:
    with pytest.raises(MMRoleError, match="holds no data"):
        check_roots(tmp_path)


@pytest.mark.parametrize("flags", [["--max_length", "-5"], ["--max_length", "0"], ["--examples", "-1"]])
def test_numbers_that_cannot_be(world: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(world), *flags])
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err


def test_command_line_status(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "data_utils.check", str(tmp_path / "nowhere")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not there" in done.stderr and "Traceback" not in done.stderr
