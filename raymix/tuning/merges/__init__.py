"""Searching the numbers of a merge by held-out loss; specialists and their merges."""
