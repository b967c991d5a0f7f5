"""Blocks of tokens: how a corpus divides into them, and how a rank gets them.

Read `geometry` (block numbers, rows and documents), `block_batch` (blocks in memory), `sources`
(the interface, and reading without Ray), then the block plane: `cache` (its policy), `datasource`
(reading by Ray Data), `actor` (both joined) and `shared_source` (the ranks' side).
"""
