"""Attention to parts of the keys, joined, is attention to all of them."""

import pytest
import torch
import torch.nn.functional as F

from qwen_vl.engine.attention import join, partial_attention, written_out

SCALING = 0.3


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, tokens, 16, generator=generator) for tokens in (5, 12, 12))


@pytest.mark.parametrize("attention", [partial_attention, written_out])
@pytest.mark.parametrize("cut", [1, 7, 11])
def test_two_parts_are_the_whole(qkv, attention, cut: int) -> None:
    query, key, value = qkv
    parts = [attention(query, key[:, :, s], value[:, :, s], SCALING) for s in (slice(cut), slice(cut, None))]
    whole = F.scaled_dot_product_attention(query, key, value, scale=SCALING)
    assert torch.allclose(join(*parts[0], *parts[1]), whole, atol=1e-6)
    assert torch.allclose(join(*parts[1], *parts[0]), whole, atol=1e-6)


@pytest.mark.parametrize("attention", [partial_attention, written_out])
def test_a_prefix_and_a_causal_part_are_causal(qkv, attention) -> None:
    """As a prompt's own tokens read: the shared prefix as a whole, and each other up to themselves."""
    query, key, value = qkv
    prefix = attention(query, key[:, :, :7], value[:, :, :7], SCALING)
    own = attention(query, key[:, :, 7:], value[:, :, 7:], SCALING, causal=True)
    visible = torch.ones(5, 12, dtype=torch.bool).tril(7)
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=SCALING)
    assert torch.allclose(join(*prefix, *own), whole, atol=1e-6)


@pytest.mark.parametrize("attention", [partial_attention, written_out])
def test_masked_places_have_no_weight(qkv, attention) -> None:
    query, key, value = qkv
    lengths = torch.tensor([4, 12])
    beyond = torch.arange(12) >= lengths[:, None]  # (B, S)
    mask = torch.zeros(2, 12).masked_fill(beyond, torch.finfo(torch.float32).min)[:, None, None]
    out, lse = attention(query, key, value, SCALING, mask=mask)
    for row, length in enumerate(lengths):
        alone = attention(query[row, None], key[row, None, :, :length], value[row, None, :, :length], SCALING)
        assert torch.allclose(out[row], alone[0][0], atol=1e-6)
        assert torch.allclose(lse[row], alone[1][0], atol=1e-6)


def test_weights_are_reported_as_a_logarithm(qkv) -> None:
    query, key, value = qkv
    expected = (query @ key.transpose(2, 3) * SCALING).logsumexp(-1)
    for attention in (partial_attention, written_out):
        _, lse = attention(query, key, value, SCALING)
        assert lse.dtype == torch.float32
        assert torch.allclose(lse, expected, atol=1e-5)


def test_half_precision_keeps_its_dtype(qkv) -> None:
    query, key, value = (t.bfloat16() for t in qkv)
    parts = [partial_attention(query, key[:, :, s], value[:, :, s], SCALING) for s in (slice(5), slice(5, None))]
    joined = join(*parts[0], *parts[1])
    assert joined.dtype == torch.bfloat16
    whole = F.scaled_dot_product_attention(*qkv, scale=SCALING)
    assert torch.allclose(joined.float(), whole, atol=0.05)


def test_very_different_weights_do_not_overflow() -> None:
    out, other = torch.full((1, 1, 1, 4), 2.0), torch.full((1, 1, 1, 4), 5.0)
    lse = torch.tensor([[[-torch.inf]]])
    assert join(out, lse, other, torch.zeros(1, 1, 1)).tolist() == other.tolist()
    assert join(out, torch.full((1, 1, 1), 200.0), other, torch.full((1, 1, 1), -200.0)).tolist() == out.tolist()
