"""Answering and judging through a scripted endpoint on loopback."""

import base64
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from data_utils.errors import MMRoleError
from eval import RM_review
from eval.backends.endpoint import QUESTION
from tests.conftest import ROOT
from tests.data_utils.loopback import SECRET, Reply, completion, refusal, serving, stay_at_home
from tests.eval.test_RM_review import make_answers
from tests.fake_backend import FakeBackend, make_world, results, sample, write_rows
from tests.processes import killed_at


@pytest.fixture
def site(monkeypatch):
    stay_at_home(monkeypatch)
    with serving() as found:
        found.chat = echo
        yield found


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path / "world")


def question(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def asked(site):
    """The requests for rows: those of the check for pictures come before."""
    return [body for body in site.chats if question(body) != QUESTION]


def echo(body, number):
    return f"{body['seed'] % 1000}: {question(body)}"


def flags(site, world, *more):
    result = ["--data_root", world, "--eval_dir", world / "eval", "--endpoint", f"{site.url}/v1", "--model", "Org/m:1"]
    return [str(word) for word in (*result, *more)]


def entries_of(world):
    lines = [line for path in world.rglob("*.journal") for line in path.read_text().splitlines()[1:]]
    return {line["key"]: line["value"] for line in map(json.loads, lines) if line["key"]}


def test_both_test_sets_are_answered(site, world, capsys):
    assert inference.main(flags(site, world, "--max_new_tokens", 9, "--temperature", 0.5)) == 0
    made = results(world / "eval")
    assert len(made) == 6 and all("-test_answers/Org-m-1/" in name for name in made)
    row = json.loads((world / "data/test/in-distribution/comment_test.json").read_text())[0]
    (body,) = [body for body in asked(site) if question(body) == row["conversations"][0]["value"]]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("Org/m:1", 9, 0.5)
    assert body["messages"][0] == {"role": "system", "content": row["system"]}
    url = body["messages"][1]["content"][0]["image_url"]["url"]
    assert (
        base64.b64decode(url.removeprefix("data:image/png;base64,")) == (world / "images" / row["image"]).read_bytes()
    )
    out = capsys.readouterr().out
    assert "served model m, 20 requests, 2,000 tokens" in out
    assert inference.main(flags(site, world, "--max_new_tokens", 9, "--temperature", 0.5)) == 0
    assert len(asked(site)) == 18
    with pytest.raises(MMRoleError, match="different settings"):
        inference.main(flags(site, world, "--max_new_tokens", 9))


def test_greedy(site, world):
    assert inference.main(flags(site, world, "--no_random", "--limit", 1)) == 0
    assert {body["temperature"] for body in asked(site)} == {0.0}


def test_what_the_model_refuses_is_recorded(site, world, capsys):
    unsupported = refusal(400, "Unsupported value: 'temperature'", param="temperature")
    site.chat = lambda body, number: unsupported if "temperature" in body else "fine"
    assert inference.main(flags(site, world, "--no_random")) == 0
    assert "temperature refused: left out" in capsys.readouterr().out
    assert {entry["without"] for entry in entries_of(world).values()} == {"temperature"}
    assert inference.main(flags(site, world, "--no_random")) == 0


def test_four_ends_are_kept_apart(site, world, capsys):
    def chat(body, number):
        if "in-distribution_comment_0" in question(body):
            return completion("as far as", finish="length")
        if "in-distribution_comment_1" in question(body):
            return completion("", refusal="I cannot.")
        if "in-distribution_comment_2" in question(body):
            return refusal(400, "no such thing")
        return "<think>hm</think> fine"

    site.chat = chat
    assert inference.main(flags(site, world)) == 1
    captured = capsys.readouterr()
    assert "3 of 3 rows, 1 cut off at the limit, 1 refused, 1 failed" in captured.out
    assert "no such thing" in captured.err
    entries = entries_of(world)
    cut, refused, failed = (entries[f"in-distribution_comment_{number}"] for number in range(3))
    assert (cut["text"], cut["cut"]) == ("as far as", True)
    assert (refused["text"], refused["refusal"]) == ("", "I cannot.")
    assert "status 400" in failed["error"] and "text" not in failed
    assert entries["in-distribution_human-role_0"]["text"] == "fine"
    assert entries["in-distribution_human-role_0"]["tokens"] == 100
    site.chats.clear()
    site.chat = echo
    assert inference.main(flags(site, world)) == 0
    assert len(asked(site)) == 1


def test_another_served_model_in_the_middle_ends_the_run(site, world):
    site.chat = lambda body, number: completion("x", model=f"m-{number % 2}")
    with pytest.raises(MMRoleError, match="another model is served now") as caught:
        inference.main(flags(site, world))
    assert set(caught.value.value) == {"m-0", "m-1"}
    assert len({entry["served"] for entry in entries_of(world).values()}) == 1


def test_another_served_model_goes_on_with_no_file(site, world):
    assert inference.main(flags(site, world, "--limit", 1)) == 0
    site.chat = lambda body, number: completion("x", model="m-2")
    with pytest.raises(MMRoleError, match="another model is served now") as caught:
        inference.main(flags(site, world))
    assert caught.value.value == ["m", "m-2"]
    assert len(entries_of(world)) == 6
    site.chat = echo
    assert inference.main(flags(site, world)) == 0


def test_a_budget_stops_and_the_next_run_goes_on(site, world, capsys):
    assert inference.main(flags(site, world, "--budget_tokens", 4000)) == 1
    captured = capsys.readouterr()
    assert "the budget of 4,000 tokens is spent" in captured.err
    assert "texts are missing" in captured.out
    count = len(asked(site))
    assert 0 < count < 18
    assert inference.main(flags(site, world)) == 0
    assert len(asked(site)) == 18


def answer(site, world):
    """Three answers, in one file."""
    return inference.main(flags(site, world, "--input_dir", world / "in", "--output_dir", world / "eval"))


def review(site, world):
    """The eight reviews of one answer."""
    return RM_review.main(flags(site, world, "--agent", "two"))


STAGES = {  # by the number of texts: writes of the journal (its first line comes with the first text) and of the file
    "while the first request is under way": None,
    "in the first text": lambda texts: 1,
    "in the middle": lambda texts: 1 + texts // 2,
    "in the last text": lambda texts: texts,
    "after the last text": lambda texts: 1 + texts,
    "in the file": lambda texts: 2 + texts,
    "before its renaming": lambda texts: 3 + texts,
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("run", "texts"), [(answer, 3), (review, 8)])
def test_killed_at_each_stage(site, tmp_path, run, texts, stage):
    made, child = [], multiprocessing.Value("i")
    site.chat = lambda body, number: f"{body['seed']} [Scores]: (8, 9)"
    for name in ("undisturbed", "killed"):
        world = make_answers(make_world(tmp_path / name))
        write_rows(world / "in/a.json", [sample(letter) for letter in "abc"])
        if name == "killed":
            reply, moment = site.chat, STAGES[stage]
            if moment is None:

                def kill(body, number, child=child):
                    if question(body) == QUESTION:
                        return "fine"
                    os.kill(child.value, signal.SIGKILL)
                    return Reply(fault="hang up")

                site.chat = kill

            def main(world=world):
                child.value = os.getpid()
                return run(site, world)

            assert killed_at(moment(texts) if moment else 0, main) == -signal.SIGKILL
            site.chat = reply
        assert run(site, world) == 0
        assert not list(world.rglob("*.tmp"))
        made.append(results(world / "eval"))
    assert made[0] == made[1] and len({path for path in made[0] if "answers" not in path}) == 1


def test_the_key_is_in_no_file_and_no_message(site, world, capfd):
    site.chat = lambda body, number: f"the key is {SECRET}" if number % 2 else refusal(400, f"not with {SECRET}")
    assert inference.main(flags(site, world)) == 1
    assert site.keys[0] == f"Bearer {SECRET}"
    assert not any(b"verysecret" in path.read_bytes() for path in world.rglob("*.*") if path.is_file())
    assert "verysecret" not in "".join(capfd.readouterr())
    assert SECRET not in Path(f"/proc/{os.getpid()}/cmdline").read_text()


@pytest.mark.parametrize(
    "error",
    [
        refusal(500, "image input is not supported - hint: you may need the mmproj"),  # llama.cpp
        refusal(422, "Input should be a valid string"),
        refusal(400, 'can only concatenate str (not "list") to str'),  # llama-cpp-python, with status 500
    ],
)
def test_a_model_that_takes_no_pictures_is_found_before_the_first_row(site, world, error):
    site.chat = lambda body, number: error if isinstance(body["messages"][-1]["content"], list) else "fine"
    with pytest.raises(MMRoleError, match="the model takes no pictures") as caught:
        inference.main(flags(site, world))
    assert error.body["error"]["message"] in caught.value.value
    assert not asked(site) and not results(world / "eval")


@pytest.mark.parametrize("tokens", [-10, 0, 200])
def test_a_server_that_drops_pictures_is_named(site, world, caplog, tokens):
    """llama-cpp-python drops a whole message with a picture in some chat formats."""

    def chat(body, number):
        return completion("fine", tokens=100 + tokens * isinstance(body["messages"][-1]["content"], list))

    site.chat = chat
    assert inference.main(flags(site, world)) == 0
    assert ("it may be dropped" in caplog.text) == (tokens <= 0)
    assert len(asked(site)) == 18 and len(site.chats) == 20


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--processes", "2"], "endpoints are used by one process"),
        (["--batch_size", "2", "--device", "cpu"], "--device"),
        (["--model_path", "model_weights"], "no checkpoint is loaded where an endpoint is used"),
        (["--no_random", "--top_p", "0.5"], "no effect in greedy decoding"),
        (["--agent", "a", "--input_dir", ".", "--output_dir", "out"], "--agent has no effect with --input_dir"),
        (["--model", ""], "the served model has no name"),
        (["--as_qwen_vl"], "needs the model's vocabulary"),
        (["--endpoint", "models.example"], "not the address of an endpoint"),
        (["--top_p", "2"], None),
    ],
)
def test_what_is_checked_before_anything_is_asked(site, world, more, message):
    with pytest.raises(MMRoleError if message else SystemExit) as caught:
        inference.main(flags(site, world, *more))
    assert message is None or message in str(caught.value)
    assert asked(site) == []


@pytest.mark.parametrize("main", [inference.main, RM_review.main])
def test_flags_of_endpoints_need_one(world, main):
    with pytest.raises(MMRoleError, match="flags of the backend endpoint have no effect here"):
        main(["--data_root", str(world), "--budget_tokens", "9"])


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("inference.sh", {"MODEL": "m"}, "--model"),
        (
            "eval/RM_review.sh",
            {"JUDGE_ENDPOINT": "http://127.0.0.1:9/v1", "MODEL_PATH": "x"},
            "no checkpoint is loaded",
        ),
    ],
)
def test_variables_without_effect_are_refused(world, script, variables, message):
    settings = {**os.environ, "VIRTUAL_ENV": sys.prefix, "DATA_ROOT": str(world), "EVAL_DIR": str(world), **variables}
    done = subprocess.run(["bash", ROOT / script], env=settings, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_as_qwen_vl_sends_its_picture_and_cuts_as_chat_does(site, world, tokenizer, tmp_path):
    picture = Image.new("RGBA", (30, 20), (200, 10, 10, 0))
    picture.save(world / "images/西游记/01.png")
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    ids = [*b" I am here"]

    def chat(body, number):
        reply = completion("as vLLM would cut it")
        if "comment_0" in question(body):
            reply.body["choices"][0]["token_ids"] = [*ids, tokenizer.im_end_id, 3]
        elif "comment_1" in question(body):
            reply.body["choices"][0]["token_ids"] = ids  # published: at the limit the last token is dropped
        return reply

    site.chat = chat
    more = ["--as_qwen_vl", "--model_path", tmp_path / "vocabulary", "--input_dir", world / "data/test/in-distribution"]
    more += ["--input_file", "comment_test.json", "--output_dir", tmp_path / "out"]
    assert inference.main(flags(site, world, *more)) == 1
    answers = [
        row["conversations"][1]["answer"] for row in json.loads((tmp_path / "out/comment_test.json").read_text())
    ]
    assert answers == ["I am here", "I am her", ""]
    assert "gives no token ids" in (tmp_path / "out/comment_test.journal").read_text()
    assert all(body["return_token_ids"] for body in asked(site))
    url = asked(site)[0]["messages"][1]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert (sent.size, sent.mode) == ((448, 448), "RGB")
    assert np.array(sent)[0, 0].tolist() == [200, 10, 10]


def test_a_picture_is_sent_upright(site, world):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(world / "images/a.jpg", exif=exif)
    write_rows(world / "in/a.json", [sample("a", image="a.jpg")])
    assert inference.main(flags(site, world, "--input_dir", world / "in", "--output_dir", world / "out")) == 0
    url = asked(site)[0]["messages"][1]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))).size == (20, 30)


# ---- judging


def good(body, number):
    return "Fine. [Scores]: (8, 9)"


def test_the_prompts_of_a_row_go_to_one_server(site, world):
    make_answers(world)
    site.chat = good
    with serving() as second:
        second.chat = good
        assert RM_review.main(flags(site, world, "--endpoint", f"{site.url}/v1", f"{second.url}/v1")) == 0
        answers = [{question(body).split("Model A's Response End")[0] for body in asked(one)} for one in (site, second)]
        assert len(asked(site)) == len(asked(second)) == 16
        assert all(len(body["messages"]) == 2 for body in asked(site))
    assert all(answers)


def test_the_place_of_a_judge(site, world, capsys):
    make_answers(world)
    site.chat = good
    assert RM_review.main(flags(site, world, "--agent", "two", "--judge", "gpt-x")) == 0
    assert RM_review.main(flags(site, world, "--agent", "two")) == 0
    made = {name: data for name, data in results(world / "eval").items() if "reviews" in name}
    assert sorted(made) == [
        "in-test_reviews/two/comment_test.json",
        "judges/gpt-x/in-test_reviews/two/comment_test.json",
    ]
    assert len(set(made.values())) == 1
    assert "same model" not in capsys.readouterr().out
    with pytest.raises(MMRoleError, match="name of one folder"):
        RM_review.main(flags(site, world, "--judge", "../x"))
    with pytest.raises(MMRoleError, match="--judge has no effect"):
        RM_review.main(flags(site, world, "--judge", "x", "--input_dir", world, "--output_dir", world / "out"))


def test_a_judge_that_reviews_its_own_answers_is_named(site, world, capsys):
    assert inference.main(flags(site, world, "--limit", 1)) == 0
    site.chat = good
    assert RM_review.main(flags(site, world)) == 0
    assert "the judge and the agent are the same model: Org-m-1" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["m", "other"])
def test_a_checkpoint_that_reviews_what_it_answered_when_served_is_named(site, world, capsys, folder):
    """The endpoint calls it by its folder's name, as vLLM does."""
    (world / "model").rename(world / folder)
    assert inference.main(flags(site, world, "--limit", 1)) == 0
    native = ["--data_root", world, "--eval_dir", world / "eval", "--model_path", world / folder]
    assert RM_review.main([str(word) for word in native], FakeBackend(lambda prompt: good(None, 1))) == 0
    assert ("the judge and the agent are the same model" in capsys.readouterr().out) == (folder == "m")


def test_unreadable_and_refused_reviews(site, world):
    make_answers(world)
    site.chat = lambda body, number: completion("", refusal="no") if "Fluency" in question(body) else "I like both."
    assert RM_review.main(flags(site, world, "--agent", "two", "--retries", 1)) == 1
    (row,) = json.loads((world / "eval/in-test_reviews/two/comment_test.json").read_text())
    assert row["rm_review"]["Fluency"]["failure"] == "refused: no"
    assert row["rm_review"]["Coherency"]["failure"] == "no [Scores] marker"
    assert len(asked(site)) == 16
