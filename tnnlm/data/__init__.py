"""Text and labelled sequences as rows of tokens: sources, tokenized corpora, loaders."""
