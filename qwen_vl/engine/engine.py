"""Many requests at once through one model: they come and go while others run, and none changes another's answer.

The result of a request depends on the request alone: its tokens are those that `chat()` finds for it (in float32; in
bfloat16 the rounding of a matrix product depends on its shape), whatever shares its batch, its order or its process.
"""

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from qwen_vl.chat import MAX_WINDOW_SIZE, build_context
from qwen_vl.engine import image_cache
from qwen_vl.engine.cache import (
    OUT_OF_MEMORY_ALONE,
    ROOM_STEP,
    Cache,
    free_bytes,
    is_out_of_memory,
    keep_freed_memory,
)
from qwen_vl.engine.forward import BatchForward
from qwen_vl.engine.image_cache import ImageCache, image_key
from qwen_vl.engine.requests import Event, Request, Result, Statistics, TextStream
from qwen_vl.engine.sampling import RequestGenerator, choose
from qwen_vl.engine.scheduler import Batch, Group, Sequence, grouped, image_places
from qwen_vl.images import QwenVLImageProcessor
from qwen_vl.language import ntk_alpha
from qwen_vl.modeling import QwenVLForCausalLM
from qwen_vl.sampling_params import MAX_NEW_TOKENS, TOP_K, SamplingSettings, check_limit, first, unknown_settings
from qwen_vl.tokenization import QwenVLTokenizer

logger = logging.getLogger(__name__)

SEEDS = range(-(2**63), 2**64)
LOOKAHEAD = 128  # waiting groups that memory is taken for
RECOVERY = 0.01  # growth of the budget per step after an out-of-memory error; after n errors an n-th of it
NO_NUMBERS = "the model computed NaN or infinity: its weights are damaged, or the dtype is too narrow (not bfloat16)"


class BatchGenerator:
    """Answers many requests with one model: all of an iterable (`run`), or as a server does (`add_request`, `step`).

    Args:
        model: In eval mode.
        tokenizer: The checkpoint's.
        max_batch_tokens: Tokens whose keys and values may be held at once; by default what memory has room for. An
            out-of-memory error halves it for a while, and what was in flight beyond that waits again.
        max_rows: Requests decoded at once; by default 512 on a GPU, 256 on a CPU.
        prefill_tokens: Prompt tokens computed in one pass; by default 8,192 on a GPU, 4,096 on a CPU.
        window: Requests that `run` looks at at once to find common prefixes; the most that memory holds.
        share_prefixes: False computes every prompt alone.

    Attributes:
        batch: The running sequences.
        forward: The decoder's passes over the batch.
        images: Features of the latest images.
        statistics: Counts since the engine was made.

    Raises:
        ValueError: The checkpoint's generation settings ask for something that the engine does not support.
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
        if not model.is_on_one_device:
            raise ValueError(
                "the engine needs the whole model on one device, and this one is spread over several (device_map). "
                "Use chat() for one request at a time, or load it without device_map."
            )
        gpu = model.device.type == "cuda"
        if unknown := unknown_settings(model.generation_config.to_dict()):
            raise ValueError(f"generation_config.json asks for {unknown}, which the batching engine does not support")
        if not gpu:
            keep_freed_memory()
        self.model, self.tokenizer = model, tokenizer
        self.max_rows = max_rows or (512 if gpu else 256)
        self.prefill_tokens = prefill_tokens or (8192 if gpu else 4096)
        self.window, self.share_prefixes = window, share_prefixes
        config = model.config
        shape = config.num_hidden_layers, config.num_attention_heads, config.kv_channels, model.dtype, model.device
        self.batch = Batch(Cache(*shape), Cache(*shape))
        self.max_batch_tokens = max_batch_tokens or self._tokens_that_fit()
        self.statistics = Statistics()
        self._incoming: list[Sequence] = []  # not in groups yet
        self._waiting: list[Group] = []
        self._memory_limit = math.inf  # tokens; what out-of-memory errors have left of the budget
        self._added = 0
        self.forward = BatchForward(model)
        self.images = ImageCache(self.forward.encode_images, QwenVLImageProcessor(config.visual["image_size"]))

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Yields one result per request, as they finish; a request that cannot be answered fails alone.

        Requests are taken from the iterable a window at a time, so memory does not grow with their number. The engine
        must have no other requests; closing the iterator drops those that are not finished.
        """
        if self.unfinished:
            raise RuntimeError("run() needs an engine without other requests")
        source = iter(requests)
        try:
            while True:
                if self._waiting_requests < self.max_rows:
                    for request in islice(source, self.window):
                        try:
                            self.add_request(request)
                        except (ValueError, TypeError, KeyError) as error:  # per-request boundary
                            yield Result.failed(request, f"{type(error).__name__}: {error}")
                if not self.unfinished:
                    return
                yield from (event.result for event in self.step() if event.result)
        finally:
            self._drop(lambda _: True)

    def add_request(self, request: Request) -> None:
        """Queues a request for the next steps.

        Raises:
            ValueError: It cannot be answered: a setting, a tag or the length of the prompt. That an image cannot be
                read is found later and comes as an event.
            TypeError, KeyError: It is malformed.
        """
        self._incoming.append(self._sequence(request))
        self._added += 1

    def abort(self, request_id: Any) -> bool:
        """Drops the request of this id, so that no further event comes; returns whether there was one."""
        return self._drop(lambda sequence: sequence.request.id == request_id)

    @property
    def unfinished(self) -> int:
        """Requests that wait or are in flight."""
        return self._waiting_requests + len(self.batch.sequences)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Prefills what there is room for, or computes one more token of every request in flight.

        Returns:
            An event for each request that has a new token or has failed.
        """
        if self._incoming:
            self._waiting += self._grouped(self._incoming)
            self._incoming = []
        events: list[Event] = []
        admitted: list[Group] = []
        try:
            self._admit(admitted, events)
            if admitted:
                self._prefill(admitted, events)
            elif self.batch.groups:
                self._decode(events)
            if self.statistics.out_of_memory:
                self._memory_limit *= 1 + RECOVERY / self.statistics.out_of_memory
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._recover(admitted, events)
        self.statistics.requests += sum(event.result is not None for event in events)
        return events

    @property
    def budget(self) -> int:
        """Tokens whose keys and values may be held now."""
        return int(min(self.max_batch_tokens, self._memory_limit))

    @property
    def _waiting_requests(self) -> int:
        return len(self._incoming) + sum(len(group.members) for group in self._waiting)

    def _grouped(self, sequences: list[Sequence]) -> list[Group]:
        return grouped(sequences, self.max_rows, share=self.share_prefixes)

    def _sequence(self, request: Request) -> Sequence:
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
        if isinstance(request.stop, str) or not all(isinstance(text, str) and text for text in request.stop):
            raise ValueError(f"stop is {request.stop!r}; it must be a list of texts that are not empty")
        stops = request.stop_ids
        if stops is None:
            stops = (tokenizer.eod_id, tokenizer.im_end_id, tokenizer.im_start_id)
        ids = np.array(context.ids, dtype=np.int64)
        return Sequence(
            request=request,
            number=self._added,
            prompt=ids,
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
            stream=TextStream(tokenizer, request.stop),
        )

    def _admit(self, admitted: list[Group], events: list[Event]) -> None:
        """Moves waiting groups into the batch, as many as one prefill takes; those without their images fail."""
        batch, tokens = self.batch, 0
        while self._waiting and not (batch.crowded and batch.groups):
            group = self._waiting[0]
            rows = len(batch.sequences)
            if rows and rows + len(group.members) > self.max_rows:
                return
            if admitted and tokens + group.prefill_tokens > self.prefill_tokens:
                return
            try:
                group.features, broken = self._features(group)
                placed = not broken and batch.add(group, self.budget, self._answer_length(), self._waiting[1:LOOKAHEAD])
            except RuntimeError as error:
                if not batch.groups or not is_out_of_memory(error):
                    raise
                self.statistics.out_of_memory += 1
                self._memory_limit = batch.tokens  # the running sequences fit
                return
            if broken:
                self._fail_broken(group, broken, events)
                continue
            if not placed:
                return
            del self._waiting[0]
            admitted.append(group)
            tokens += group.prefill_tokens

    def _fail_broken(self, group: Group, broken: dict[Hashable, str], events: list[Event]) -> None:
        """Removes the sequences with such an image from the first waiting group."""
        reasons = {m: [broken[k] for k in map(image_key, m.images) if k in broken] for m in group.members}
        self._waiting[:1] = self._grouped([member for member in group.members if not reasons[member]])
        events += [_failure(member, why[0]) for member, why in reasons.items() if why]

    def _features(self, group: Group) -> tuple[dict[Hashable, torch.Tensor], dict[Hashable, str]]:
        """Returns the features of a group's images; and for those that cannot be read, why."""
        images = [image for member in group.members for image in member.images]
        upcoming = (i for g in self._waiting[: image_cache.AT_ONCE] for member in g.members for i in member.images)
        try:
            return self.images.of(images, upcoming)
        except RuntimeError as error:
            if self.batch.groups or not is_out_of_memory(error):
                raise
        return self.images.of(images, one_by_one=True)

    def _answer_length(self) -> int:
        """Returns the expected length of an answer in tokens: somewhat more than the mean so far."""
        stats = self.statistics
        mean = stats.new_tokens / stats.requests if stats.requests else 0
        return max(-(-int(mean * 1.25) // ROOM_STEP), 1) * ROOM_STEP

    def _prefill(self, groups: list[Group], events: list[Event]) -> None:
        rows, logits = self.forward.prefill(groups)
        stats = self.statistics
        stats.prompt_tokens += sum(len(member) for _, member in rows)
        stats.prefilled_tokens += sum(group.prefill_tokens for group in groups)
        stats.images = self.images.encoded
        stats.peak_rows = max(stats.peak_rows, len(self.batch.sequences))
        stats.peak_cache_tokens = max(stats.peak_cache_tokens, self.batch.tokens)
        self._take_tokens(rows, logits, events)
        for group in groups:
            group.features = {}

    def _decode(self, events: list[Event]) -> None:
        batch, stats = self.batch, self.statistics
        back: list[Sequence] = []
        try:
            batch.make_room(self.budget, back)
        finally:
            self._waiting[:0] = self._grouped(back)
        logits = self.forward.step(batch)
        rows = [(group, member) for group in batch.groups for member in group.members]
        stats.steps += 1
        stats.read_tokens += sum(group.shared for group in batch.groups)
        stats.read_tokens += sum(member.own.length + 1 for _, member in rows)
        stats.peak_cache_tokens = max(stats.peak_cache_tokens, batch.tokens)
        self._take_tokens(rows, logits, events)

    def _take_tokens(self, rows: list[tuple[Group, Sequence]], logits: torch.Tensor, events: list[Event]) -> None:
        """Chooses the next token of each row; sequences that it ends leave the batch."""
        members = [member for _, member in rows]
        draws = [(member.generator, len(member.answer)) for member in members]
        tokens = choose(logits, [m.sampling for m in members], draws, self.model.config.used_vocab_size)
        self.statistics.new_tokens += len(tokens)
        for group, member in rows:  # not before the tokens are chosen: a step that fails is repeated
            member.own.length = len(member) - group.shared
        for (group, member), token in zip(rows, tokens, strict=True):
            event = _failure(member, NO_NUMBERS) if token is None else _event(member, token)
            events.append(event)
            if event.result:
                self.batch.finish(group, member)

    def _recover(self, admitted: list[Group], events: list[Event]) -> None:
        """After an out-of-memory error: what was to be prefilled, else the younger half, waits again."""
        self.statistics.out_of_memory += 1
        batch = self.batch
        self._memory_limit = max((batch.tokens or self.budget) // 2, 1)
        logger.warning(
            "out of memory with %d requests in flight: going on with at most %d tokens",
            len(batch.sequences),
            self._memory_limit,
        )
        alone = len(batch.groups) <= 1
        back = admitted or batch.groups[len(batch.groups) // 2 :]
        members = [member for group in back for member in group.members]
        for group in back:
            batch.release(group)
        if not back:  # nothing in flight: a block or the vision tower does not fit
            group = self._waiting[0]
            if self._memory_limit > group.shared + len(group.members) * (group.suffix + ROOM_STEP):
                return  # a smaller block may fit
            members = self._waiting.pop(0).members
        if not alone:
            self._waiting[:0] = self._grouped(members)
        elif len(members) == 1:
            events.append(_failure(members[0], OUT_OF_MEMORY_ALONE))
        else:
            self._waiting[:0] = grouped(members, 1, share=False)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _drop(self, unwanted: Callable[[Sequence], bool]) -> bool:
        """Removes the sequences for which `unwanted` is true; returns whether there were any."""
        before = self.unfinished
        self._incoming = [sequence for sequence in self._incoming if not unwanted(sequence)]
        for group in self.batch.groups[:]:
            for member in [member for member in group.members if unwanted(member)]:
                self.batch.finish(group, member)
        for group in [group for group in self._waiting if any(map(unwanted, group.members))]:
            place = self._waiting.index(group)
            self._waiting[place : place + 1] = self._grouped([m for m in group.members if not unwanted(m)])
        return self.unfinished < before

    def _tokens_that_fit(self) -> int:
        """Returns how many tokens' keys and values the free memory holds, beside what the computation needs."""
        config, item = self.model.config, self.model.dtype.itemsize
        activations = self.prefill_tokens * (8 * config.hidden_size + 2 * config.intermediate_size) * max(item, 4)
        logits = 4 * self.max_rows * config.vocab_size * 4
        left = free_bytes(self.model.device) - activations - logits
        if left < self.batch.own.token_bytes * config.seq_length:
            logger.warning("little memory is left beside the model: requests are answered one at a time")
        return max(int(left / self.batch.own.token_bytes), 1)


def _event(member: Sequence, token: int) -> Event:
    """Adds a token to a sequence's answer."""
    member.answer.append(token)
    text = member.stream.push(token)
    stopped = token in member.stops or member.stream.stopped
    if not stopped and len(member.answer) < member.limit:
        return Event(member.request.id, token, text)
    whole, rest = member.stream.finish(member.answer)
    reason = "stop" if stopped or member.stream.stopped else "length"
    ids, prompt = tuple(member.answer), len(member.prompt)
    return Event(member.request.id, token, text + rest, Result(member.request.id, whole, None, ids, prompt, reason))


def _failure(member: Sequence, error: str) -> Event:
    return Event(member.request.id, None, "", Result.failed(member.request, error, len(member.prompt)))
