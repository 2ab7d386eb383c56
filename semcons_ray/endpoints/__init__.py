"""Models behind OpenAI-compatible APIs: clients that are black boxes, and the judge of answers."""
