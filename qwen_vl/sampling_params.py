"""The generation settings of checkpoints and requests, checked without loading anything."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOP_K = 50  # default of generate()
LEAST_TEMPERATURE = 1e-5  # logits divided by a smaller one are not finite
MAX_NEW_TOKENS = 512  # the released checkpoints' limit, for checkpoints without one
# Other generation settings of checkpoints that would change the texts, and that the engine does not support.
UNKNOWN = ("repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "num_beams", "min_p")
UNKNOWN += ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "bad_words_ids", "sequence_bias")
UNKNOWN += ("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")
UNKNOWN += ("min_length", "min_new_tokens", "guidance_scale", "exponential_decay_length_penalty")
NEUTRAL = (None, 0, 1, 1.0)  # these change nothing


@dataclass(frozen=True)
class SamplingSettings:
    """The settings that choose a request's tokens.

    Attributes:
        do_sample: False takes the most likely token, whatever the others say.
        temperature: Divides the logits, at least `LEAST_TEMPERATURE`.
        top_k: Keep so many tokens; 0 keeps all.
        top_p: Keep the most likely tokens up to this mass; 1 keeps all.

    Raises:
        ValueError: A used setting is invalid.
        TypeError: A setting is not a number.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.do_sample:
            return
        if not LEAST_TEMPERATURE <= self.temperature < math.inf:
            what = f"it must be at least {LEAST_TEMPERATURE:.5f} (for greedy use do_sample=False)"
            raise ValueError(f"temperature is {self.temperature}; {what}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (keep all) or more")


def check_limit(limit: object) -> int:
    """Returns the most tokens of an answer.

    Raises:
        ValueError: It is not a whole number above 0.
    """
    if type(limit) is not int or limit < 1:
        raise ValueError(f"max_new_tokens is {limit}; it must be a whole number, 1 or more")
    return limit


def unknown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's generation settings that change texts and that the engine does not support."""
    return {name: settings[name] for name in UNKNOWN if settings.get(name) not in NEUTRAL}


def first(*values: Any) -> Any:
    """Returns the first value that is not None."""
    return next(value for value in values if value is not None)
