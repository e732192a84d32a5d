"""Many requests at once: shared prefixes computed once, finished rows replaced by waiting ones, nothing changed.

What a request gives depends on the request alone: its tokens are those that `chat()` finds for it (in float32; in
bfloat16 the rounding of a matrix product depends on its shape), whatever shares its batch, its order or its process.
"""

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch

from qwen_vl.chat import MAX_WINDOW_SIZE, build_context, cut_answer
from qwen_vl.engine import image_cache
from qwen_vl.engine.cache import ALONE, OWN_STEP, Block, CacheShape, free_bytes, is_out_of_memory
from qwen_vl.engine.forward import BatchForward
from qwen_vl.engine.image_cache import image_key
from qwen_vl.engine.requests import Request, Result, Statistics
from qwen_vl.engine.sampling import RequestGenerator, choose
from qwen_vl.engine.scheduler import MOST_ROWS, Flight, Group, Row, group_by_prefix, image_places
from qwen_vl.images import QwenVLImageProcessor
from qwen_vl.language import ntk_alpha
from qwen_vl.modeling import QwenVLForCausalLM
from qwen_vl.sampling_params import MAX_NEW_TOKENS, TOP_K, SamplingSettings, check_limit, first, unknown_settings
from qwen_vl.tokenization import QwenVLTokenizer

logger = logging.getLogger(__name__)

SEEDS = range(-(2**63), 2**64)
NO_NUMBERS = "the model computed NaN or infinity: its weights are damaged, or the dtype is too narrow (not bfloat16)"


class BatchGenerator:
    """Answers many requests with one model.

    Args:
        model: In eval mode.
        tokenizer: The checkpoint's.
        max_batch_tokens: Tokens whose keys and values may be held at once; by default what memory has room for. An
            out-of-memory error halves it, and what was in flight beyond that begins again later.
        max_rows: Requests decoded at once; by default 512 on a GPU, 256 on a CPU.
        prefill_tokens: Prompt tokens computed in one pass; by default 8,192 on a GPU, 4,096 on a CPU.
        window: Requests looked at at once to find common prefixes; no more than that are held in memory.
        share_prefixes: False computes every prompt on its own.

    Raises:
        ValueError: The checkpoint's generation settings ask for something that is not known here.
    """

    def __init__(
        self,
        model: QwenVLForCausalLM,
        tokenizer: QwenVLTokenizer,
        *,
        max_batch_tokens: int | None = None,
        max_rows: int | None = None,
        prefill_tokens: int | None = None,
        window: int = 2048,
        share_prefixes: bool = True,
    ) -> None:
        gpu = model.device.type == "cuda"
        if unknown := unknown_settings(model.generation_config.to_dict()):
            raise ValueError(f"generation_config.json asks for {unknown}, which the batched engine does not know")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows = max_rows or (512 if gpu else 256)
        self.prefill_tokens = prefill_tokens or (8192 if gpu else 4096)
        self.window, self.share_prefixes = window, share_prefixes
        config = model.config
        self.shape = CacheShape(
            config.num_hidden_layers, config.num_attention_heads, config.kv_channels, model.dtype, model.device
        )
        self.max_batch_tokens = max_batch_tokens or self._tokens_that_fit()
        self.statistics = Statistics()
        self._forward = BatchForward(model)
        processor = QwenVLImageProcessor(config.visual["image_size"])
        self._images = image_cache.ImageFeatures(self._forward.encode_images, processor)

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Yields one result per request, as they finish; a request that cannot be done fails alone.

        Requests are taken from the iterable a window at a time, so memory does not grow with their number.
        """
        source, flight, number = iter(requests), Flight(), 0
        while True:
            if sum(len(group.members) for group in flight.waiting) < self.max_rows:
                batch = list(islice(source, self.window))
                prepared = [self._prepare(request, number + i) for i, request in enumerate(batch)]
                number += len(batch)
                yield from (entry for entry in prepared if isinstance(entry, Result))
                flight.waiting += self._grouped([entry for entry in prepared if isinstance(entry, Row)])
            if not flight.waiting and not flight.groups:
                return
            yield from self._advance(flight)

    @torch.inference_mode()
    def _advance(self, flight: Flight) -> list[Result]:
        """Prefills what there is room for, or decodes one step of everything in flight."""
        failed: list[Result] = []
        try:
            admitted = self._admit(flight, failed)
            if failed or admitted:
                return failed + self._prefill(flight, admitted)
            return self._step(flight)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        failed += self._make_room(flight)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return failed

    def _prepare(self, request: Request, number: int) -> Row | Result:
        try:
            return self._row(request, number)
        except (ValueError, TypeError, KeyError) as error:
            return Result(request.id, "", f"{type(error).__name__}: {error}")

    def _row(self, request: Request, number: int) -> Row:
        settings, config, tokenizer = self.model.generation_config, self.model.config, self.tokenizer
        window = first(getattr(settings, "max_window_size", None), MAX_WINDOW_SIZE)
        context = build_context(tokenizer, request.query, request.history, request.system, window)
        if len(context.ids) >= config.max_position_embeddings:
            raise ValueError(
                f"the prompt has {len(context.ids)} tokens, and the model has {config.max_position_embeddings} "
                "positions for prompt and answer"
            )
        limit = check_limit(first(request.max_new_tokens, settings.max_new_tokens, MAX_NEW_TOKENS))
        if not isinstance(request.seed, int) or request.seed not in SEEDS:
            raise ValueError(f"seed is {request.seed}; it must be a whole number of 64 bits")
        stops = request.stop_ids
        if stops is None:
            stops = (tokenizer.eod_id, tokenizer.im_end_id, tokenizer.im_start_id)
        ids = np.array(context.ids, dtype=np.int64)
        return Row(
            request=request,
            number=number,
            ids=ids,
            image_places=image_places(ids, tokenizer.img_start_id),
            images=context.images,
            alpha=ntk_alpha(len(ids), config.seq_length) if config.use_dynamic_ntk else 1.0,
            sampling=SamplingSettings(
                do_sample=bool(first(request.do_sample, settings.do_sample, False)),
                temperature=first(request.temperature, settings.temperature, 1.0),
                top_k=first(request.top_k, settings.top_k, TOP_K),
                top_p=first(request.top_p, settings.top_p, 1.0),
            ),
            generator=RequestGenerator(request.seed, self.model.device),
            limit=limit,
            stops=frozenset(stops),
        )

    def _grouped(self, rows: list[Row]) -> list[Group]:
        """Groups in the order of their work: those of one size together, so that blocks fit them."""
        if self.share_prefixes:
            numbers: dict[Hashable, int] = {}
            prompts, alphas = [row.comparable(numbers) for row in rows], [row.alpha for row in rows]
            found = group_by_prefix(prompts, alphas, most=min(self.max_rows, MOST_ROWS))
            groups = [Group([rows[i] for i in group.members], group.shared) for group in found]
        else:
            groups = [Group([row], len(row.ids)) for row in rows]
        return sorted(groups, key=lambda g: (-len(g.members), -g.shared, g.members[0].number))

    def _admit(self, flight: Flight, failed: list[Result]) -> list[Group]:
        """Moves waiting groups into blocks, as many as one prefill takes; adds to `failed` what has no image."""
        admitted: list[Group] = []
        tokens = rows = 0
        in_flight = flight.rows
        while flight.waiting and not (flight.crowded and flight.groups):
            group = flight.waiting[0]
            work = group.shared + sum(len(row.ids) - group.shared for row in group.members)
            full = in_flight + rows + len(group.members) > self.max_rows and (in_flight or rows)
            if full or (admitted and tokens + work > self.prefill_tokens):
                break
            try:
                group.features, broken = self._features(flight, group)
                placed = not broken and flight.place(group, self.shape, self.max_batch_tokens, self._answer_length())
            except RuntimeError as error:
                if not flight.groups or not is_out_of_memory(error):
                    raise
                self.statistics.out_of_memory += 1
                self.max_batch_tokens = flight.tokens  # what is in flight fits; nothing is wrong with it
                break
            if broken:
                self._fail_broken(flight, group, broken, failed)
                continue
            if not placed:
                break
            flight.waiting.pop(0)
            admitted.append(group)
            tokens += work
            rows += len(group.members)
        return admitted

    def _fail_broken(self, flight: Flight, group: Group, broken: dict[Hashable, str], failed: list[Result]) -> None:
        """Takes the rows with such an image out of the first group that waits."""
        reasons = [next((broken[k] for k in map(image_key, row.images) if k in broken), None) for row in group.members]
        flight.waiting[:1] = self._grouped([r for r, why in zip(group.members, reasons, strict=True) if why is None])
        failed += [Result(r.request.id, "", why) for r, why in zip(group.members, reasons, strict=True) if why]

    def _answer_length(self) -> int:
        """How long an answer becomes, as far as is known, in steps of a block's growth."""
        stats = self.statistics
        mean = stats.new_tokens / stats.requests if stats.requests else 0
        return max(-(-int(mean * 1.25) // OWN_STEP), 1) * OWN_STEP

    def _features(self, flight: Flight, group: Group) -> tuple[dict[Hashable, torch.Tensor], dict[Hashable, str]]:
        """Features of a group's images; and why there are none, for those that cannot be read."""
        images = [image for row in group.members for image in row.images]
        upcoming = (image for g in flight.waiting[: image_cache.AT_ONCE] for row in g.members for image in row.images)
        try:
            return self._images.of(images, upcoming)
        except RuntimeError as error:
            if flight.groups or not is_out_of_memory(error):
                raise
        return self._images.of(images, one_by_one=True)

    def _prefill(self, flight: Flight, groups: list[Group]) -> list[Result]:
        if not groups:
            return []
        logits = [self._forward.prefixes(groups)]
        branched = [group for group in groups if not group.alone]
        if branched:
            logits.append(self._forward.suffixes(branched))
        for group in groups:
            group.features = {}
        alone = [group for group in groups if group.alone]
        rows = [(group, row) for group in alone + branched for row in group.members]
        stats = self.statistics
        stats.prompt_tokens += sum(len(row.ids) for _, row in rows)
        stats.prefilled_tokens += sum(g.shared for g in groups)
        stats.prefilled_tokens += sum(len(row.ids) - g.shared for g in branched for row in g.members)
        stats.images = self._images.encoded
        stats.peak_rows = max(stats.peak_rows, flight.rows)
        stats.peak_cache_tokens = max(stats.peak_cache_tokens, flight.tokens)
        return self._take_tokens(flight, rows, torch.cat([part for part in logits if part is not None]))

    def _step(self, flight: Flight) -> list[Result]:
        if back := flight.make_growth(self.max_batch_tokens):
            self._send_back(flight, back)
        rows = [held for block in flight.blocks for held in block.held_rows]
        logits = self._forward.step(flight.blocks)
        stats = self.statistics
        stats.steps += 1
        stats.read_tokens += sum(group.shared for group in flight.groups) + sum(row.own + 1 for _, row in rows)
        stats.peak_cache_tokens = max(stats.peak_cache_tokens, flight.tokens)
        return self._take_tokens(flight, rows, logits)

    def _take_tokens(self, flight: Flight, rows: Sequence[tuple[Group, Row]], logits: torch.Tensor) -> list[Result]:
        """Chooses the next token of each row; results of the rows that it ends, which leave."""
        members = [row for _, row in rows]
        used = self.model.config.used_vocab_size
        tokens = choose(logits, [m.sampling for m in members], [m.generator for m in members], used)
        self.statistics.new_tokens += len(tokens)
        for (group, row), token in zip(rows, tokens, strict=True):  # all of them, before a row that ends moves another
            if token is not None:
                row.answer.append(token)
            row.own = len(row.ids) - group.shared + max(len(row.answer) - 1, 0)
        results = []
        for (group, row), token in zip(rows, tokens, strict=True):
            if token is None:
                flight.finish(group, row)
                results.append(Result(row.request.id, "", NO_NUMBERS, prompt_tokens=len(row.ids)))
            elif token in row.stops or len(row.answer) == row.limit:
                flight.finish(group, row)
                text = cut_answer(self.tokenizer, row.answer)
                results.append(Result(row.request.id, text, None, tuple(row.answer), prompt_tokens=len(row.ids)))
        self.statistics.requests += len(results)
        return results

    def _make_room(self, flight: Flight) -> list[Result]:
        """After an out-of-memory error: what was not begun, else the younger half, waits again; less is in flight."""
        self.statistics.out_of_memory += 1
        self.max_batch_tokens = max((flight.tokens or self.max_batch_tokens) // 2, 1)
        logger.warning(
            "out of memory with %d requests in flight: going on with at most %d tokens",
            flight.rows,
            self.max_batch_tokens,
        )
        if not flight.groups:
            first = flight.waiting[0]
            if self.max_batch_tokens > Block.tokens_for(1, len(first.members), first.shared, first.suffix + OWN_STEP):
                return []  # a smaller block may do
            del flight.waiting[0]
            return self._alone(flight, first.members)
        begun = [group for group in flight.groups if all(row.answer for row in group.open)]
        back = [group for group in flight.groups if group not in begun] or begun[len(begun) // 2 :]
        alone = len(flight.groups) == 1
        failed = []
        for group in back:
            members = list(group.open)
            flight.release(group)
            if alone:
                failed += self._alone(flight, members)
                continue
            self._send_back(flight, members)
        for row in (row for group in flight.groups for row in group.open):
            row.generator = row.generator.restarted(len(row.answer))  # the error may have come between two rows' draws
        return failed

    def _send_back(self, flight: Flight, rows: list[Row]) -> None:
        """Rows that had to leave wait again, and begin anew."""
        for row in rows:
            row.restart()
        flight.waiting += self._grouped(rows)

    def _alone(self, flight: Flight, members: Sequence[Row]) -> list[Result]:
        """After an out-of-memory error with one group alone: each of it on its own; one row on its own has failed."""
        if len(members) == 1:
            return [Result(members[0].request.id, "", ALONE)]
        for row in members:
            row.restart()
        flight.waiting += [Group([row], len(row.ids)) for row in members]
        return []

    def _tokens_that_fit(self) -> int:
        """How many tokens' keys and values the free memory holds, room for the computation left aside."""
        config, item = self.model.config, self.shape.dtype.itemsize
        activations = self.prefill_tokens * (8 * config.hidden_size + 2 * config.intermediate_size) * max(item, 4)
        logits = 4 * self.max_rows * config.vocab_size * 4
        left = free_bytes(self.model.device) - activations - logits
        if left < self.shape.token_bytes * config.seq_length:
            logger.warning("little memory is left beside the model: requests are answered one at a time")
        return max(int(left / self.shape.token_bytes), 1)
