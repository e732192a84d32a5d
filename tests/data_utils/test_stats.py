"""The data card: its numbers on a small world and on the real snapshot, its token counts, its plots."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_utils.demo.world import draw_world, write_world
from data_utils.errors import MMRoleError, ProblemsError
from data_utils.layout import KINDS
from data_utils.lengths import LengthCounter
from data_utils.prompts import CATEGORIES, SYSTEM_MESSAGE, category
from data_utils.roots import DataRoots
from data_utils.samples import training_samples
from data_utils.stats import __main__ as stats
from data_utils.stats import plots as stats_plots
from data_utils.stats.card import Card, Lengths, markdown
from data_utils.stats.measure import collect, write_card
from qwen_vl import QwenVLTokenizer
from qwen_vl.chat import make_context
from tests.conftest import ROOT

PLOTS = ["characters.png", "images.png", "lengths.png", "samples.png", "turns.png"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(draw_world(3), root)
    return root


def part(card: Card, name: str) -> dict[str, int]:
    return {kind: len(lengths.prompts) for (found, kind), lengths in card.samples.items() if found == name}


def test_a_notebooks_backend_does_not_matter(world: Path, tmp_path: Path) -> None:
    """Programs that a notebook starts inherit it, and it is not installed for them."""
    command = [sys.executable, "-m", "data_utils.stats", str(world), "--out", str(tmp_path / "card")]
    environ = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environ)
    assert sorted(path.name for path in (tmp_path / "card").glob("*.png")) == PLOTS


def test_counts_are_those_of_the_files(world: Path) -> None:
    card = collect(world)
    counted = {kind: sum(1 for _ in training_samples(DataRoots([world]), kinds=[kind])) for kind in KINDS}
    assert part(card, "training") == counted
    for (split, kind), seen in card.dialogues.items():
        dialogues = list(DataRoots([world]).dialogues(split, kind))
        assert seen.total == len(dialogues)
        assert seen.turns == [len(d["conversations"]) for d in dialogues if d["conversations"]]
        assert seen.unusable == 0
    assert sum(len(names) for *_, names in card.scripts) == len(DataRoots([world]).characters.profiles)
    there = len(list((world / "images").rglob("*.jpg")))
    assert sum(present + unused for _, present, unused, _ in card.images.values()) == there
    assert sum(seen.total for seen in card.dialogues.values()) == sum(numbers[3] for numbers in card.images.values())


def test_lengths_in_characters_without_a_tokenizer(world: Path) -> None:
    card = collect(world)
    samples = list(training_samples(DataRoots([world]), kinds=["comment"]))
    lengths = card.samples["training", "comment"]
    assert card.unit == "characters"
    assert lengths.answers == [len(sample["conversations"][1]["value"]) for sample in samples]


def test_tokens_are_counted_exactly(world: Path, tokenizer: QwenVLTokenizer) -> None:
    counter = LengthCounter(tokenizer)
    for sample in list(training_samples(DataRoots([world]), kinds=["inter-role"]))[:20]:
        text = sample["conversations"][0]["value"]
        ids = make_context(tokenizer, [{"image": "x.jpg"}, {"text": text}], system=SYSTEM_MESSAGE)[1]
        assert counter.prompt(text) == len(ids)


HARD = [
    "",
    "\n",
    "a\n\nb",
    "a.\n\n b",
    "a \n \n\tb\n",
    "…\r\n第一\n二\u0301",
    "x\n\u0301e",
    "<|im_end|>\n<img>",
    "don\n't",
    " \n",
]


@pytest.mark.parametrize("text", HARD)
def test_line_by_line_changes_no_token(shared: Path, text: str) -> None:
    tokenizer = QwenVLTokenizer.from_pretrained(shared / "qwen_vl_chat")
    expected = len(tokenizer.encode(text, allowed_special=()))
    assert LengthCounter(tokenizer).count(text) == expected


def test_snapshot_is_counted_as_documented(shared: Path) -> None:
    card = collect(shared / "mmrole_data")
    sorts = {}
    for split, _, sort, names in card.scripts:
        sorts[split, sort] = sorts.get((split, sort), 0) + len(names)
    assert sorts == {
        ("in-distribution", "fictional"): 41,
        ("in-distribution", "historical or public"): 11,
        ("in-distribution", "hypothetical"): 20,
        ("out-of-distribution", "fictional"): 5,
        ("out-of-distribution", "historical or public"): 3,
        ("out-of-distribution", "hypothetical"): 5,
    }
    assert part(card, "training") == {"comment": 4795, "human-role": 22093, "inter-role": 45663}
    assert part(card, "test, in-distribution") == dict.fromkeys(KINDS, 72)
    assert part(card, "test, out-of-distribution") == dict.fromkeys(KINDS, 26)
    assert sum(seen.total for seen in card.dialogues.values()) == 13732
    assert (
        card.dialogues["in-distribution", "human-role"].total
        - len(card.dialogues["in-distribution", "human-role"].turns)
        == 394
    )
    assert card.images["COCO"] == (10839, 0, 0, 10839)
    assert card.images["The_Big_Bang_Theory"] == (5, 5, 5, 15)


@pytest.mark.slow
def test_snapshot_with_tokens(shared: Path, tmp_path: Path) -> None:
    stats.main([str(shared / "mmrole_data"), "--out", str(tmp_path), "--tokenizer", str(shared / "qwen_vl_chat")])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == PLOTS
    card = (tmp_path / "data_card.md").read_text(encoding="utf-8")
    assert "72,551 training samples" in card
    # Some prompts of each file, counted without shortcuts.
    tokenizer = QwenVLTokenizer.from_pretrained(shared / "qwen_vl_chat")
    counter = LengthCounter(tokenizer)
    for path in sorted((shared / "mmrole_data" / "data" / "test").rglob("*.json")):
        for sample in json.loads(path.read_text(encoding="utf-8"))[::20]:
            text = sample["conversations"][0]["value"]
            ids = make_context(tokenizer, [{"image": "x.jpg"}, {"text": text}], system=SYSTEM_MESSAGE)[1]
            assert counter.prompt(text) == len(ids)


def test_card_and_plots(world: Path, tmp_path: Path) -> None:
    path = write_card(collect(world), world, tmp_path / "new" / "folder")
    text = path.read_text(encoding="utf-8")
    assert sorted(p.name for p in path.parent.glob("*.png")) == PLOTS
    for name in PLOTS:
        assert f"]({name})" in text
        with Image.open(path.parent / name) as image:
            assert image.format == "PNG"
            assert len(image.convert("L").getcolors()) > 10  # something is drawn on it
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > 30


def test_own_root_without_tests_and_dialogues(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "profiles" / "in-distribution"
    folder.mkdir(parents=True)
    (folder / "profiles.json").write_text(json.dumps({"A|B": "p"}))
    (folder / "roles.json").write_text(json.dumps({"my | world": ["A|B"]}))
    card = collect(tmp_path)
    text = markdown(card, "mine", stats_plots.draw_plots(card))
    assert "| in-distribution | my \\| world | other | 1 | A\\|B |" in text
    assert "no dialogues/in-distribution/comment here" in text
    assert "samples.png" not in text


def test_broken_dialogue_is_counted_not_fatal(world: Path, tmp_path: Path) -> None:
    for name in ("profiles.json", "roles.json"):
        target = tmp_path / "profiles" / "in-distribution" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((world / "profiles" / "in-distribution" / name).read_bytes())
    folder = tmp_path / "dialogues" / "in-distribution" / "inter-role"
    folder.mkdir(parents=True)
    turns = [{"role": "Nobody", "value": "a"}, {"role": "Nobody else", "value": "b"}]
    (folder / "x.json").write_text(json.dumps([{"id": "x_1", "image": "x.jpg", "conversations": turns}]))
    seen = collect(tmp_path).dialogues["in-distribution", "inter-role"]
    assert (seen.total, seen.turns, seen.unusable) == (1, [2], 1)


def change(root: Path, name: str, value: object) -> None:
    (root / name).write_text(json.dumps(value), encoding="utf-8")


def test_everything_that_is_wrong_is_reported_at_once(world: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(world, tmp_path / "world"))
    comment = json.loads((root / "dialogues/out-of-distribution/comment.json").read_text(encoding="utf-8"))[0]
    kept = {key: value for key, value in comment.items() if key != "image"}
    change(root, "dialogues/out-of-distribution/comment.json", [kept, {**comment, "id": None}])
    (root / "dialogues/out-of-distribution/inter-role.json").write_text("[", encoding="utf-8")
    change(root, "data/test/out-of-distribution/comment_test.json", [{"id": 5}])
    with pytest.raises(ProblemsError) as caught:
        stats.main([str(root), "--out", str(tmp_path / "card")])
    for part in (
        "comment.json, row 1",
        "image: ",
        "comment.json, row 2",
        "inter-role.json",
        "comment_test.json, row 1",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "card").exists()
    change(root, "profiles/in-distribution/roles.json", [1])
    change(root, "profiles/out-of-distribution/profiles.json", ["A"])
    with pytest.raises(ProblemsError) as caught:
        collect(root)
    assert [str(problem.where).rpartition("/")[2] for problem in caught.value.problems] == [
        "roles.json",
        "profiles.json",
    ]


def test_images_in_a_linked_folder_are_there(world: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(world, tmp_path / "world"))
    before = collect(root).images["COCO"]
    shutil.move(root / "images/COCO/train2017", tmp_path / "train2017")
    (root / "images/COCO/train2017").symlink_to(tmp_path / "train2017")
    referred, present, _, dialogues = collect(root).images["COCO"]
    assert (referred, present, dialogues) == (before[0], before[1], before[3])
    assert present > 0


def test_tokens_by_default_where_a_checkpoint_is(
    world: Path, tmp_path: Path, tokenizer: QwenVLTokenizer, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(stats, "WEIGHTS", tmp_path)
    stats.main([str(world), "--out", str(tmp_path / "card")])
    result = capsys.readouterr().out
    assert "lengths are in characters" in result and "--tokenizer" in result
    tokenizer.save_pretrained(tmp_path / "Qwen-VL-Chat")
    stats.main([str(world), "--out", str(tmp_path / "card")])
    assert "characters;" not in capsys.readouterr().out
    assert "In tokens." in (tmp_path / "card/data_card.md").read_text(encoding="utf-8")


def test_longest_samples_are_not_piled_up_in_the_last_bin(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(unit="tokens", scripts=[("in-distribution", "x", "other", ["a"])])
    card.samples["training", "comment"] = Lengths([*range(1000), *[90_000] * 3], [10] * 1003)
    figures = []
    monkeypatch.setattr(stats_plots, "png", lambda figure: figures.append(figure) or b"")
    stats_plots.draw_plots(card)
    prompts, answers = next(figure.axes for figure in figures if len(figure.axes) == 2)
    assert prompts.get_xlabel() == "tokens (4 longer ones not shown)"
    assert answers.get_xlabel() == "tokens"
    heights = prompts.patches[0].get_xy()[:, 1]
    assert heights[-3] < 1.2 * heights[3]  # the last bin's against the first's


def test_all_of_few_samples_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(unit="tokens", scripts=[("in-distribution", "x", "other", ["a"])])
    card.samples["training", "comment"] = Lengths([*range(100), 5_000], [10] * 101)
    figures = []
    monkeypatch.setattr(stats_plots, "png", lambda figure: figures.append(figure) or b"")
    stats_plots.draw_plots(card)
    prompts, _ = next(figure.axes for figure in figures if len(figure.axes) == 2)
    assert prompts.get_xlabel() == "tokens"


def test_sources_whose_short_names_are_the_same_have_separate_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{'a' * 40} {number}" for number in range(2)]
    card = Card(unit="tokens", scripts=[("in-distribution", "x", "other", ["a"])])
    card.images = {name: (5 - place, 3, 0, 5) for place, name in enumerate(names)}
    figures = []
    monkeypatch.setattr(stats_plots, "png", lambda figure: figures.append(figure) or b"")
    stats_plots.draw_plots(card)
    (axes,) = figures[-1].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"{'a' * 27}…"] * 2
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in axes.containers[0]] == [(0, 5), (1, 4)]


def test_names_that_no_font_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_plots, "font_families", lambda: ["DejaVu Sans"])
    assert stats_plots.label("西游记", 4) == "Journey to the West"
    assert stats_plots.label("我的世界", 4) == "row 4 of the table"
    assert stats_plots.label("the_modern_times", 4) == "the modern times"
    assert stats_plots.label("a" * 100, 1) == "a" * 27 + "…"


def test_categories() -> None:
    assert [category(s) for s in ("X-Men", "中国唐代", "Hypothetical Characters", "mine")] == list(CATEGORIES)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(MMRoleError, match="no profiles"):
        stats.main([str(tmp_path)])
    with pytest.raises(MMRoleError, match="no tokenizer"):
        stats.main([str(tmp_path), "--tokenizer", str(tmp_path)])


def test_png_is_a_picture_of_the_numbers() -> None:
    card = Card(scripts=[("in-distribution", "x", "other", ["a"])])
    one = stats_plots.draw_plots(card)["characters.png"]
    card.scripts.append(("in-distribution", "y", "fictional", ["b", "c"]))
    two = stats_plots.draw_plots(card)["characters.png"]
    assert Image.open(io.BytesIO(one)).height < Image.open(io.BytesIO(two)).height
