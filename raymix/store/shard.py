"""Shards: consecutive blocks of a split in one uncompressed Arrow IPC file.

Uncompressed, because a block is then a view of the mapped file: reading costs no more than the
pages touched. Arrow files have no checksums, so the metadata of each record batch holds the CRC-32
of its block, and every read verifies it: a flipped bit is found before it is trained on.
"""

from __future__ import annotations

import zlib
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymix.store.block import Block, block_schema
from raymix.store.manifest import ShardInfo
from raymix.store.remote import files

_CHECKSUM = b"crc32"
# Built once: comparing schemas is cheap, building one per open shard is not.
_SCHEMAS = (block_schema(np.uint16), block_schema(np.uint32))


def checksum(block: Block) -> int:
    """Return the CRC-32 of a block's tokens and starts."""
    # CRC-32 finds every burst of up to 32 flipped bits.
    return zlib.crc32(block.starts.data, zlib.crc32(block.tokens.data))


class ShardWriter:
    """Writes blocks to one shard, which appears under its name when closed without error.

    Used as a context manager; `info` describes the shard once it is closed.
    """

    info: ShardInfo

    def __init__(self, corpus: str, file: str, dtype: npt.DTypeLike) -> None:
        """Open the shard `file` (a path under the directory `corpus`) for ids of type `dtype`."""
        self._name = file
        self._blocks = self._tokens = 0
        # The hash of the manifest is computed while writing: no second pass over the file.
        self._file = files.AtomicFile(files.join(corpus, file))
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), block_schema(dtype))

    def write(self, block: Block) -> None:
        """Append one block.

        Raises:
            CorpusError: If the disk is full.
        """
        crc = {_CHECKSUM: b"%08x" % checksum(block)}
        self._writer.write_batch(block.to_batch(), custom_metadata=crc)
        self._blocks += 1
        self._tokens += len(block.tokens)

    def close(self) -> ShardInfo:
        """Finish the shard, give it its name and return its description."""
        self._writer.close()
        self._file.commit()
        digest = self._file.sha256.hexdigest()
        self.info = ShardInfo(
            file=self._name, blocks=self._blocks, tokens=self._tokens, sha256=digest
        )
        return self.info

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            # After a commit this does nothing.
            self._file.abort()


class ShardReader:
    """Random access to the blocks of one shard, memory-mapped where it is local."""

    def __init__(self, url: str) -> None:
        """Open the shard file.

        Raises:
            OSError: If it is absent or not an Arrow file.
            ValueError: If it is cut short, overwritten, or holds no blocks.
        """
        self._reader = pa.ipc.open_file(files.open_mapped(url))
        if self._reader.schema not in _SCHEMAS:
            raise ValueError(f"columns {self._reader.schema.names}, not those of a shard")
        self.blocks = self._reader.num_record_batches

    def read(self, row: int) -> Block:
        """Return block `row` of the shard.

        Raises:
            ValueError: If its content is not what was written.
        """
        batch, metadata = self._reader.get_batch_with_custom_metadata(row)
        # A damaged offset would otherwise read outside the mapped file and end the process.
        batch.validate(full=True)
        if batch.num_rows != 1 or batch.column("tokens").null_count:
            raise ValueError("not one block in the record batch")
        block = Block.from_table(batch)
        written = metadata.get(_CHECKSUM) if metadata else None
        actual = b"%08x" % checksum(block)
        if written != actual:
            raise ValueError(f"checksum {actual.decode()} is not the one written")
        return block
