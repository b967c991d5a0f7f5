"""raymix decides what a language model reads next."""

__version__ = "0.1.0"
