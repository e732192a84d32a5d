"""The engine gives what `chat()` gives one by one, however requests are batched, ordered or shared."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwen_vl import QwenVLForCausalLM, QwenVLTokenizer, generation
from qwen_vl.engine import engine as engine_module
from qwen_vl.engine.sampling import choose
from qwen_vl.engine.scheduler import Batch
from qwen_vl.generation import BatchGenerator, Request, Result
from tests.qwen_vl.conftest import small_model

WORDS = (
    "lamp",
    "speaks",
    "softly",
    "of",
    "rivers",
    "and",
    "stones",
    "while",
    "evening",
    "falls",
    "on",
    "quiet",
    "roofs",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    gradients = [Image.radial_gradient("L"), Image.linear_gradient("L")]
    for i, image in enumerate(gradients):
        image.convert("RGB").save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(gradients))]


def _text(length: int, seed: int) -> str:
    chooser = random.Random(seed)
    return " ".join(chooser.choice(WORDS) for _ in range(length))


@pytest.fixture(scope="module")
def requests(pictures: list[Path]) -> list[Request]:
    """Two rows of four reviews that share long prefixes, and six requests of every other sort."""
    shared = [
        Request(
            id=f"review {row}.{metric}",
            query=[
                {"image": pictures[row]},
                {"text": _text(60 + 40 * row, row) + f" Judge it: {_text(3, 90 + metric)}"},
            ],
            system="You judge.",
            seed=10 * row + metric,
            max_new_tokens=5 + 3 * metric,
        )
        for row in range(2)
        for metric in range(4)
    ]
    others = [
        Request(id="greedy", query="Hello", do_sample=False, max_new_tokens=20),
        Request(id="short", query="Hello", seed=3, max_new_tokens=1),
        Request(id="long", query=_text(120, 5), seed=4, top_p=0.9, max_new_tokens=12),
        Request(id="history", query="And?", history=[("Who?", "I.")], seed=5, temperature=1.5, top_k=5, top_p=1.0),
        Request(id="two pictures", query=[{"image": p} for p in pictures] + [{"text": "Which?"}], seed=6),
        Request(id="flat", query=_text(20, 8), seed=7, temperature=3.0, top_p=0.95, max_new_tokens=9),
    ]
    return shared + others


SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens")


@pytest.fixture(scope="module")
def expected(sampler: QwenVLForCausalLM, tokenizer: QwenVLTokenizer, requests: list[Request]) -> dict[str, str]:
    """One by one, by `chat()` after `torch.manual_seed`."""
    answers = {}
    for request in requests:
        given = {name: getattr(request, name) for name in SETTINGS if getattr(request, name) is not None}
        torch.manual_seed(request.seed)
        context = {"history": list(request.history), "system": request.system}
        answers[request.id], _ = sampler.chat(tokenizer, request.query, **context, **given)
    assert len(set(answers.values())) > len(answers) // 2
    return answers


def _answers(results: list[Result]) -> dict[str, str]:
    assert [r.error for r in results if r.error] == []
    return {result.id: result.text for result in results}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_prefixes": False},
        {"max_rows": 1},
        {"max_rows": 3, "prefill_tokens": 1},
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 1500, "window": 3},
    ],
    ids=str,
)
def test_same_as_one_by_one(sampler, tokenizer, requests, expected, options: dict) -> None:
    engine = BatchGenerator(sampler, tokenizer, **options)
    assert _answers(list(engine.run(requests))) == expected
    if not options:
        assert engine.statistics.prefill_saved > 0.3
        assert engine.statistics.images == 2
        assert engine.statistics.requests == len(requests)


@pytest.mark.parametrize("seed", range(3))
def test_order_does_not_matter(sampler, tokenizer, requests, expected, seed: int) -> None:
    shuffled = random.Random(seed).sample(requests, len(requests))
    assert _answers(list(BatchGenerator(sampler, tokenizer, max_rows=5).run(shuffled))) == expected


def test_more_requests_than_rows_flow_through(sampler, tokenizer, requests, expected) -> None:
    """Finished rows leave and waiting ones take their place; the iterable is read as it is needed."""
    taken = []

    def endless():
        for turn in range(4):
            for request in requests:
                taken.append(request.id)
                yield Request(**{**request.__dict__, "id": (turn, request.id)})

    engine = BatchGenerator(sampler, tokenizer, max_rows=6, window=5)
    results = []
    for result in engine.run(endless()):
        if not results:
            assert len(taken) <= 15
        results.append(result)
    assert {r.id: r.text for r in results} == {(t, name): text for t in range(4) for name, text in expected.items()}
    assert engine.statistics.peak_rows <= 6
    assert engine.statistics.mean_rows > 3


def test_bad_requests_fail_alone(sampler, tokenizer, requests, expected, pictures, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:300])
    bad = {
        "gone": Request(id="gone", query=[{"image": tmp_path / "gone.png"}, {"text": "Who?"}]),
        "broken": Request(id="broken", query=[{"image": tmp_path / "broken.png"}, {"text": "Who?"}]),
        "too long": Request(id="too long", query="long " * 2000),
        "unclosed": Request(id="unclosed", query="<img>a.png"),
        "settings": Request(id="settings", query="Hello", temperature=0.0),
        "limit": Request(id="limit", query="Hello", max_new_tokens=0),
        "no number": Request(id="no number", query="Hello", temperature=float("nan")),
        "half": Request(id="half", query="Hello", top_k=2.5),
        "seed": Request(id="seed", query="Hello", seed=2**70),
        "no picture": Request(id="no picture", query=[{"image": None}, {"text": "Who?"}]),
    }
    # one of a group that shares a prefix but for its picture
    results = {r.id: r for r in BatchGenerator(sampler, tokenizer).run([*bad.values(), *requests])}
    assert {name: results[name].text for name in expected} == expected
    messages = {"gone": r"gone.png", "broken": "broken.png", "too long": "8192 positions", "unclosed": "Unclosed"}
    messages |= {"settings": "temperature is 0.0", "limit": "max_new_tokens is 0", "no number": "temperature is nan"}
    messages |= {"half": "top_k is 2.5", "seed": "seed is 1180591620717411303424", "no picture": "TypeError"}
    for name, message in messages.items():
        assert results[name].text == ""
        assert message in results[name].error


@pytest.mark.parametrize("failures", [1, 3])
def test_out_of_memory_halves_and_goes_on(sampler, tokenizer, requests, expected, monkeypatch, failures: int) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)
    step, left = engine.forward.step, [failures]

    def failing(batch):
        if len(batch.sequences) > 3 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return step(batch)

    monkeypatch.setattr(engine.forward, "step", failing)
    assert _answers(list(engine.run(requests))) == expected
    assert engine.statistics.out_of_memory == failures
    assert engine.budget < 100_000


def test_out_of_memory_even_alone_is_one_failure(sampler, tokenizer, requests, monkeypatch) -> None:
    engine = BatchGenerator(sampler, tokenizer)
    prefill = engine.forward.prefill

    def failing(groups):
        if any(member.request.id == "long" for group in groups for member in group.members):
            raise torch.OutOfMemoryError("pretended")
        return prefill(groups)

    monkeypatch.setattr(engine.forward, "prefill", failing)
    results = {r.id: r for r in engine.run(requests)}
    assert results["long"].error == "out of memory, even alone"
    assert [r.id for r in results.values() if r.error] == ["long"]


def test_out_of_memory_with_nothing_in_flight_ends(sampler, tokenizer, requests, expected, monkeypatch) -> None:
    """A vision tower that never fits fails the requests that show something, and those alone."""
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)

    def failing(pixels):
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(engine.images, "encode", failing)
    results = {r.id: r for r in engine.run(requests)}
    assert {name for name, r in results.items() if r.error == "out of memory, even alone"} == {
        r.id for r in requests if not isinstance(r.query, str)
    }
    assert {name: r.text for name, r in results.items() if not r.error}.items() <= expected.items()


def test_failures_are_not_lost_to_an_out_of_memory_error(sampler, tokenizer, requests, expected, monkeypatch) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)
    prefill, left = engine.forward.prefill, [1]

    def failing(groups):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("pretended")
        return prefill(groups)

    monkeypatch.setattr(engine.forward, "prefill", failing)
    gone = Request(id="gone", query=[{"image": "gone.png"}, {"text": _text(300, 1)}])
    results = {r.id: r for r in engine.run([gone, *requests])}
    assert "gone.png" in results.pop("gone").error
    assert _answers(list(results.values())) == expected


@pytest.mark.parametrize("fails_at", [2, 3, 7])
def test_out_of_memory_after_the_layers_doubles_no_token(sampler, tokenizer, requests, expected, monkeypatch, fails_at):
    """The keys and values of a step are there when its head fails; the step is made again."""
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)
    head, calls = engine.forward.head, [0]

    def failing(hidden):
        calls[0] += 1
        if calls[0] == fails_at:
            raise torch.OutOfMemoryError("pretended")
        return head(hidden)

    monkeypatch.setattr(engine.forward, "head", failing)
    assert _answers(list(engine.run(requests))) == expected
    assert engine.statistics.out_of_memory == 1


def test_out_of_memory_for_a_newcomer_does_not_harm_running_requests(
    sampler, tokenizer, requests, expected, monkeypatch
) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)
    add, calls = Batch.add, [0]

    def failing(batch, *arguments):
        calls[0] += 1
        if batch.groups and calls[0] < 30:
            raise torch.OutOfMemoryError("pretended")
        return add(batch, *arguments)

    monkeypatch.setattr(Batch, "add", failing)
    assert _answers(list(engine.run(requests))) == expected
    assert engine.statistics.out_of_memory > 1


def test_out_of_memory_between_two_draws_changes_nothing(sampler, tokenizer, requests, expected, monkeypatch) -> None:
    """Some rows have drawn when the error comes: they draw the same again."""
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)
    calls = [0]

    def failing(logits, settings, draws, used):
        tokens = choose(logits, settings, draws, used)
        calls[0] += 1
        if calls[0] in (2, 4):
            raise torch.OutOfMemoryError("pretended")
        return tokens

    monkeypatch.setattr(engine_module, "choose", failing)
    assert _answers(list(engine.run(requests))) == expected
    assert engine.statistics.out_of_memory == 2


@pytest.mark.parametrize("do_sample", [True, False])
def test_logits_that_are_no_numbers_fail_their_request(sampler, tokenizer, monkeypatch, do_sample: bool) -> None:
    requests = [Request(id=i, query=f"Hello {i}", do_sample=do_sample, max_new_tokens=6, seed=i) for i in range(3)]
    expected = {r.id: r.text for r in BatchGenerator(sampler, tokenizer).run(requests)}
    engine = BatchGenerator(sampler, tokenizer)
    step = engine.forward.step

    def damaged(batch):
        logits = step(batch).clone()
        rows = [member.request.id for member in batch.sequences]
        if 1 in rows:
            logits[rows.index(1), 7] = torch.nan
        return logits

    monkeypatch.setattr(engine.forward, "step", damaged)
    results = {r.id: r for r in engine.run(requests)}
    assert "NaN" in results.pop(1).error
    assert {r.id: (r.text, r.error) for r in results.values()} == {i: (expected[i], None) for i in (0, 2)}


def test_other_runtime_errors_are_not_swallowed(sampler, tokenizer, requests, monkeypatch) -> None:
    engine = BatchGenerator(sampler, tokenizer)
    monkeypatch.setattr(engine.forward, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        list(engine.run(requests))


def test_stops_and_forced_lengths(tokenizer: QwenVLTokenizer, sampler) -> None:
    free = Request(id="free", query="Hello", do_sample=False, max_new_tokens=15, stop_ids=())
    [forced] = BatchGenerator(sampler, tokenizer).run([free])
    assert len(forced.token_ids) == 15
    stop = Request(id="stop", query="Hello", do_sample=False, max_new_tokens=15, stop_ids=[forced.token_ids[4]])
    [stopped] = BatchGenerator(sampler, tokenizer).run([stop])
    first = forced.token_ids.index(forced.token_ids[4])
    assert stopped.token_ids == forced.token_ids[: first + 1]


def test_answers_that_grow_stay_within_the_budget(sampler, tokenizer) -> None:
    """Longer than expected, all of them: some are sent back, and give what they would have given."""
    requests = [
        Request(id=i, query=_text(8 + i % 9, i), max_new_tokens=120, stop_ids=(), seed=i, top_p=0.9) for i in range(16)
    ]
    expected = list(BatchGenerator(sampler, tokenizer).run(requests))
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=2000)
    assert {r.id: r.token_ids for r in engine.run(requests)} == {r.id: r.token_ids for r in expected}
    assert engine.statistics.prompt_tokens > sum(r.prompt_tokens for r in expected)  # some were prefilled again
    assert engine.statistics.peak_cache_tokens <= 2000
    assert engine.statistics.mean_rows > 3


def test_images_of_many_groups_at_once(sampler, tokenizer, tmp_path: Path) -> None:
    """More pictures in one prefill than are kept: each group has its own until it needs them no more."""
    requests = []
    for i in range(12):
        Image.new("RGB", (4, 4), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        query = [{"image": tmp_path / f"{i}.png"}, {"text": "Who?"}]
        requests += [Request(id=(i, k), query=query, seed=k, max_new_tokens=2) for k in range(2)]
    expected = {
        r.id: r.text for r in BatchGenerator(sampler, tokenizer, share_prefixes=False, max_rows=1).run(requests)
    }
    engine = BatchGenerator(sampler, tokenizer)
    engine.images.kept = 3
    assert _answers(list(engine.run(requests))) == expected


def test_pictures_that_are_objects_are_not_taken_for_another(sampler, tokenizer) -> None:
    """Python gives the id of an object that is gone to the next one."""

    def requests():
        for i in range(20):
            picture = Image.new("RGB", (4, 4), (12 * i, 0, 255 - 12 * i))
            yield Request(id=i, query=[{"image": picture}, {"text": "Who?"}], do_sample=False, max_new_tokens=4)

    expected = {r.id: r.text for r in BatchGenerator(sampler, tokenizer).run(list(requests()))}
    assert {r.id: r.text for r in BatchGenerator(sampler, tokenizer, window=1).run(requests())} == expected


def test_no_more_rows_than_requested(sampler, tokenizer, requests, expected) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_rows=2)
    assert _answers(list(engine.run(requests))) == expected
    assert engine.statistics.peak_rows <= 2


def test_settings_that_the_engine_does_not_know_are_refused(tokenizer) -> None:
    model = small_model()
    model.generation_config.update(repetition_penalty=1.2)
    with pytest.raises(ValueError, match=r"asks for \{'repetition_penalty': 1.2\}"):
        BatchGenerator(model, tokenizer)


def test_top_k_that_nobody_gives_is_that_of_generate(tokenizer) -> None:
    model = small_model()
    model.generation_config.update(do_sample=True, top_p=1.0, top_k=None, max_new_tokens=12)
    requests = [Request(id=i, query=f"Hello {i}", seed=i, temperature=3.0) for i in range(6)]
    for result in BatchGenerator(model, tokenizer).run(requests):
        assert result.text == model.chat(tokenizer, f"Hello {result.id}", system=requests[0].system, seed=result.id,
                                         temperature=3.0)[0]  # fmt: skip


def test_memory_does_not_grow_with_the_requests(sampler, tokenizer) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_rows=4, window=8, max_batch_tokens=2000)
    many = (Request(id=i, query=_text(10 + i % 7, i), max_new_tokens=3) for i in range(120))
    assert sum(1 for _ in engine.run(many)) == 120
    assert engine.statistics.peak_cache_tokens <= 2000


def test_module_names_its_public_parts() -> None:
    assert {"BatchGenerator", "Request", "Result"} <= set(dir(generation))
