"""Face of `eval.judging.prompt`, under its published name."""

from eval.judging.prompt import review_prompts

__all__ = ["review_prompts"]
