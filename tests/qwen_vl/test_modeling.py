"""What the model must keep on its own small weights: rows of a batch, caches, image spans, training mode, ids."""

import math

import pytest
import torch
from transformers import LogitsProcessor

from qwen_vl import QwenVLForCausalLM, QwenVLImageProcessor, QwenVLTokenizer
from qwen_vl.language import ntk_alpha
from tests.conftest import RANKS
from tests.qwen_vl.conftest import SEQ_LENGTH, small_model


def _prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, RANKS, (length,), generator=generator).tolist()


def _left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[RANKS] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_alpha_follows_the_published_rule() -> None:
    assert [ntk_alpha(n, 2048) for n in (1, 300, 2047, 2048, 2049, 4096, 4097, 8192)] == [1, 1, 1, 1, 3, 3, 7, 7]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_left_padded_batch_equals_its_rows(attn: str, tokenizer: QwenVLTokenizer, picture) -> None:
    """Both sides of both NTK steps, with and without images, in one batch: tokens equal, logits to rounding."""
    model = small_model(seq_length=300, attn_implementation=attn)
    span = tokenizer.image_span(b"picture.png")
    rows = [_prompt(n, n) for n in (5, 299, 300, 301, 600, 601, 700)]
    rows[2] = [*span, *rows[2][258:]]
    rows[5] = [*rows[5][:20], *span, *rows[5][278:]]
    image = QwenVLImageProcessor().load(picture)
    images = [None, None, image, None, None, image.flip(-1), None]
    ids, mask = _left_padded(rows)
    pixels = torch.stack([i for i in images if i is not None])
    batch = model.generate(ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=10, eos_token_id=None)
    logits = model(ids, attention_mask=mask, pixel_values=pixels).logits
    assert logits[mask.bool()].isfinite().all()
    for i, row in enumerate(rows):
        alone = torch.tensor([row])
        own = None if images[i] is None else images[i][None]
        single = model.generate(alone, pixel_values=own, max_new_tokens=10, eos_token_id=None)
        assert batch[i, -10:].tolist() == single[0, -10:].tolist(), f"row {i} of {len(row)} tokens"
        expected = model(alone, pixel_values=own).logits[0]
        torch.testing.assert_close(logits[i, -len(row) :], expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_right_padding_is_left_out_as_well(model: QwenVLForCausalLM) -> None:
    row = _prompt(SEQ_LENGTH + 3, 1)
    ids = torch.tensor([[*row, *[RANKS] * 40]])
    mask = torch.tensor([[1] * len(row) + [0] * 40])
    padded = model(ids, attention_mask=mask).logits[0, : len(row)]
    torch.testing.assert_close(padded, model(torch.tensor([row])).logits[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_alpha_stays_while_the_answer_grows(model: QwenVLForCausalLM) -> None:
    """published: a prompt just below the limit keeps alpha 1 when its answer passes it."""
    prompt, answer = _prompt(SEQ_LENGTH, 2), _prompt(6, 3)
    out = model(torch.tensor([prompt]), use_cache=True)
    for token in answer:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    whole = torch.tensor([prompt + answer])
    kept = model(whole, prompt_lengths=torch.tensor([SEQ_LENGTH])).logits[0, -1]
    torch.testing.assert_close(out.logits[0, -1], kept, atol=2e-5, rtol=1e-4)
    assert (out.logits[0, -1] - model(whole).logits[0, -1]).abs().max() > 1e-2  # a longer prompt is another thing


@torch.no_grad()
def test_static_cache_gives_the_same_tokens(model: QwenVLForCausalLM) -> None:
    rows = [_prompt(SEQ_LENGTH - 5, 4), _prompt(SEQ_LENGTH + 5, 5)]
    ids, mask = _left_padded(rows)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None}
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert static.tolist() == model.generate(ids, **settings).tolist()


@torch.no_grad()
def test_several_answers_keep_their_images(model: QwenVLForCausalLM, tokenizer: QwenVLTokenizer, picture) -> None:
    span = tokenizer.image_span()
    ids, mask = _left_padded([[*span, 1, *span, 2], [*span, 3]])
    image = QwenVLImageProcessor().load(picture)
    pixels = torch.stack([image, -image, image.flip(-1)])
    settings = {"attention_mask": mask, "pixel_values": pixels, "max_new_tokens": 6, "eos_token_id": None}
    one = model.generate(ids, **settings)
    beams = model.generate(ids, **settings, num_beams=2, num_return_sequences=2)
    assert beams.shape[0] == 4
    sampled = model.generate(ids, **settings, num_return_sequences=2, do_sample=True, top_p=1e-6, top_k=0)
    assert sampled.tolist() == [one[0].tolist()] * 2 + [one[1].tolist()] * 2


@pytest.mark.parametrize("images", [0, 2])
def test_spans_and_images_must_agree(model: QwenVLForCausalLM, tokenizer: QwenVLTokenizer, images: int) -> None:
    ids = torch.tensor([[*tokenizer.image_span(), 1]])
    pixels = torch.zeros(images, 3, 448, 448) if images else None
    with pytest.raises(
        ValueError, match=f"256 positions between <img> and </img>, and pixel_values hold {images} images"
    ):
        model(ids, pixel_values=pixels)


def test_cut_image_span_is_refused(model: QwenVLForCausalLM, tokenizer: QwenVLTokenizer) -> None:
    with pytest.raises(ValueError, match="200 positions"):
        model(torch.tensor([tokenizer.image_span()[:201]]), pixel_values=torch.zeros(1, 3, 448, 448))


class _Favour(LogitsProcessor):
    """Pushes the ids that no token has far above the others."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, -30:] += 1e4
        return scores


@pytest.mark.parametrize("sample", [False, True])
def test_unused_ids_never_come_out(sample: bool, tokenizer: QwenVLTokenizer) -> None:
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 1000
    ids = torch.tensor([_prompt(10, 6)] * 4)
    assert model(ids).logits[:, -1].argmax(-1).min() >= len(tokenizer)  # they would win
    out = model.generate(ids, do_sample=sample, max_new_tokens=5, eos_token_id=None)
    assert out[:, 10:].max() < len(tokenizer)


@torch.no_grad()
def test_only_the_last_position_at_prefill(model: QwenVLForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(x.shape[1]) or x @ model.lm_head.weight.T)
    model.generate(torch.tensor([_prompt(20, 7)]), max_new_tokens=3, eos_token_id=None)
    assert seen == [1, 1, 1]


def test_training_mode_uses_neither_ntk_nor_logn(model: QwenVLForCausalLM) -> None:
    ids = torch.tensor([_prompt(SEQ_LENGTH * 3, 8)])
    plain = small_model(use_dynamic_ntk=False, use_logn_attn=False)
    with torch.no_grad():
        evaluated = model(ids).logits
        trained = small_model().train()(ids).logits
    torch.testing.assert_close(trained, plain(ids).logits, atol=2e-5, rtol=1e-4)
    assert (trained - evaluated).abs().max() > 1e-2


def test_logn_begins_beyond_the_training_length(model: QwenVLForCausalLM) -> None:
    without = small_model(use_logn_attn=False)
    ids = torch.tensor([_prompt(SEQ_LENGTH + 4, 9)])
    with torch.no_grad():
        difference = (model(ids).logits - without(ids).logits)[0].abs().amax(-1)
    assert difference[:SEQ_LENGTH].max() < 1e-5
    assert difference[SEQ_LENGTH:].min() > 1e-5


def test_loss_is_the_mean_over_supervised_tokens(model: QwenVLForCausalLM) -> None:
    ids = torch.tensor([_prompt(12, 10), _prompt(12, 11)])
    labels = ids.clone()
    labels[0, :8] = -100
    out = model(ids, labels=labels)
    log_probs = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    kept = labels[:, 1:] != -100
    assert math.isclose(out.loss.item(), -log_probs[kept].mean().item(), rel_tol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_text_only_batches_reach_every_parameter(checkpointing: bool) -> None:
    model = small_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.tensor([_prompt(12, 12)])
    model(ids, labels=ids).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    visual = [p.grad.abs().max().item() for p in model.transformer.visual.parameters()]
    assert max(visual) == 0


@pytest.mark.parametrize("sharded", [True, False])
def test_evaluation_over_sharded_weights_runs_the_tower_too(sharded: bool) -> None:
    """Or ranks with images would wait for the one without; what comes out is the same."""
    model, calls = small_model(), []
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids).logits
        if sharded:
            model.transformer.wte.weight.ds_id = 0
        model.transformer.visual.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(model(ids).logits, expected)
    assert len(calls) == sharded


def test_images_are_put_in_out_of_place(tokenizer: QwenVLTokenizer) -> None:
    """LoRA's `enable_input_require_grads` makes the embeddings a leaf: writing into them would fail."""
    model = small_model().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.transformer.wte.requires_grad_(False)
    ids = torch.tensor([[*tokenizer.image_span(), 65, 66, 67]])
    model(ids, pixel_values=torch.randn(1, 3, 448, 448), labels=ids).loss.backward()
    for parameter in (model.transformer.visual.attn_pool.pos_embed, model.transformer.h[0].attn.c_attn.weight):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
