"""Samples from dialogues: on a small data root, and on the published snapshot if available."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_utils.build.reviews import reward_model_samples
from data_utils.errors import MMRoleError
from data_utils.layout import KINDS, SPLITS
from data_utils.roots import Characters, DataRoots, dialogue_id
from data_utils.samples import build_sample, iterate_samples, training_samples

CHARACTERS = Characters(
    profiles={"Wren": "A fiddler.", "Bram": "A baker."},
    scripts={"Wren": "The Lantern Coast", "Bram": "The Lantern Coast", "Ghost": "The Lantern Coast"},
)


def comment(name: str = "Wren_comment_COCO_0") -> dict[str, Any]:
    turns = [{"from": "human", "value": "What is it?"}, {"role": "Wren", "value": "A kite."}]
    return {"id": name, "image": "COCO/train2017/1.jpg", "conversations": turns}


def spoken(*speakers: str, name: str = "Wren_role-role-dialogue_COCO_0") -> dict[str, Any]:
    turns = [{"role": speaker, "value": f"words {turn}"} for turn, speaker in enumerate(speakers)]
    return {"id": name, "image": "COCO/train2017/2.jpg", "conversations": turns}


def question(sample: Mapping[str, Any]) -> str:
    return sample["conversations"][0]["value"]


def test_a_sample_has_the_published_keys_in_the_published_order():
    sample = build_sample(comment(), 1, CHARACTERS)
    assert list(sample) == ["id", "system", "image", "conversations", "role", "script", "other_role"]
    assert sample["id"] == "Wren_comment_COCO_0_1"
    assert sample["conversations"][1] == {"from": "assistant", "value": "A kite."}
    assert (sample["role"], sample["script"], sample["other_role"]) == ("Wren", "The Lantern Coast", "a curious human")


def test_training_puts_the_picture_line_first_and_changes_nothing_else():
    plain, training = (build_sample(comment(), 1, CHARACTERS, training=flag) for flag in (False, True))
    assert question(training) == "Picture 1: <img>images/COCO/train2017/1.jpg</img>\n" + question(plain)
    training["conversations"][0]["value"] = question(plain)
    assert training == plain


def test_the_history_starts_with_the_third_turn_and_leaves_the_last_words_out():
    dialogue = spoken("human", "Wren", "human", "Wren")
    assert "history" not in question(build_sample(dialogue, 1, CHARACTERS))
    later = question(build_sample(dialogue, 3, CHARACTERS))
    assert "as follows:\n[human]: words 0\n[Wren]: words 1\n\n\nPlease respond" in later
    assert later.endswith(":\nwords 2")


def test_both_speakers_answer_from_the_first_turn_on():
    samples = list(iterate_samples([spoken("Wren", "Bram", "Wren", "Bram")], CHARACTERS))
    assert [(s["id"][-1], s["role"], s["other_role"]) for s in samples] == [
        ("0", "Wren", "Bram"), ("1", "Bram", "Wren"), ("2", "Wren", "Bram"), ("3", "Bram", "Wren"),
    ]  # fmt: skip
    assert "Please initiate the conversation with Bram" in question(samples[0])


def test_published_the_last_turn_of_an_odd_dialogue_talks_with_itself():
    sample = build_sample(spoken("Wren", "Bram", "Wren"), 2, CHARACTERS)
    assert sample["other_role"] == "Wren"
    assert "talking with Wren from The Lantern Coast" in question(sample)
    assert question(sample).count("The description of Wren is as follows:\nA fiddler.") == 2
    assert "history between Wren and Wren is" in question(sample)


def test_a_sane_partner_is_the_other_speaker():
    dialogue = spoken("Wren", "Bram", "Wren")
    samples = list(iterate_samples([dialogue], CHARACTERS, sane_partner=True))
    assert [s["other_role"] for s in samples] == ["Bram", "Wren", "Bram"]
    assert build_sample(dialogue, 0, CHARACTERS) == samples[0]


def test_an_unanswered_comment_and_an_empty_dialogue_give_nothing():
    unanswered = comment() | {"conversations": comment()["conversations"][:1]}
    assert list(iterate_samples([unanswered, spoken()], CHARACTERS)) == []


@pytest.mark.parametrize(
    ("speakers", "turn", "what"),
    [
        (("Nobody", "Wren"), 0, "unknown speaker"),
        (("Wren", "Nobody"), 0, "unknown speaker"),
        (("Ghost", "Wren"), 0, "without a profile"),
        (("human", "Wren"), 0, "human's turn"),
        (("human", "Wren"), 2, "no such turn"),
        (("human", "Wren"), -1, "no such turn"),
    ],
)
def test_what_cannot_be_built_names_the_dialogue(speakers: tuple[str, ...], turn: int, what: str):
    with pytest.raises(MMRoleError, match=what) as caught:
        build_sample(spoken(*speakers, name="odd_one"), turn, CHARACTERS)
    assert "odd_one" in str(caught.value)
    assert caught.value.fix


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A data root in which one of two comments was tested."""
    for split in SPLITS:
        inside = split == SPLITS[0]
        write(tmp_path / f"profiles/{split}/profiles.json", dict(CHARACTERS.profiles) if inside else {"Nora": "N."})
        roles = {"The Lantern Coast": ["Wren", "Bram"]} if inside else {"Hypothetical Characters": ["Nora"]}
        write(tmp_path / f"profiles/{split}/roles.json", roles)
        for kind in KINDS:
            write(tmp_path / f"data/test/{split}/{kind}_test.json", [])
    comments = [comment(), comment("Wren_comment_COCO_1")]
    folder = tmp_path / "dialogues" / SPLITS[0]
    write(folder / "comment" / "Wren_COCO.json", comments)
    write(
        folder / "human-role" / "Wren_COCO.json",
        [spoken("human", "Wren", "human", "Wren", name="Wren_human-role-dialogue_COCO_0")],
    )
    write(folder / "inter-role" / "Wren_COCO.json", [spoken("Wren", "Bram", "Wren")])
    tested = [build_sample(comments[0], 1, CHARACTERS)]
    write(tmp_path / f"data/test/{SPLITS[0]}/comment_test.json", tested)
    return tmp_path


def test_training_leaves_out_the_tested_dialogues_whole(data_root: Path):
    assert [s["id"] for s in training_samples(DataRoots([data_root]))] == [
        "Wren_comment_COCO_1_1",
        "Wren_human-role-dialogue_COCO_0_1",
        "Wren_human-role-dialogue_COCO_0_3",
        "Wren_role-role-dialogue_COCO_0_0",
        "Wren_role-role-dialogue_COCO_0_1",
        "Wren_role-role-dialogue_COCO_0_2",
    ]
    last = spoken("human", "Wren", "human", "Wren", name="Wren_comment_COCO_9")
    write(data_root / f"data/test/{SPLITS[0]}/human-role_test.json", [build_sample(last, 3, CHARACTERS)])
    write(data_root / f"dialogues/{SPLITS[0]}/human-role/Wren_COCO.json", [last])
    with pytest.raises(MMRoleError, match="no dialogue gives a training sample"):
        list(training_samples(DataRoots([data_root]), kinds=["human-role"]))


def test_training_samples_can_have_sane_partners(data_root: Path):
    published, sane = (list(training_samples(DataRoots([data_root]), sane_partner=flag)) for flag in (False, True))
    assert (published[-1]["other_role"], sane[-1]["other_role"]) == ("Wren", "Bram")
    assert published[:-1] == sane[:-1]


def test_characters_of_all_splits_can_speak(data_root: Path):
    characters = DataRoots([data_root]).characters
    assert characters.role("Nora").script == "Hypothetical Characters"
    with pytest.raises(MMRoleError, match="unknown speaker"):
        characters.role("Nobody")


def test_a_folder_that_is_no_data_root_is_reported(tmp_path: Path):
    with pytest.raises(MMRoleError) as caught:
        DataRoots([tmp_path])
    assert str(tmp_path) in str(caught.value)


def reviewed(**reviews: dict[str, Any]) -> dict[str, Any]:
    row = build_sample(comment(), 1, CHARACTERS)
    row["conversations"][1]["answer"] = "A boat."
    return row | {"rm_review": reviews}


def two_prompts(row: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    answer = row["conversations"][1]["answer"]
    return {metric: ("Judge.", f"How {metric} is {answer}") for metric in ("Fluency", "Tone")}


def test_reward_model_samples_pair_the_prompt_with_the_review():
    row = reviewed(Tone={"review": "Bad. [Scores]: (1, 9)", "score": [1.0, 9.0]})
    assert list(reward_model_samples([row], two_prompts, agent="some-agent")) == [
        {
            "id": "some-agent_Wren_comment_COCO_0_1_Tone",
            "system": "Judge.",
            "image": "COCO/train2017/1.jpg",
            "conversations": [
                {
                    "from": "user",
                    "value": "Picture 1: <img>images/COCO/train2017/1.jpg</img>\nHow Tone is A boat.",
                },
                {"from": "assistant", "value": "Bad. [Scores]: (1, 9)"},
            ],
        }
    ]


def test_rows_and_reviews_that_teach_nothing_are_left_out():
    unreadable = reviewed(Tone={"review": "Hm.", "score": {}})
    empty = {key: value for key, value in reviewed().items() if key != "rm_review"}
    assert list(reward_model_samples([unreadable, empty], two_prompts)) == []


def test_a_review_of_an_unknown_metric_is_an_error():
    with pytest.raises(MMRoleError, match="unknown metric") as caught:
        list(reward_model_samples([reviewed(Beauty={"review": "x", "score": [1.0, 1.0]})], two_prompts))
    assert "Wren_comment_COCO_0_1" in str(caught.value)


@pytest.fixture(scope="module")
def snapshot(shared: Path) -> Path:
    return shared / "mmrole_data"


def test_every_published_test_sample_comes_out_byte_for_byte(snapshot: Path):
    roots = DataRoots([snapshot])
    characters = roots.characters
    dialogues = {d["id"]: d for split in SPLITS for kind in KINDS for d in roots.dialogues(split, kind)}
    compared = 0
    for file in sorted((snapshot / "data" / "test").rglob("*_test.json")):
        published = json.loads(file.read_text(encoding="utf-8"))
        built = [
            build_sample(dialogues[dialogue_id(s["id"])], int(s["id"].rpartition("_")[2]), characters)
            if dialogue_id(s["id"]) in dialogues
            else s
            for s in published
        ]
        compared += sum(dialogue_id(s["id"]) in dialogues for s in published)
        assert json.dumps(built, ensure_ascii=False, indent=4) == file.read_text(encoding="utf-8")
    assert compared == 269


def test_the_snapshot_gives_the_known_numbers_of_training_samples(snapshot: Path):
    counts = {kind: sum(1 for _ in training_samples(DataRoots([snapshot]), kinds=[kind])) for kind in KINDS}
    assert counts == {"comment": 4_795, "human-role": 22_093, "inter-role": 45_663}
    assert sum(counts.values()) == 72_551


def test_sane_partners_differ_from_the_published_only_where_a_role_talks_with_itself(snapshot: Path):
    pairs = zip(
        training_samples(DataRoots([snapshot]), kinds=["inter-role"]),
        training_samples(DataRoots([snapshot]), kinds=["inter-role"], sane_partner=True),
        strict=True,
    )
    changed = [(published, sane) for published, sane in pairs if published != sane]
    assert changed
    assert all(published["role"] == published["other_role"] for published, _ in changed)
    assert not any(sane["role"] == sane["other_role"] for _, sane in changed)
