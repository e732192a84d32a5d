"""Chat with a character: an OpenAI-compatible server, a page and a terminal over one engine."""
