"""Token files of other tools, read where they lie: token ids end to end, and an index beside them.

Read `info` (facts of a file), `token_file` (a mapped file and its document edges), then the
parsers: `megatron`, `raw` (OLMo, nanoGPT, llm.c), `datatrove`, `litdata`, and `mds`, whose samples
are not end to end. `detect` tells formats apart; `blocks` presents files as blocks of a corpus.
"""
