"""Memory is what is counted, stays within the budget, and comes back."""

import weakref

import pytest
import torch

from qwen_vl.engine import cache as cache_module
from qwen_vl.engine.cache import Cache
from qwen_vl.generation import BatchGenerator, Request

LAYERS, HEADS, WIDTH = 2, 3, 4


def _fill(entry, value: float, length: int) -> None:
    entry.length = length
    for layer in range(LAYERS):
        filled = torch.full((HEADS, length, WIDTH), value + layer)
        entry.write(layer, filled[None], -filled[None])


def test_entries_keep_what_they_hold_and_freed_places_hold_zeros() -> None:
    cache = Cache(LAYERS, HEADS, WIDTH, torch.float32, torch.device("cpu"))
    entries = [cache.add(10, 4, 10_000, 10_000, must=False) for _ in range(4)]
    assert len(cache.blocks) == 1
    for i, entry in enumerate(entries):
        _fill(entry, 10 * i + 1, 3 + 2 * i)
    cache.free(entries.pop(1))
    cache.free(entries.pop())
    [block] = cache.blocks
    assert block.entries == [entries[0], entries[1]]
    for entry, i in zip(entries, (0, 2), strict=True):
        for layer in range(LAYERS):
            keys, values = block.data[layer, :, entry.place]
            assert torch.equal(keys[:, : entry.length], torch.full_like(keys[:, : entry.length], 10 * i + 1 + layer))
            assert torch.equal(values[:, : entry.length], -keys[:, : entry.length])
            assert not keys[:, entry.length :].any()
            assert not values[:, entry.length :].any()
    assert not block.data[:, :, 2:].any()
    cache.free(entries[0])
    cache.free(entries[1])
    assert cache.blocks == []
    assert cache.tokens == 0


def test_the_smallest_place_that_is_large_enough_is_taken_before_memory() -> None:
    cache = Cache(LAYERS, HEADS, WIDTH, torch.float32, torch.device("cpu"))
    short = cache.add(60, 2, 8 * 1280, 2000, must=False)
    long = cache.add(600, 2, 8 * 1280, 2000, must=False)
    assert long.block is not short.block
    assert cache.add(50, 9, 8 * 1280, 2000, must=False).block is short.block
    assert cache.add(50, 9, 8 * 1280, 2000, must=False).block is long.block
    assert cache.add(60, 9, 8 * 1280, 0, must=False) is None
    assert cache.add(60, 9, 8 * 1280, 0, must=True) is not None


def test_entries_of_about_one_length_are_read_together() -> None:
    cache = Cache(LAYERS, HEADS, WIDTH, torch.float32, torch.device("cpu"))
    for length in (90, 85, 40, 38, 41, 100):
        cache.add(100, 6, 10_000, 10_000, must=False).length = length
    [block] = cache.blocks

    def lengths(call: int) -> list[list[int]]:
        stretches = list(block.stretches(call))
        assert [data.shape[2] for data, _ in stretches] == [len(entries) for _, entries in stretches]
        places = torch.cat([data for data, _ in stretches], dim=2)
        assert torch.equal(places, block.data[:, :, : len(block.entries)])
        return [[entry.length for entry in entries] for _, entries in stretches]

    assert lengths(0) == [[90], [85], [40], [38], [41], [100]]
    assert lengths(10) == [[90, 85], [40, 38, 41], [100]]
    assert lengths(1000) == [[90, 85, 40, 38, 41, 100]]


@pytest.mark.parametrize("call", [0, 2**30])
def test_how_entries_are_read_changes_no_answer(call: int, sampler, tokenizer, words, monkeypatch) -> None:
    requests = [Request(id=i, query=words(3 + 7 * i, i), max_new_tokens=20, stop_ids=(), seed=i) for i in range(6)]
    expected = sorted(BatchGenerator(sampler, tokenizer).run(requests), key=lambda r: r.id)
    monkeypatch.setattr(cache_module, "CALL_BYTES", call)
    assert sorted(BatchGenerator(sampler, tokenizer).run(requests), key=lambda r: r.id) == expected


def test_memory_is_what_is_counted(sampler, tokenizer, words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that grow far beyond what was expected: at no moment is there more than the budget."""
    blocks: weakref.WeakSet[cache_module.Block] = weakref.WeakSet()
    most = []

    class Watched(cache_module.Block):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            blocks.add(self)
            most.append(sum(block.data.nbytes for block in blocks))

    monkeypatch.setattr(cache_module, "Block", Watched)
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=2000)
    requests = [Request(id=i, query=words(8 + i, i), max_new_tokens=150, stop_ids=(), seed=i) for i in range(8)]
    results = list(engine.run(requests))
    assert [r.error for r in results] == [None] * 8
    assert len(most) > 4
    assert max(most) <= 2000 * engine.batch.own.token_bytes
    assert engine.statistics.mean_rows > 3


def test_the_budget_recovers_from_an_out_of_memory_error(sampler, tokenizer, words, monkeypatch) -> None:
    engine = BatchGenerator(sampler, tokenizer, max_batch_tokens=4000)
    step, left = engine.forward.step, [1]

    def failing(batch):
        if len(batch.sequences) == 8 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("pretended")
        return step(batch)

    monkeypatch.setattr(engine.forward, "step", failing)
    requests = [Request(id=i, query=words(8 + i, i), max_new_tokens=60, stop_ids=(), seed=i) for i in range(8)]
    budgets = []
    for request in requests:
        engine.add_request(request)
    while engine.unfinished:
        engine.step()
        budgets.append(engine.budget)
    assert engine.statistics.out_of_memory == 1
    assert min(budgets) < 3000
    for _ in range(3):
        list(engine.run(requests))
    assert engine.budget == 4000
    assert engine.statistics.out_of_memory == 1


def test_tokens_of_who_had_to_leave_are_kept(sampler, tokenizer, words, monkeypatch) -> None:
    """They go on where they were: no event comes twice, and prompt and answer are computed in one pass."""
    requests = [Request(id=i, query=words(8 + i, i), max_new_tokens=30, stop_ids=(), seed=i) for i in range(6)]
    expected = {r.id: r.token_ids for r in BatchGenerator(sampler, tokenizer).run(requests)}
    engine = BatchGenerator(sampler, tokenizer)
    step, calls = engine.forward.step, [0]

    def failing(batch):
        calls[0] += 1
        if calls[0] in (5, 9, 14):
            raise torch.OutOfMemoryError("pretended")
        return step(batch)

    monkeypatch.setattr(engine.forward, "step", failing)
    for request in requests:
        engine.add_request(request)
    tokens = {r.id: [] for r in requests}
    while engine.unfinished:
        for event in engine.step():
            tokens[event.id].append(event.token_id)
    assert {name: tuple(ids) for name, ids in tokens.items()} == expected
    assert engine.statistics.out_of_memory == 3
    assert engine.statistics.new_tokens == sum(map(len, expected.values()))
