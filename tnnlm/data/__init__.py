"""Data pipeline: text sources, tokenized and packed corpora, labelled sequences, and data loaders."""
