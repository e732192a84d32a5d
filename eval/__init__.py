"""Judging: prompts, scores, reports, and who answers or judges."""
