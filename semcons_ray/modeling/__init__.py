"""Language models, adapters, sentence embeddings: the only importers of transformers, PEFT, sentence-transformers."""
