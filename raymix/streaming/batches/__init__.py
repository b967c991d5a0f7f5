"""From blocks to the batches of one rank: `stream` is the entry, `packed` and `documents` build."""
