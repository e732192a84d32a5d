"""The engine as a server uses it: requests come and go while others run."""

import random

import pytest
import torch
from PIL import Image

from qwen_vl.engine.requests import TextStream
from qwen_vl.generation import BatchGenerator, Event, Request, Result


def _drain(engine: BatchGenerator) -> list[Event]:
    events = []
    while engine.unfinished:
        events += engine.step()
    return events


def _results(events: list[Event]) -> dict[object, Result]:
    return {event.id: event.result for event in events if event.result}


@pytest.fixture(scope="module")
def requests(words) -> list[Request]:
    """Some share a prefix, some do not; short and long, sampled and greedy."""
    shared = [
        Request(id=f"s{i}", query=words(60, 1) + f" {i}", seed=i, max_new_tokens=4 + 3 * i, top_p=0.9) for i in range(5)
    ]
    lone = [
        Request(id=f"l{i}", query=words(5 + 9 * i, 10 + i), seed=i, max_new_tokens=6 + 20 * (i % 3), stop_ids=())
        for i in range(5)
    ]
    return [*shared, *lone, Request(id="greedy", query="Hello", do_sample=False, max_new_tokens=20)]


@pytest.fixture(scope="module")
def expected(sampler, tokenizer, requests) -> dict[object, Result]:
    """Each alone in an engine of its own; `test_generation` compares that with `chat()`."""
    return {r.id: next(BatchGenerator(sampler, tokenizer).run([r])) for r in requests}


def test_events_of_a_request(sampler, tokenizer, requests, expected) -> None:
    engine = BatchGenerator(sampler, tokenizer)
    for request in requests:
        engine.add_request(request)
    assert engine.unfinished == len(requests)
    events = _drain(engine)
    assert engine.step() == []
    for name, result in expected.items():
        own = [event for event in events if event.id == name]
        assert [event.token_id for event in own] == list(result.token_ids)
        assert "".join(event.text for event in own) == result.text
        assert [event.result for event in own] == [None] * (len(own) - 1) + [result]
    assert sum(event.text != "" for event in events) > len(requests) * 2


def test_requests_that_join_and_leave_in_the_middle(sampler, tokenizer, requests, expected) -> None:
    chooser = random.Random(0)
    engine = BatchGenerator(sampler, tokenizer, max_rows=6)
    waiting, events, aborted = requests * 2, [], set()
    waiting = [Request(**{**r.__dict__, "id": (i, r.id)}) for i, r in enumerate(waiting)]
    chooser.shuffle(waiting)
    steps = 0
    while waiting or engine.unfinished:
        steps += 1
        if waiting and steps % 2:
            engine.add_request(waiting.pop())
        latest = engine.step()
        events += latest
        running = [event.id for event in latest if not event.result]
        if steps % 9 == 0 and running:
            assert engine.abort(running[0])
            aborted.add(running[0])
    results = _results(events)
    assert 3 < len(aborted) < len(requests)
    assert results.keys() == {(i, r.id) for i, r in enumerate(requests * 2)} - aborted
    for (i, name), result in results.items():
        assert result == Result(**{**expected[name].__dict__, "id": (i, name)})


def test_abort_before_during_and_after(sampler, tokenizer, requests, expected) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_rows=2)
    long = [r for r in requests if r.id in ("l2", "greedy", "s4", "s3")]
    for request in long:
        engine.add_request(request)
    assert engine.abort("s3")  # has not been looked at
    events = engine.step()
    gone = events[0].id
    assert engine.abort(gone)  # in flight
    waiting = next(r.id for r in long if r.id not in {e.id for e in events} | {"s3"})
    assert engine.abort(waiting)  # in a group
    assert engine.unfinished == 1
    rest = _drain(engine)
    assert {event.id for event in rest} == {r.id for r in long} - {"s3", gone, waiting}
    assert not engine.abort(gone)
    assert not engine.abort("never there")
    assert engine.batch.tokens == 0  # all memory is given back
    for name, result in _results(rest).items():
        assert result == expected[name]


def test_finish_reasons(sampler, tokenizer, tmp_path) -> None:
    [free] = BatchGenerator(sampler, tokenizer).run([Request(id=0, query="Hi", stop_ids=(), max_new_tokens=30)])
    engine = BatchGenerator(sampler, tokenizer)
    engine.add_request(Request(id="length", query="Hi", stop_ids=(), max_new_tokens=5))
    engine.add_request(Request(id="stop", query="Hi", stop_ids=[free.token_ids[3]], max_new_tokens=30))
    engine.add_request(Request(id="error", query=[{"image": tmp_path / "gone.png"}, {"text": "Hi"}]))
    results = _results(_drain(engine))
    assert {name: result.finish_reason for name, result in results.items()} == {n: n for n in results}
    assert results.keys() == {"length", "stop", "error"}
    assert "gone.png" in results["error"].error


def test_what_cannot_be_answered_is_refused_at_once(sampler, tokenizer) -> None:
    engine = BatchGenerator(sampler, tokenizer)
    for changes, message in [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"query": "long " * 2000}, "8192 positions"),
        ({"stop": "text"}, "stop is 'text'"),
        ({"stop": [""]}, "stop is"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.add_request(Request(**{"id": 0, "query": "Hello", **changes}))
    assert engine.unfinished == 0


def test_run_leaves_nothing_behind_and_wants_the_engine_alone(sampler, tokenizer, requests, expected) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_rows=4)
    running = engine.run(requests)
    next(running)
    with pytest.raises(RuntimeError, match="without other requests"):
        next(engine.run(requests))
    running.close()
    assert engine.unfinished == engine.batch.tokens == 0
    assert {r.id: r for r in engine.run(requests)} == expected


@pytest.mark.parametrize("length", range(1, 4))
def test_stop_texts(sampler, tokenizer, length: int) -> None:
    """The answer ends before the first of them, and no part of one is ever streamed."""
    free = Request(id=0, query="Hi", seed=5, top_p=1.0, temperature=3.0, stop_ids=(), max_new_tokens=60)
    [whole] = BatchGenerator(sampler, tokenizer).run([free])
    for start in range(1, 30, 4):
        stop = whole.text[start : start + length]
        engine = BatchGenerator(sampler, tokenizer)
        engine.add_request(Request(**{**free.__dict__, "stop": ["never comes", stop]}))
        events = _drain(engine)
        result = events[-1].result
        assert result.text == whole.text[: whole.text.index(stop)].rstrip()
        assert "".join(event.text for event in events) == result.text
        assert result.finish_reason == "stop"
        assert len(result.token_ids) < len(whole.token_ids)


@pytest.mark.parametrize("seed", range(40))
def test_streamed_text_is_the_text(tokenizer, seed: int) -> None:
    """Of any tokens: halves of characters, blanks, image spans whole and broken, ids without a token, early ends."""
    chooser = random.Random(seed)
    span = tokenizer.image_span(b"a.png")
    pieces = [list("Wörter 文字 🎈 \n ".encode()), [255], [0xF0, 0x9F], span, span[:9], [tokenizer.img_start_id], [300]]
    pieces += [[tokenizer.img_end_id], [tokenizer.eod_id], [tokenizer.im_end_id], [500], list(b"  "), list(b"done")]
    ids = [i for piece in chooser.choices(pieces, k=9) for i in piece]
    stream = TextStream(tokenizer)
    given = [stream.push(i) for i in ids]
    text, rest = stream.finish(ids)
    assert "".join(given) + rest == text
    for cut in range(1, len(ids), 7):  # it may have ended anywhere
        shorter = TextStream(tokenizer)
        before = "".join([shorter.push(i) for i in ids[:cut]])
        text, rest = shorter.finish(ids[:cut])
        assert before + rest == text


def test_text_comes_as_soon_as_it_is_certain(tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in " aé b".encode()] == ["", "", "a", "", "é", ""]
    assert stream.finish([*" aé b".encode(), tokenizer.im_end_id]) == ("aé b", " b")


def test_a_request_that_fails_leaves_nothing_to_its_successor(sampler, tokenizer) -> None:
    """The letter q has an embedding that is no number; its keys must not reach the others."""
    texts = {"a": "a" * 20, "q": "q" * 20, "b": "b"}  # b, the last and shorter, is moved to the place of q, beside a
    requests = [
        Request(id=name, query=text, do_sample=False, max_new_tokens=12, stop_ids=()) for name, text in texts.items()
    ]
    expected = {r.id: next(BatchGenerator(sampler, tokenizer).run([r])) for r in requests}
    weight = sampler.transformer.wte.weight.data[ord("q")]
    kept = weight.clone()
    try:
        weight.fill_(torch.nan)
        results = {r.id: r for r in BatchGenerator(sampler, tokenizer).run(requests)}
    finally:
        weight.copy_(kept)
    assert "NaN" in results["q"].error
    assert results["q"].finish_reason == "error"
    assert (results["a"], results["b"]) == (expected["a"], expected["b"])


def test_image_features_keep_no_other_image_alive(sampler, tokenizer) -> None:
    engine = BatchGenerator(sampler, tokenizer)
    pictures = [Image.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(4)]
    list(
        engine.run(
            Request(id=i, query=[{"image": p}, {"text": "Who?"}], max_new_tokens=2) for i, p in enumerate(pictures)
        )
    )
    features, _ = engine.images.of(pictures)
    assert engine.images.encoded == 4
    for feature in features.values():
        assert feature.untyped_storage().nbytes() == feature.nbytes


@pytest.mark.parametrize("rows", [1, 3, 4, 12, 13, 48, 49])
def test_logits_of_any_number_of_rows(sampler, tokenizer, rows: int) -> None:
    forward = BatchGenerator(sampler, tokenizer).forward
    hidden = torch.randn(rows, sampler.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = forward.head(hidden)
        assert logits.shape == (rows, sampler.config.vocab_size)
        assert torch.allclose(logits, sampler.lm_head(hidden), atol=1e-5)
