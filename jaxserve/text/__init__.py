"""Text on both sides of the model: tokenizers, chat templates, and incremental detokenization."""
