"""Answering and judging through a scripted endpoint on loopback."""

import base64
import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from data_utils.errors import MMRoleError
from eval import RM_review
from tests.data_utils.loopback import SECRET, completion, refusal, serving, stay_at_home
from tests.eval.test_RM_review import make_answers
from tests.fake_backend import make_world, results, sample, write_rows
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
    (body,) = [body for body in site.chats if question(body) == row["conversations"][0]["value"]]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("Org/m:1", 9, 0.5)
    assert body["messages"][0] == {"role": "system", "content": row["system"]}
    url = body["messages"][1]["content"][0]["image_url"]["url"]
    assert (
        base64.b64decode(url.removeprefix("data:image/png;base64,")) == (world / "images" / row["image"]).read_bytes()
    )
    out = capsys.readouterr().out
    assert "served model m, 18 requests, 1,800 tokens" in out
    assert inference.main(flags(site, world, "--max_new_tokens", 9, "--temperature", 0.5)) == 0
    assert len(site.chats) == 18
    with pytest.raises(MMRoleError, match="different settings"):
        inference.main(flags(site, world, "--max_new_tokens", 9))


def test_greedy(site, world):
    assert inference.main(flags(site, world, "--no_random", "--limit", 1)) == 0
    assert {body["temperature"] for body in site.chats} == {0.0}


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
    assert len(site.chats) == 1


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
    asked = len(site.chats)
    assert 0 < asked < 18
    assert inference.main(flags(site, world)) == 0
    assert len(site.chats) == 18


@pytest.mark.parametrize("moment", [6, 12, 30])
def test_killed_at_each_stage(site, world, tmp_path, moment):
    other = make_world(tmp_path / "other")
    assert inference.main(flags(site, other)) == 0
    assert killed_at(moment, lambda: inference.main(flags(site, world))) == -signal.SIGKILL
    assert inference.main(flags(site, world)) == 0
    assert results(world / "eval") == results(other / "eval")


def test_the_key_is_in_no_file_and_no_message(site, world, capfd):
    site.chat = lambda body, number: f"the key is {SECRET}" if number % 2 else refusal(400, f"not with {SECRET}")
    assert inference.main(flags(site, world)) == 1
    assert site.keys[0] == f"Bearer {SECRET}"
    assert not any(b"verysecret" in path.read_bytes() for path in world.rglob("*.*") if path.is_file())
    assert "verysecret" not in "".join(capfd.readouterr())
    assert SECRET not in Path(f"/proc/{os.getpid()}/cmdline").read_text()


def test_a_model_without_eyes(site, world):
    site.chat = lambda body, number: refusal(500, "image input is not supported - hint: you may need the mmproj")
    with pytest.raises(MMRoleError, match="the model takes no pictures"):
        inference.main(flags(site, world))
    assert not results(world / "eval")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--processes", "2"], "endpoints are used by one process"),
        (["--batch_size", "2", "--device", "cpu"], "--device"),
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
    assert site.chats == []


def test_flags_of_endpoints_need_one(site, world):
    with pytest.raises(MMRoleError, match="flags of the backend endpoint have no effect here"):
        inference.main(["--data_root", str(world), "--budget_tokens", "9"])


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
    assert all(body["return_token_ids"] for body in site.chats)
    url = site.chats[0]["messages"][1]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert (sent.size, sent.mode) == ((448, 448), "RGB")
    assert np.array(sent)[0, 0].tolist() == [200, 10, 10]


def test_a_picture_is_sent_upright(site, world):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(world / "images/a.jpg", exif=exif)
    write_rows(world / "in/a.json", [sample("a", image="a.jpg")])
    assert inference.main(flags(site, world, "--input_dir", world / "in", "--output_dir", world / "out")) == 0
    url = site.chats[0]["messages"][1]["content"][0]["image_url"]["url"]
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
        answers = [{question(body).split("Model A's Response End")[0] for body in one.chats} for one in (site, second)]
        assert len(site.chats) == len(second.chats) == 16
        assert all(len(body["messages"]) == 2 for body in site.chats)
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


def test_unreadable_and_refused_reviews(site, world):
    make_answers(world)
    site.chat = lambda body, number: completion("", refusal="no") if "Fluency" in question(body) else "I like both."
    assert RM_review.main(flags(site, world, "--agent", "two", "--retries", 1)) == 1
    (row,) = json.loads((world / "eval/in-test_reviews/two/comment_test.json").read_text())
    assert row["rm_review"]["Fluency"]["failure"] == "refused: no"
    assert row["rm_review"]["Coherency"]["failure"] == "no [Scores] marker"
    assert len(site.chats) == 16
