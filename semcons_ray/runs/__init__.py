"""One run: its parts put together, its rounds, and its folder on disk or at a URL."""
