"""Review prompts, metrics and scores."""
