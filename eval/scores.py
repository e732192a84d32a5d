"""Face of `eval.judging.scores`, under its published name."""

from eval.judging.scores import parse_scores

__all__ = ["parse_scores"]
