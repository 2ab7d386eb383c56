"""Examples: where they come from, and how they are divided among clients, public prompts and the test set."""
