"""Keys and values of the running sequences: dense blocks of entries, each of which is a stretch of tokens.

An entry holds a prefix that several sequences read, or what one sequence has after its prefix. Blocks are allocated
whole, never grow, and are freed when they are empty, so memory is what is counted.

Shapes: L layers, E entries of a block, S tokens that each has room for, H heads, D width per head; n rows of a step,
e entries of a stretch, R the most rows that read one of them.
"""

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil
import torch

from qwen_vl.engine.attention import partial_attention

BLOCK_TOKENS = 16_384  # of a block at the most
BLOCK_SHARE = 8  # a block has at most this part of the budget, so that entries of different lengths find room
ROOM_STEP = 64  # rooms are multiples of it
CALL_BYTES = 2**20  # of keys and values, which a CPU reads in about the time that one more call takes
GPU_CALL_BYTES = 2**28  # not measured
OUT_OF_MEMORY_ALONE = "out of memory, even alone"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


@dataclass(eq=False)
class Entry:
    """A place in a block.

    Attributes:
        length: Tokens that have keys and values there, or get them in the current prefill.
    """

    block: "Block"
    place: int
    length: int = 0

    @property
    def room(self) -> int:
        """Tokens it can hold."""
        return self.block.room

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores a layer's first T keys and values (1, H, T, D)."""
        self.block.data[layer, 0, self.place, :, : keys.shape[2]] = keys[0]
        self.block.data[layer, 1, self.place, :, : values.shape[2]] = values[0]

    def take(self, other: "Entry") -> None:
        """Copies another entry's keys and values."""
        self.length = other.length
        taken = other.block.data[:, :, other.place, :, : other.length]
        self.block.data[:, :, self.place, :, : self.length] = taken


class Block:
    """Room for several entries of S tokens each.

    Attributes:
        data: Keys and values (L, 2, E, H, S, D). One head's tokens lie together: to read them from (…, S, H, D) takes
            10 to 40 % longer on a CPU.
        entries: Those in use, by place: the first ones.
    """

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.capacity, self.room = data.shape[2], data.shape[4]
        self.entries: list[Entry] = []

    def stretches(self, call: int) -> Iterator[tuple[torch.Tensor, list[Entry]]]:
        """Divides the entries into neighbours of about one length: what is read at once is read as far as the longest.

        Args:
            call: Tokens that are rather read in vain than a stretch more begun.

        Yields:
            The part of `data` and its entries.
        """
        start, longest = 0, self.entries[0].length
        for place, entry in enumerate(self.entries):
            longer = max(longest, entry.length)
            if longer * (place + 1 - start) - longest * (place - start) > entry.length + call:
                yield self.data[:, :, start:place], self.entries[start:place]
                start, longer = place, entry.length
            longest = longer
        yield self.data[:, :, start : len(self.entries)], self.entries[start:]


class Cache:
    """Entries of all lengths, each in a block whose room suffices.

    Args:
        layers, heads, width: L, H and D of the model.
        dtype: Of keys and values.
        device: Their device.
    """

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.heads, self.width = layers, heads, width
        self.dtype, self.device = dtype, device
        self.blocks: list[Block] = []

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Tokens that it has room for now."""
        return sum(block.capacity * block.room for block in self.blocks)

    def add(self, room: int, count: int, budget: int, left: float, *, must: bool) -> Entry | None:
        """Returns an entry, in a block that has a place, or in a new one.

        Args:
            room: Tokens it must be able to hold.
            count: How many like it are likely to come, itself included; a new block is made for as many.
            budget: Tokens that all caches may have room for.
            left: How many of them are left.
            must: Make a block for it alone even where none is left.

        Returns:
            The entry, or None if there is no room.
        """
        places = [block for block in self.blocks if len(block.entries) < block.capacity and block.room >= room]
        best = min(places, key=lambda block: block.room, default=None)
        if best is None:
            size = -(-room // ROOM_STEP) * ROOM_STEP
            entries = min(count, int(min(BLOCK_TOKENS, budget // BLOCK_SHARE, left)) // size)
            if entries < 1:
                if left < room and not must:
                    return None
                size, entries = room, 1
            shape = (self.layers, 2, entries, self.heads, size, self.width)
            best = Block(torch.zeros(shape, dtype=self.dtype, device=self.device))
            self.blocks.append(best)
        best.entries.append(Entry(best, len(best.entries)))
        return best.entries[-1]

    def free(self, entry: Entry) -> None:
        """Gives an entry's place back, to which the block's last entry moves; an empty block's memory is freed."""
        block, data = entry.block, entry.block.data
        last = block.entries.pop()
        # Masked places have weight 0, and 0 times NaN is NaN: unused places hold zeros. A step that failed
        # in the middle may have written one token more than the length says.
        if last is not entry:
            data[:, :, entry.place, :, : last.length] = data[:, :, last.place, :, : last.length]
            data[:, :, entry.place, :, last.length : entry.length + 1] = 0
            block.entries[entry.place] = last
        data[:, :, last.place, :, : last.length + 1] = 0
        last.place = entry.place
        if not block.entries:
            self.blocks.remove(block)


class CacheStep:
    """One decoding step's reading of a cache: every row reads one entry; places and masks hold for all layers.

    Args:
        cache: What is read.
        readers: For each of its entries the rows that read it.
        new: Tokens that the step writes to each entry, 0 or 1.
    """

    def __init__(self, cache: Cache, readers: Mapping[Entry, list[int]], *, new: int) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor, int, torch.Tensor | None]] = []
        device, dtype = cache.device, cache.dtype
        call_bytes = CALL_BYTES if device.type == "cpu" else GPU_CALL_BYTES
        call = call_bytes * cache.layers // cache.token_bytes
        places = [0] * sum(map(len, readers.values()))
        offset = 0
        for data, entries in (stretch for block in cache.blocks for stretch in block.stretches(call)):
            rows = [readers[entry] for entry in entries]
            most = max(map(len, rows))
            for number, of_entry in enumerate(rows):
                for rank, row in enumerate(of_entry):
                    places[row] = offset + number * most + rank
            offset += len(rows) * most
            filled = torch.tensor([r + [r[0]] * (most - len(r)) for r in rows], device=device)  # (e, R)
            lengths = torch.tensor([entry.length for entry in entries], device=device)
            longest = max(entry.length for entry in entries) + new
            mask = None
            if any(entry.length + new < longest for entry in entries):
                beyond = torch.arange(longest, device=device) >= lengths[:, None] + new
                mask = torch.zeros(beyond.shape, dtype=dtype, device=device)
                mask = mask.masked_fill_(beyond, torch.finfo(dtype).min)[:, None, None]  # (e, 1, 1, S)
            self.parts.append((data, filled, longest, mask))
        self.places = torch.tensor(places, device=device)  # of each row in what the parts give, one after the other
        self.ends: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for block in cache.blocks if new else ():
            rows = torch.tensor([readers[entry][0] for entry in block.entries], device=device)
            firsts = torch.arange(len(rows) * cache.heads, device=device) * block.room
            lengths = torch.tensor([entry.length for entry in block.entries], device=device)
            keys = firsts + lengths.repeat_interleave(cache.heads)  # where each head's next token goes
            ends = torch.cat([keys, keys + block.capacity * cache.heads * block.room])  # (2 * entries * H,)
            self.ends.append((block.data, rows, ends))

    def write(self, layer: int, new: torch.Tensor) -> None:
        """Stores each row's new key and value (2, n, H, D) at the end of its entry, which nobody else reads."""
        for data, rows, ends in self.ends:
            data[layer].view(-1, new.shape[-1]).index_copy_(0, ends, new[:, rows].flatten(0, 2))

    def attend(self, layer: int, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial attention of each row's query (n, H, D) to its entry: (n, H, D), and float32 (n, H)."""
        outs, weights = [], []
        for data, rows, longest, mask in self.parts:
            keys, values = data[layer, ..., :longest, :]
            by_entry = query[rows].transpose(1, 2)  # (e, H, R, D)
            out, lse = partial_attention(by_entry, keys, values, scaling, mask=mask)
            outs.append(out.transpose(1, 2).flatten(0, 1))  # (e * R, H, D)
            weights.append(lse.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)[self.places], torch.cat(weights)[self.places]


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory ran out, a GPU's or the machine's."""
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _MESSAGES)


def keep_freed_memory() -> None:
    """Lets the C library keep freed memory for the next pass: fresh pages cost a CPU 5 % of its time."""
    with suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2**25)  # bytes; the most that glibc takes, and what it comes to by itself
        mallopt(_TRIM_THRESHOLD, 2**30)


def free_bytes(device: torch.device) -> float:
    """Returns the bytes that may be used: nine tenths of what a GPU has free, half of what the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 0.9
    return psutil.virtual_memory().available * 0.5
