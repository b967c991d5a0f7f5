"""Tokenizers: built, trained, loaded and saved; texts become token ids in bulk."""
