"""A token's place and its request's rotary class in one number, which is all that vLLM gives a model for each token.

Dynamic NTK's alpha follows from the prompt's own length and then stays (class k has alpha `2 ** (k + 1) - 1`). vLLM
asks a model with `SupportsMRoPE` once per request for the positions of the prompt, and goes on from them with a delta:
so a token at place p of a request of class k has the position `k * STRIDE + p`.
"""

from collections.abc import Sequence

from qwen_vl.language import ntk_alpha

STRIDE = 2**20  # more than any prompt and answer together


def rotary_class(length: int, trained_length: int, *, dynamic_ntk: bool = True) -> int:
    """Returns the class of a prompt of `length` tokens; prompts may share a prefix only within one."""
    return (int(ntk_alpha(length, trained_length)) + 1).bit_length() - 2 if dynamic_ntk else 0


def class_alpha(number: int) -> int:
    """Returns dynamic NTK's alpha of a class."""
    return 2 ** (number + 1) - 1


def prompt_length(ids: Sequence[int], ending: Sequence[int]) -> int:
    """Returns the tokens of the prompt alone, of a request's ids with or without a part of its answer.

    After a preemption a model runner may give both together. An answer never holds the first id of the ending,
    `<|im_start|>`, because generation stops at it.

    Args:
        ids: A prompt that passed `check_prompt`, and what was generated after it.
        ending: What a prompt ends with.
    """
    last = len(ids) - 1 - list(reversed(ids)).index(ending[0])
    return last + len(ending)
