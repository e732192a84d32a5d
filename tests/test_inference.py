import ast
import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import inference
from data_utils.errors import MMRoleError, ProblemsError, run_main
from tests.closed import close
from tests.conftest import ROOT
from tests.fake_backend import FakeBackend, fake_answer, flags, make_model, make_world, results, sample, write_rows
from tests.processes import killed_at

FILES = [
    f"{split}-test_answers/mmrole-agent/{kind}_test.json"
    for split in ("in", "out")
    for kind in ("comment", "human-role", "inter-role")
]


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path / "world")


def undisturbed(tmp_path):
    other = make_world(tmp_path / "undisturbed")
    assert inference.main(flags(other), FakeBackend()) == 0
    return results(other / "eval")


# ---- what is written


def test_both_test_sets_are_answered_in_the_published_format(world):
    backend = FakeBackend()
    assert inference.main(flags(world), backend) == 0
    made = results(world / "eval")
    assert sorted(made) == sorted(FILES)
    rows = json.loads((world / "data/test/in-distribution/comment_test.json").read_text())
    expected = copy.deepcopy(rows)
    for row in expected:
        (prompt,) = [r for r in backend.prompts if r.text == row["conversations"][0]["value"]]
        row["conversations"][1]["answer"] = fake_answer(prompt)
    assert made[FILES[0]] == json.dumps(expected, ensure_ascii=False, indent=4).encode()


def test_a_request_is_the_sample_and_nothing_else(world):
    backend = FakeBackend()
    inference.main(flags(world, "--max_new_tokens", 9), backend)
    prompt = backend.prompts[0]
    row = json.loads((world / "data/test/in-distribution/comment_test.json").read_text())[0]
    assert prompt.image == world / "images" / row["image"]
    assert (prompt.text, prompt.system) == (row["conversations"][0]["value"], row["system"])
    assert (prompt.decoding.do_sample, prompt.decoding.max_new_tokens) == (None, 9)
    assert len({prompt.seed for prompt in backend.prompts}) == 18


def test_no_random_is_greedy(world):
    backend = FakeBackend()
    inference.main(flags(world, "--no_random"), backend)
    assert {prompt.decoding.do_sample for prompt in backend.prompts} == {False}


def test_published_answers_come_out_byte_for_byte(shared, tmp_path):
    """From the test set and the published answers' texts, the published files."""
    published = shared / "mmrole_data" / "published" / "in-test_answers" / "mmrole-agent"
    rows = [row for path in published.glob("*.json") for row in json.loads(path.read_text())]
    texts = {row["conversations"][0]["value"]: row["conversations"][1]["answer"] for row in rows}
    world = make_world(tmp_path / "world")
    for row in rows:
        image = world / "images" / row["image"]
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"")
    source = shared / "mmrole_data/data/test/in-distribution"
    result = flags(world, "--input_dir", source, "--output_dir", tmp_path / "out")
    assert inference.main(result, FakeBackend(lambda prompt: texts[prompt.text])) == 0
    for path in published.glob("*.json"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_extra_keys_of_the_data_survive(world):
    path = world / "data/test/in-distribution/comment_test.json"
    write_rows(path, [{"note": [1.0, None], **sample("a"), "更多": {"x": "\u2028"}}])
    inference.main(flags(world), FakeBackend(lambda prompt: "hi"))
    row = json.loads((world / "eval" / FILES[0]).read_text())[0]
    assert list(row) == ["note", "id", "system", "image", "conversations", "role", "script", "other_role", "更多"]
    assert row["更多"] == {"x": "\u2028"}


def test_released_flags(world, tmp_path):
    write_rows(tmp_path / "in" / "a.json", [sample("a")])
    write_rows(tmp_path / "in" / "b.json", [sample("b")])
    result = flags(world, "--input_dir", tmp_path / "in", "--output_dir", tmp_path / "one", "--input_file", "b.json")
    assert inference.main(result, FakeBackend()) == 0
    assert list(results(tmp_path / "one")) == ["b.json"]
    result = flags(world, "--input_dir", tmp_path / "in", "--output_dir", tmp_path / "all")
    assert inference.main(result, FakeBackend()) == 0
    assert list(results(tmp_path / "all")) == ["a.json", "b.json"]
    assert results(tmp_path / "all")["b.json"] == results(tmp_path / "one")["b.json"]


# ---- resuming


def test_a_finished_run_is_left_alone_and_says_so(world, capsys):
    inference.main(flags(world), FakeBackend())
    made, backend = results(world / "eval"), FakeBackend()
    capsys.readouterr()
    assert inference.main(flags(world), backend) == 0
    assert capsys.readouterr().out.count("finished already, left alone") == 6
    assert backend.prompts == []
    assert results(world / "eval") == made


def test_killed_in_the_middle_of_a_write_twice(tmp_path):
    """3 answers (the header comes with the first), a last line, a file and its renaming for each of 6 files."""
    expected = undisturbed(tmp_path)
    for moment in (1, 2, 4, 5, 6, 7, 18, 35, 36):
        other = make_world(tmp_path / str(moment))
        assert killed_at(moment, lambda other=other: inference.main(flags(other), FakeBackend())) == -signal.SIGKILL
        assert killed_at(3, lambda other=other: inference.main(flags(other), FakeBackend())) in (-signal.SIGKILL, 0)
        assert inference.main(flags(other), FakeBackend()) == 0
        assert results(other / "eval") == expected
        assert not list((other / "eval").rglob("*.tmp"))


def test_a_run_goes_on_and_asks_only_for_what_is_missing(world, tmp_path):
    class Dying(FakeBackend):
        def run(self, prompts):
            for number, result in enumerate(super().run(prompts)):
                if number == 7:
                    raise KeyboardInterrupt
                yield result

    with pytest.raises(KeyboardInterrupt):
        inference.main(flags(world), Dying())
    assert list(results(world / "eval")) == FILES[:2]
    backend = FakeBackend()
    inference.main(flags(world), backend)
    assert len(backend.prompts) == 11
    assert results(world / "eval") == undisturbed(tmp_path)


def test_another_model_or_other_settings_are_refused_and_both_are_named(world):
    inference.main(flags(world), FakeBackend())
    made = results(world / "eval")
    other = make_model(world / "other", b"other weights")
    backend = FakeBackend()
    with pytest.raises(ProblemsError) as caught:
        inference.main([*flags(world), "--model_path", str(other), "--no_random", "--seed", "5"], backend)
    result = str(caught.value)
    assert str(world / "model") in result
    assert str(other) in result
    assert 'decoding: "as the checkpoint says" there, "greedy" now' in result
    assert "seed: 0 there, 5 now" in result
    assert backend.prompts == []
    assert results(world / "eval") == made
    assert inference.main([*flags(world), "--model_path", str(other), "--overwrite"], backend) == 0
    assert len(backend.prompts) == 18


def test_a_limited_run_is_not_taken_for_the_whole(world, tmp_path):
    inference.main(flags(world, "--limit", 1), FakeBackend())
    assert [len(json.loads(data)) for data in results(world / "eval").values()] == [1] * 6
    backend = FakeBackend()
    inference.main(flags(world), backend)
    assert len(backend.prompts) == 12
    assert results(world / "eval") == undisturbed(tmp_path)


def test_a_published_file_is_left_alone_even_without_its_images(world, capsys):
    published = write_rows(world / "eval" / FILES[0], ["published"])
    write_rows(world / "data/test/in-distribution/comment_test.json", [sample("a", image="gone.png")])
    assert inference.main(flags(world), FakeBackend()) == 0
    assert "made elsewhere" in capsys.readouterr().out
    assert json.loads(published.read_text()) == ["published"]


def test_a_failed_sample_is_counted_and_tried_again(world, capsys):
    def fails(prompt):
        if "in-distribution_comment_1" in prompt.text:
            raise ValueError("not a readable image")
        return fake_answer(prompt)

    assert inference.main(flags(world), FakeBackend(fails)) == 1
    assert "1 failed: not a readable image: in-distribution_comment_1" in capsys.readouterr().err
    rows = json.loads((world / "eval" / FILES[0]).read_text())
    assert [bool(row["conversations"][1]["answer"]) for row in rows] == [True, False, True]
    backend = FakeBackend()
    assert inference.main(flags(world), backend) == 0
    assert len(backend.prompts) == 1


def test_another_input_of_the_same_name_is_refused(world, tmp_path, capsys):
    for folder, names in (("in1", "abc"), ("in2", "xy")):
        write_rows(tmp_path / folder / "x.json", [sample(name) for name in names])

    def flags_of(folder, *more):
        return flags(world, "--input_dir", tmp_path / folder, "--output_dir", tmp_path / "out", *more)

    assert inference.main(flags_of("in1"), FakeBackend()) == 0
    made = (tmp_path / "out/x.json").read_bytes()
    assert "made from another input: 3 of its 3 rows" in problems_of(flags_of("in2"))
    assert (tmp_path / "out/x.json").read_bytes() == made
    assert inference.main(flags_of("in1", "--limit", 1), FakeBackend()) == 0
    assert "has rows that are not selected now" in capsys.readouterr().out
    assert (tmp_path / "out/x.json").read_bytes() == made
    assert inference.main(flags_of("in2", "--overwrite"), FakeBackend()) == 0
    assert [row["id"] for row in json.loads((tmp_path / "out/x.json").read_text())] == ["x", "y"]


# ---- what is checked before the model is loaded


class Untouchable(FakeBackend):
    def run(self, prompts):
        raise AssertionError("the model must not be asked for")


def problems_of(arguments):
    with pytest.raises(MMRoleError) as caught:
        inference.main(arguments, Untouchable())
    return str(caught.value)


def test_everything_wrong_is_reported_at_once(world):
    test = world / "data" / "test"
    (test / "in-distribution/comment_test.json").write_text("[{]")
    write_rows(test / "in-distribution/human-role_test.json", [sample("a", role=None), sample("a", image="../x.png")])
    (test / "in-distribution/inter-role_test.json").unlink()
    write_rows(
        test / "out-of-distribution/comment_test.json", [sample("b", image="gone.png"), sample("c", image="go.png")]
    )
    (world / "eval").write_text("a file where the folder should be")
    (world / "model" / "config.json").unlink()
    result = problems_of(flags(world))
    for part in (
        "line 1, column 3",
        "role: ",
        "climb out of the image folder",
        "2 rows have the same id",
        "No such file or directory",
        "gone.png\n",
        "go.png\n",
        "2 image(s) are missing",
        "the output folder cannot be written",
        "config.json",
    ):
        assert part in result, part
    assert (world / "eval").is_file()


def test_an_unreadable_checkpoint_comes_with_everything_else(world):
    (world / "model/generation_config.json").write_text("{")
    write_rows(world / "data/test/in-distribution/comment_test.json", [sample("b", image="gone.png")])
    result = problems_of(flags(world, "--device", "cuda:99"))
    for part in ("3 problems", "generation_config.json", "gone.png", "cuda:99"):
        assert part in result, part


def test_damaged_weights_are_seen_before_they_are_loaded(world):
    weights = world / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    (world / "model/qwen.tiktoken").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (world / "eval").write_text("a file where the folder should be")
    result = problems_of(flags(world))
    for part in ("4 problems", "model.safetensors is cut off", "git lfs pull", "the output folder cannot be written"):
        assert part in result, part


def test_an_output_that_is_a_folder_is_reported_once(world):
    (world / "eval" / FILES[0]).mkdir(parents=True)
    result = problems_of(flags(world))
    assert "the output is a folder" in result
    assert "problems" not in result


def test_hidden_files_are_no_input(world, tmp_path):
    write_rows(tmp_path / "in" / "a.json", [sample("a")])
    (tmp_path / "in" / "._a.json").write_bytes(b"\0\5\x16\7")
    result = flags(world, "--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert inference.main(result, FakeBackend()) == 0
    assert list(results(tmp_path / "out")) == ["a.json"]


def test_every_script_that_a_message_names_is_there():
    sources = [*ROOT.glob("*.py")]
    for folder in ("eval", "data_utils", "finetune", "qwen_vl", "scripts"):
        sources += (ROOT / folder).rglob("*.py")
    named = {
        name
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in re.findall(r"(?<![\w/])(?:scripts|eval|finetune)/[\w/]+\.(?:py|sh)\b", node.value)
    }
    assert "scripts/download_data.sh" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_missing_images_may_be_skipped(world, capsys):
    path = world / "data/test/in-distribution/comment_test.json"
    write_rows(path, [sample("a", image="gone.png"), sample("b"), sample("c")])
    assert "gone.png" in problems_of(flags(world))
    assert inference.main(flags(world, "--missing_image", "skip", "--limit", 1), FakeBackend()) == 0
    assert "1 of 3 rows, 1 left out because their image is missing" in capsys.readouterr().out
    assert [row["id"] for row in json.loads((world / "eval" / FILES[0]).read_text())] == ["b"]
    (world / "images/gone.png").write_bytes(b"x")
    assert inference.main(flags(world), FakeBackend()) == 0
    assert [row["id"] for row in json.loads((world / "eval" / FILES[0]).read_text())] == ["a", "b", "c"]


def test_no_image_folder_is_not_skipped_over(world):
    assert "no such image folder" in problems_of(flags(world, "--image_dir", "nowhere", "--missing_image", "skip"))
    (world / "empty").mkdir()
    result = problems_of(flags(world, "--image_dir", world / "empty", "--missing_image", "skip"))
    assert "no row has its image" in result


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--model_path", "nowhere"], "no such checkpoint folder"),
        (["--use_lora"], "holds no adapter"),
        (["--data_root", "nowhere"], "the data root holds no test sets"),
        (["--agent", "../x"], "name of one folder"),
        (["--input_dir", "nowhere", "--output_dir", "out"], "no such input folder"),
        (["--input_dir", "."], "--input_dir needs --output_dir"),
        (["--output_dir", "out"], "--output_dir needs --input_dir"),
    ],
)
def test_flags_that_cannot_be_followed(world, more, expected):
    assert expected in problems_of([*flags(world), *more])
    assert not (world / "eval").exists()


def test_the_input_is_never_overwritten(world):
    folder = world / "data/test/in-distribution"
    arguments = flags(world, "--input_dir", folder, "--output_dir", folder, "--overwrite")
    assert "would overwrite the input" in problems_of(arguments)


def test_a_changed_input_is_refused(world):
    inference.main(flags(world), FakeBackend())
    write_rows(
        world / "data/test/in-distribution/comment_test.json", [sample("in-distribution_comment_0", system="new")]
    )
    assert "the input has changed" in problems_of(flags(world))


def test_a_second_process_is_refused(world):
    class Second(FakeBackend):
        def run(self, prompts):
            with pytest.raises(MMRoleError, match="another process is writing this journal"):
                inference.main(flags(world), FakeBackend())
            return super().run(prompts)

    assert inference.main(flags(world), Second()) == 0


def test_options_are_printed_and_saved(world, capsys):
    inference.main(flags(world, "--seed", 3), FakeBackend())
    assert f'image_dir: "{world / "images"}"' in capsys.readouterr().out
    journal = (world / "eval" / FILES[0]).with_suffix(".journal")
    header = json.loads(journal.read_text().splitlines()[0])
    assert header["info"]["options"]["seed"] == 3
    assert header["info"]["options"]["model_path"] == str(world / "model")
    assert header["settings"]["seed"] == 3


# ---- the real model


@pytest.mark.slow
def test_two_real_samples(shared, tiny_a, tmp_path):
    command = [sys.executable, ROOT / "inference.py", "--model_path", tiny_a, "--output_dir", tmp_path / "out"]
    command += ["--image_dir", shared / "mmrole_data/images", "--missing_image", "skip", "--limit", "2"]
    command += ["--input_dir", shared / "mmrole_data/data/test/in-distribution", "--input_file", "comment_test.json"]
    command += ["--max_new_tokens", "8", "--device", "cpu", "--dtype", "float32"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/comment_test.json").read_text())
    assert len(rows) == 2
    assert all(row["conversations"][1]["answer"] for row in rows)
    assert not list(Path(tmp_path).glob("*.ttf"))


def test_closed_images_are_reported_once_and_are_not_missing(world, monkeypatch):
    close(monkeypatch, world / "images")
    with pytest.raises(MMRoleError) as result:
        inference.main(flags(world), FakeBackend())
    assert str(result.value).count("cannot read: Permission denied") == 1
    assert "missing" not in str(result.value)


def test_a_closed_input_folder_is_not_an_empty_one(world, tmp_path, monkeypatch):
    close(monkeypatch, world / "data")
    with pytest.raises(MMRoleError, match="cannot read: Permission denied"):
        inference.main(flags(world, "--input_dir", world / "data", "--output_dir", tmp_path / "out"), FakeBackend())


def test_output_need_not_be_read(world):
    command = [sys.executable, "-u", "-m", "tests.fake_backend", *flags(world)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    run.stdout.close()
    assert run.wait() == 0
    assert sorted(results(world / "eval")) == sorted(FILES)


def test_an_output_folder_whose_name_is_no_utf_8(world, tmp_path, capsys):
    folder = os.fsdecode(bytes(tmp_path) + b"/g \xff")
    for more in (["--limit", "1"], []):
        words = flags(world, "--eval_dir", folder, *more)
        assert run_main(lambda words=words: inference.main(words, FakeBackend())) == 0
    assert sorted(results(Path(folder))) == sorted(FILES)
