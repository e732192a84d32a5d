"""The sampler against transformers' processors and `torch.multinomial`."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qwen_vl.engine import sampling
from qwen_vl.engine.sampling import RequestGenerator, choose
from qwen_vl.sampling_params import SamplingSettings

CPU = torch.device("cpu")
V, USED = 3000, 2950  # the last chunk of ids is not whole, and some rows of the head have no token
SETTINGS = [
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7, "top_p": 0.8},
    {"top_k": 50},
    {"top_k": 50, "top_p": 0.9, "temperature": 1.5},
    {"top_k": 500, "top_p": 0.4},
]


def _reference(row: torch.Tensor, setting: SamplingSettings, *, seed: int, draw: int) -> int:
    """The token of a draw, counted from 0, that `generate()` makes after `torch.manual_seed(seed)`."""
    scores = row[None].clone()
    scores[:, USED:] = -torch.inf
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


def _logits(rows: int, spread: float, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_those_of_generate(spread: float, settings: dict) -> None:
    rows = 30
    logits = _logits(rows, spread, int(spread * 10))
    logits[3, 100:110] = logits[3].max()  # ties
    logits[4, -100:] += 20  # in the last chunk, and beyond it
    setting = SamplingSettings(**settings)
    sources = [RequestGenerator(seed, CPU) for seed in range(rows)]
    for draw in range(3):
        chosen = choose(logits, [setting] * rows, [(source, draw) for source in sources], USED)
        assert chosen == [_reference(logits[row], setting, seed=row, draw=draw) for row in range(rows)]


def test_rows_of_different_settings() -> None:
    settings = [SamplingSettings(**setting) for setting in SETTINGS] * 3
    settings[1] = SamplingSettings(do_sample=False)
    logits = _logits(len(settings), 4)
    logits[:, USED:] += 100
    draws = [(RequestGenerator(seed, CPU), 2) for seed in range(len(settings))]
    chosen = choose(logits, settings, draws, USED)
    for row, setting in enumerate(settings):
        if setting.do_sample:
            assert chosen[row] == _reference(logits[row], setting, seed=row, draw=2)
    assert chosen[1] == logits[1, :USED].argmax()


@pytest.mark.parametrize("settings", [{"top_p": 0.3}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9}], ids=str)
def test_common_settings_do_not_need_the_way_of_single_rows(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """top-k 50 is what a checkpoint without `top_k` gets."""
    rows, exact = 100, []
    found = sampling.exact_choice
    monkeypatch.setattr(sampling, "exact_choice", lambda *arguments: exact.append(1) or found(*arguments))
    draws = [(RequestGenerator(seed, CPU), 0) for seed in range(rows)]
    choose(_logits(rows, 3.0), [SamplingSettings(**settings)] * rows, draws, USED)
    assert len(exact) < rows / 20


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_no_numbers(do_sample: bool, bad: float) -> None:
    logits = _logits(4, 2.0)
    logits[1, USED - 1] = bad
    logits[2] = -torch.inf
    setting = SamplingSettings(do_sample=do_sample, top_p=0.8)
    chosen = choose(logits, [setting] * 4, [(RequestGenerator(0, CPU), 0)] * 4, USED)
    assert [token is None for token in chosen] == [False, True, True, False]


def test_ids_without_a_token_are_never_chosen() -> None:
    logits = torch.zeros(2, 50)
    logits[:, 45] = 9
    logits[:, 7] = 5
    settings = [SamplingSettings(do_sample=False), SamplingSettings(top_p=0.1)]
    assert choose(logits, settings, [(RequestGenerator(0, CPU), 0)] * 2, 40) == [7, 7]


@pytest.mark.parametrize("numbers", [True, False])
def test_any_draw_can_be_computed(numbers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certain draws are passed over, and after an error one may be repeated; of each only a part may be needed."""
    assert sampling.numbers_suffice(CPU)  # else every draw costs five times as much
    monkeypatch.setattr(sampling, "numbers_suffice", lambda _: numbers)
    whole = torch.Generator().manual_seed(9)
    expected = [torch.empty(V).exponential_(1, generator=whole) for _ in range(6)]
    source = RequestGenerator(9, CPU)
    for draw, ids in [(0, [0]), (1, None), (4, [17, 3, V - 1]), (4, range(2000)), (2, [999]), (5, None)]:
        wanted = slice(None) if ids is None else torch.tensor(ids)
        assert torch.equal(source.variates(draw, V, wanted if ids else None), expected[draw][wanted])
