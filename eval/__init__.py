"""Answering and judging: backends, runs, review prompts, scores, and the results."""
