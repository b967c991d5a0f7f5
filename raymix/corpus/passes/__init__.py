"""Passes over a corpus: choose_tokenizer, sample, tokenize, select, assemble, entropy."""
