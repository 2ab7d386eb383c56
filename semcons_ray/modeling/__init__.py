"""Language models, adapters and sentence embeddings: the only importers of transformers, PEFT and sentence-transformers."""
