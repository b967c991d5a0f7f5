"""Blocks of tokens: the block plane (an actor), its cache policy, and how a rank reads blocks."""
