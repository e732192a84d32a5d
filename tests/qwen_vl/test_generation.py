"""The engine gives what `chat()` gives one by one, however requests are batched, ordered or shared."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl import QwenVLForCausalLM, QwenVLTokenizer, generation
from qwen_vl.engine import engine as engine_module
from qwen_vl.engine.sampling import RequestGenerator, SamplingSettings, choose
from qwen_vl.engine.scheduler import Flight, common_prefix, group_by_prefix
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
def sampler() -> QwenVLForCausalLM:
    """A model whose own settings sample; its training length lies between the requests' lengths."""
    model = small_model(seq_length=200)
    model.generation_config.update(do_sample=True, top_p=0.5, top_k=0, max_new_tokens=8)
    return model


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
    step, steps, left = engine._forward.step, [], [failures]

    def failing(blocks):
        rows = sum(len(block.held_rows) for block in blocks)
        steps.append(rows)
        if rows > 3 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return step(blocks)

    monkeypatch.setattr(engine._forward, "step", failing)
    assert _answers(list(engine.run(requests))) == expected
    assert engine.statistics.out_of_memory == failures
    assert engine.max_batch_tokens < 100_000


def test_out_of_memory_even_alone_is_one_failure(sampler, tokenizer, requests, monkeypatch) -> None:
    engine = BatchGenerator(sampler, tokenizer)
    prefixes = engine._forward.prefixes

    def failing(groups):
        if any(row.request.id == "long" for group in groups for row in group.members):
            raise torch.OutOfMemoryError("pretended")
        return prefixes(groups)

    monkeypatch.setattr(engine._forward, "prefixes", failing)
    results = {r.id: r for r in engine.run(requests)}
    assert results["long"].error == "out of memory, even alone"
    assert [r.id for r in results.values() if r.error] == ["long"]


def test_out_of_memory_with_nothing_in_flight_ends(sampler, tokenizer, requests, expected, monkeypatch) -> None:
    """A vision tower that never fits fails the requests that show something, and those alone."""
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)

    def failing(pixels):
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(engine._images, "encode", failing)
    results = {r.id: r for r in engine.run(requests)}
    assert {name for name, r in results.items() if r.error == "out of memory, even alone"} == {
        r.id for r in requests if not isinstance(r.query, str)
    }
    assert {name: r.text for name, r in results.items() if not r.error}.items() <= expected.items()


def test_failures_are_not_lost_to_an_out_of_memory_error(sampler, tokenizer, requests, expected, monkeypatch) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)
    prefixes, left = engine._forward.prefixes, [1]

    def failing(groups):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("pretended")
        return prefixes(groups)

    monkeypatch.setattr(engine._forward, "prefixes", failing)
    gone = Request(id="gone", query=[{"image": "gone.png"}, {"text": _text(300, 1)}])
    results = {r.id: r for r in engine.run([gone, *requests])}
    assert "gone.png" in results.pop("gone").error
    assert _answers(list(results.values())) == expected


@pytest.mark.parametrize("fails_at", [2, 3, 7])
def test_out_of_memory_after_the_layers_doubles_no_token(sampler, tokenizer, requests, expected, monkeypatch, fails_at):
    """The keys and values of a step are there when its head fails; the step is made again."""
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)
    head, calls = engine._forward._head, [0]

    def failing(hidden):
        calls[0] += 1
        if calls[0] == fails_at:
            raise torch.OutOfMemoryError("pretended")
        return head(hidden)

    monkeypatch.setattr(engine._forward, "_head", failing)
    assert _answers(list(engine.run(requests))) == expected
    assert engine.statistics.out_of_memory == 1


def test_out_of_memory_for_a_newcomer_is_not_the_fault_of_who_is_in_flight(
    sampler, tokenizer, requests, expected, monkeypatch
) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)
    place, calls = Flight.place, [0]

    def failing(flight, *arguments):
        calls[0] += 1
        if flight.groups and calls[0] < 30:
            raise torch.OutOfMemoryError("pretended")
        return place(flight, *arguments)

    monkeypatch.setattr(Flight, "place", failing)
    assert _answers(list(engine.run(requests))) == expected
    assert engine.statistics.out_of_memory > 1


def test_out_of_memory_between_two_draws_changes_nothing(sampler, tokenizer, requests, expected, monkeypatch) -> None:
    """Some rows have drawn when the error comes: they draw the same again."""
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=100_000)
    calls = [0]

    def failing(logits, settings, generators, used):
        tokens = choose(logits, settings, generators, used)
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
    step = engine._forward.step

    def damaged(blocks):
        logits = step(blocks).clone()
        rows = [row.request.id for block in blocks for _, row in block.held_rows]
        if 1 in rows:
            logits[rows.index(1), 7] = torch.nan
        return logits

    monkeypatch.setattr(engine._forward, "step", damaged)
    results = {r.id: r for r in engine.run(requests)}
    assert "NaN" in results.pop(1).error
    assert {r.id: (r.text, r.error) for r in results.values()} == {i: (expected[i], None) for i in (0, 2)}


def test_other_runtime_errors_are_not_swallowed(sampler, tokenizer, requests, monkeypatch) -> None:
    engine = BatchGenerator(sampler, tokenizer)
    monkeypatch.setattr(engine._forward, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
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
        Request(id=i, query=_text(8 + i % 9, i), max_new_tokens=200, stop_ids=(), seed=i, top_p=0.9) for i in range(24)
    ]
    expected = {r.id: r.token_ids for r in BatchGenerator(sampler, tokenizer).run(requests)}
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=2500)
    back = []
    send_back = engine._send_back
    engine._send_back = lambda flight, rows: (back.extend(rows), send_back(flight, rows))
    assert {r.id: r.token_ids for r in engine.run(requests)} == expected
    assert back
    assert engine.statistics.peak_cache_tokens <= 2500
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
    engine._images.kept = 3
    assert _answers(list(engine.run(requests))) == expected


def test_pictures_that_are_objects_are_not_taken_for_another(sampler, tokenizer) -> None:
    """Python gives the id of an object that is gone to the next one."""

    def requests():
        for i in range(20):
            picture = Image.new("RGB", (4, 4), (12 * i, 0, 255 - 12 * i))
            yield Request(id=i, query=[{"image": picture}, {"text": "Who?"}], do_sample=False, max_new_tokens=4)

    expected = {r.id: r.text for r in BatchGenerator(sampler, tokenizer).run(list(requests()))}
    assert {r.id: r.text for r in BatchGenerator(sampler, tokenizer, window=1).run(requests())} == expected


def test_no_more_rows_than_asked_for(sampler, tokenizer, requests, expected) -> None:
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


class TestPrefixes:
    def test_reviews_of_rows(self) -> None:
        rows = [np.arange(1000 * row, 1000 * row + 300) for row in range(3)]
        prompts = [np.concatenate([rows[i % 3], [-i, 7, 7]]) for i in range(24)]
        groups = group_by_prefix(prompts, [1.0] * 24)
        assert sorted(group.shared for group in groups) == [300] * 3
        assert sorted(i for group in groups for i in group.members) == list(range(24))

    def test_each_prompt_once_and_prefixes_are_common(self) -> None:
        chooser = random.Random(0)
        prompts = [
            np.array(
                [0] * chooser.choice([0, 40, 80]) + [chooser.randrange(3) for _ in range(chooser.randrange(1, 60))]
            )
            for _ in range(200)
        ]
        kinds = [float(chooser.randrange(2)) for _ in prompts]
        groups = group_by_prefix(prompts, kinds)
        assert sorted(i for group in groups for i in group.members) == list(range(200))
        for group in groups:
            first = prompts[group.members[0]]
            assert len({kinds[i] for i in group.members}) == 1
            for i in group.members[1:]:
                assert common_prefix(first, prompts[i]) >= group.shared
                assert group.shared < len(prompts[i])

    def test_equal_prompts_leave_a_token_each(self) -> None:
        [group] = group_by_prefix([np.arange(100)] * 3, [1.0] * 3)
        assert group.shared == 99

    def test_little_in_common_is_not_shared(self) -> None:
        prompts = [np.array([1] * 20 + [i] * 50) for i in range(2, 5)]
        assert [g.members for g in group_by_prefix(prompts, [1.0] * 3)] == [(0,), (1,), (2,)]

    def test_a_small_part_of_long_prompts_is_not_shared(self) -> None:
        """As a system message: to save a little, rows of all lengths would lie beside each other."""
        prompts = [np.array([1] * 40 + [i] * 500) for i in range(2, 5)]
        assert [g.members for g in group_by_prefix(prompts, [1.0] * 3)] == [(0,), (1,), (2,)]

    def test_a_long_prefix_is_not_given_up_for_a_short_one(self) -> None:
        near = [np.array([1] * 90 + [2] * 500 + [i]) for i in range(3, 7)]
        far = [np.array([1] * 90 + [9] * 500 + [i]) for i in range(3, 7)]
        assert sorted(g.shared for g in group_by_prefix(near + far, [1.0] * 8)) == [590, 590]


class TestSampling:
    """`choose` against transformers' processors and `torch.multinomial`, over many shapes of distributions."""

    @pytest.mark.parametrize("spread", [0.3, 1.0, 3.0, 10.0])
    @pytest.mark.parametrize(
        "settings", [{"top_p": 0.3}, {"top_p": 0.95}, {"top_k": 7, "top_p": 0.8}, {"temperature": 0.7}]
    )
    def test_as_transformers(self, sampler, spread: float, settings: dict) -> None:
        vocabulary, used, rows = 3000, 2950, 40
        generator = torch.Generator().manual_seed(int(spread * 10))
        logits = torch.randn(rows, vocabulary, generator=generator) * spread
        logits[3, 100:110] = logits[3].max()  # ties
        setting = SamplingSettings(**settings)
        sources = [RequestGenerator(seed, torch.device("cpu")) for seed in range(rows)]
        for draw in range(3):
            chosen = choose(logits, [setting] * rows, sources, used)
            expected = [_reference(logits[row], setting, used, seed=row, draw=draw) for row in range(rows)]
            assert chosen == expected

    def test_rows_of_different_temperatures(self) -> None:
        logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1)) * 4
        settings = [SamplingSettings(temperature=t, top_p=0.8) for t in (0.5, 1.0, 1.0, 2.0, 1.5, 1.0)]
        settings[1] = SamplingSettings(do_sample=False)
        sources = [RequestGenerator(seed, torch.device("cpu")) for seed in range(6)]
        chosen = choose(logits, settings, sources, 2950)
        for row in (0, 2, 3, 4, 5):
            assert chosen[row] == _reference(logits[row], settings[row], 2950, seed=row, draw=0)
        assert chosen[1] == logits[1, :2950].argmax()

    def test_greedy_and_sampled_rows_together(self) -> None:
        logits = torch.zeros(2, 50)
        logits[:, 45] = 9  # has no token
        logits[:, 7] = 5
        greedy = SamplingSettings(do_sample=False)
        sources = [RequestGenerator(0, torch.device("cpu")) for _ in range(2)]
        tokens = choose(logits, [greedy, SamplingSettings(top_p=0.1)], sources, 40)
        assert tokens == [7, 7]


def _reference(row: torch.Tensor, setting: SamplingSettings, used: int, *, seed: int, draw: int) -> int:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = row[None].clone()
    scores[:, used:] = -torch.inf
    if setting.temperature != 1:
        scores = TemperatureLogitsWarper(setting.temperature)(None, scores)
    if setting.top_k:
        scores = TopKLogitsWarper(setting.top_k)(None, scores)
    if setting.top_p < 1:
        scores = TopPLogitsWarper(setting.top_p)(None, scores)
    torch.manual_seed(seed)
    token = None
    for _ in range(draw + 1):
        token = torch.multinomial(scores.softmax(-1), 1).item()
    return token


def test_module_names_its_public_parts() -> None:
    assert {"BatchGenerator", "Request", "Result"} <= set(dir(generation))
