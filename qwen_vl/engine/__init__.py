"""The batching engine: many requests at once through one model."""
