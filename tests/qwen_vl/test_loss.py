"""The loss in chunks and over packed samples against the plain one: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from qwen_vl import QwenVLImageProcessor, QwenVLTokenizer
from qwen_vl import loss as loss_module
from tests.conftest import RANKS
from tests.qwen_vl.conftest import SEQ_LENGTH, small_model


def _sample(length: int, seed: int) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, RANKS, (length,), generator=generator).tolist()
    return ids, [-100] * (length * 2 // 3) + ids[length * 2 // 3 :]


def _gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def samples(tokenizer: QwenVLTokenizer) -> list[tuple[list[int], list[int]]]:
    """Four samples, one with an image, lengths at both sides of the NTK step (which training does not take)."""
    rows = [_sample(n, n) for n in (SEQ_LENGTH - 9, SEQ_LENGTH, 3 * SEQ_LENGTH)]
    ids, labels = _sample(20, 5)
    return [*rows, (tokenizer.image_span() + ids, [-100] * 258 + labels)]


def _padded(samples: list[tuple[list[int], list[int]]], to: int) -> dict[str, torch.Tensor]:
    pad = [to - len(ids) for ids, _ in samples]
    return {
        "input_ids": torch.tensor([ids + [RANKS] * n for (ids, _), n in zip(samples, pad, strict=True)]),
        "labels": torch.tensor([labels + [-100] * n for (_, labels), n in zip(samples, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in zip(samples, pad, strict=True)]),
    }


def _packed(samples: list[tuple[list[int], list[int]]]) -> dict[str, object]:
    lengths = [len(ids) for ids, _ in samples]
    return {
        "input_ids": torch.tensor([[i for ids, _ in samples for i in ids]]),
        "labels": torch.tensor([[i for _, labels in samples for i in (-100, *labels[1:])]]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "segments": lengths,
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_padded_and_plain_agree(samples, picture, checkpointing: bool, monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 7)
    model = small_model().train()
    pixels = QwenVLImageProcessor().load(picture)[None]
    longest = max(len(ids) for ids, _ in samples)
    batch = _padded(samples, longest)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected = _gradients(model, plain)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for inputs in (batch, _padded(samples, longest + 50), _packed(samples)):
        out = model(**inputs, pixel_values=pixels, loss_only=True)
        assert out.logits is None
        torch.testing.assert_close(out.loss, plain, atol=1e-5, rtol=1e-5)
        _assert_same(_gradients(model, out.loss), expected)


def test_no_supervised_token_is_no_loss_and_no_nan() -> None:
    model = small_model().train()
    ids = torch.tensor([_sample(12, 1)[0]])
    out = model(ids, labels=torch.full_like(ids, -100), loss_only=True)
    assert out.loss == 0
    gradients = _gradients(model, out.loss)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert all((g == 0).all() for g in gradients.values())


def test_logits_come_with_the_loss_unless_left_out(samples) -> None:
    model = small_model()
    batch = _padded(samples[:1], len(samples[0][0]))
    with torch.no_grad():
        out = model(**batch)
        assert out.logits.shape == (*batch["input_ids"].shape, 512)
        assert torch.equal(out.loss, model(**batch, loss_only=True).loss)


def test_under_autocast_forward_and_backward_are_plain_autocast(monkeypatch) -> None:
    """A float32 head over float32 hidden states, as full tuning in bfloat16 without DeepSpeed has them."""
    monkeypatch.setattr(loss_module, "CHUNK", 7)
    head, plain = (loss_module.LanguageHead(16, 40, bias=False) for _ in range(2))
    plain.load_state_dict(head.state_dict())
    hidden = torch.randn(23, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(23)
    results = []
    for module, chunked in ((head, True), (plain, False)):
        rows = hidden.clone().requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(rows, labels) if chunked else F.cross_entropy(module(rows), labels, reduction="sum")
        loss.backward()
        results.append((loss, rows.grad, module.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
