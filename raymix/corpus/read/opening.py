"""Opening of files: decompressed, and refused where they are not UTF-8 or not what they say."""

from __future__ import annotations

import bz2
import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import zstandard

from raymix.corpus.read.lines import Source
from raymix.corpus.read.parts import FileSlice
from raymix.corpus.read.sources import SourceFile
from raymix.errors import CorpusError
from raymix.store.remote import files

# Input of the decompressor at a time: what comes out is some times as much.
_COMPRESSED_CHUNK = 1 << 16
_HEAD = 1 << 12
# zstd writes windows up to 2 GiB with --long=31; the decoder takes as much memory as it needs.
_ZSTD_WINDOW = 1 << 31
# The largest header of gzip's without its optional name.
_SHORT = 10

UTF8_BOM = b"\xef\xbb\xbf"
"""The byte order mark that some Windows tools write; it is no part of the text."""

_ENCODINGS = {
    # UTF-32 first: its mark begins with that of UTF-16.
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh91AY&SY": "bz2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1\x15": "Parquet",
    b"ARROW1\x00": "Arrow",
    b"%PDF-": "PDF",
}


class Decoder(Protocol):
    """A decompressor of one member: of zlib, bz2 or zstandard."""

    @property
    def eof(self) -> bool:
        """Return whether the member has ended."""
        ...

    @property
    def unused_data(self) -> bytes:
        """Return the bytes after the member's end."""
        ...

    def decompress(self, data: bytes, /) -> bytes:
        """Return what `data` adds."""
        ...


@contextlib.contextmanager
def opened(file_slice: FileSlice) -> Iterator[PeekableSource]:
    """Yield the content of a slice: decompressed from its beginning, or plain bytes.

    Plain files stand at the byte before the slice, as `lines_between` wants them.

    Raises:
        CorpusError: If the file begins as no UTF-8 text does.
        TrailingData: At the end, where something that is not compressed follows.
    """
    file = file_slice.file
    filesystem, path = files.locate(file.url)
    if file.compression:
        with filesystem.open_input_stream(path, compression=None) as raw:
            content = Decompressed(raw, file.compression)
            source = PeekableSource(content)
            _check_text(file, source.peek())
            yield source
        # gzip(1) ignores it with a warning: what came before is whole.
        if content.trailing:
            raise TrailingData(content.trailing)
        return
    with filesystem.open_input_file(path) as raw:
        if file_slice.low:
            raw.seek(file_slice.low - 1)
        source = PeekableSource(raw)
        if not file_slice.low:
            _check_text(file, source.peek())
        yield source


class TrailingData(Exception):
    """Something follows the compressed data of a file; the argument is how it begins."""


class PeekableSource:
    """A source whose first bytes can be seen before they are read."""

    def __init__(self, source: Source) -> None:
        """Read from `source`."""
        self._source = source
        self._head: bytes | None = None

    def peek(self) -> bytes:
        """Return the first bytes, up to 4 KiB; to be called before anything is read."""
        if self._head is None:
            self._head = read_up_to(self._source, _HEAD)
        return self._head

    def read(self, size: int, /) -> bytes:
        """Return some bytes, at most about `size`; none at the end."""
        head, self._head = self._head, None
        return head or self._source.read(size)


def read_up_to(source: Source, size: int) -> bytes:
    """Return `size` bytes or a little more, less only at the end of the source."""
    pieces: list[bytes] = []
    length = 0
    while length < size and (piece := source.read(size - length)):
        pieces.append(piece)
        length += len(piece)
    return b"".join(pieces)


class Decompressed:
    """Content of a compressed file: its members one after the other, as gzip(1) reads them.

    Zeros between and after the members are padding, of tapes and block devices. Anything else
    after the last member is not read, and `trailing` is how it begins.
    """

    def __init__(self, raw: Source, compression: str) -> None:
        """Read from `raw`, compressed by `gzip`, `zstd` or `bz2`."""
        self._raw = raw
        self._compression = compression
        self._decoder: Decoder | None = None
        self._rest = b""
        self._members = 0
        self.trailing = b""

    def read(self, size: int, /) -> bytes:
        """Return decompressed bytes; none at the end.

        Raises:
            OSError: If the file is damaged, or not compressed in this way.
        """
        while not self.trailing:
            if self._decoder is None and not self._begin_member():
                return b""
            if content := self._decompress():
                return content
        return b""

    def _begin_member(self) -> bool:
        """Return whether there is another member, having begun it."""
        magic, new = _DECODERS[self._compression]
        head = self._rest.lstrip(b"\0") if self._members else self._rest
        while len(head) < _SHORT and (chunk := self._raw.read(_COMPRESSED_CHUNK)):
            head += chunk
            head = head.lstrip(b"\0") if self._members else head
        self._rest = head
        if head and not head.startswith(magic):
            if not self._members:
                raise OSError(f"it is not {self._compression}, as its name says{_looks(head)}")
            self.trailing = head
        if not head or self.trailing:
            return False
        self._decoder = new()
        self._members += 1
        return True

    def _decompress(self) -> bytes:
        assert self._decoder is not None
        data, self._rest = self._rest or self._raw.read(_COMPRESSED_CHUNK), b""
        if not data:
            raise OSError("it ends within the compressed data: it was cut off")
        try:
            content = self._decoder.decompress(data)
        except (zlib.error, zstandard.ZstdError, OSError) as error:
            raise OSError(f"the compressed data is damaged: {error}") from error
        if self._decoder.eof:
            self._rest, self._decoder = self._decoder.unused_data, None
        return content


def _zstd() -> Decoder:
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


# Beginnings of a member, and its decoder. zstd's skippable frames (pzstd writes them) are members.
_DECODERS: dict[str, tuple[tuple[bytes, ...], Callable[[], Decoder]]] = {
    "gzip": ((b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=31)),
    "bz2": ((b"BZh",), bz2.BZ2Decompressor),
    "zstd": (
        (b"\x28\xb5\x2f\xfd", *(bytes([kind]) + b"\x2a\x4d\x18" for kind in range(0x50, 0x60))),
        _zstd,
    ),
}


def _check_text(file: SourceFile, head: bytes) -> None:
    """Raise CorpusError where a file begins as another encoding or a binary format does."""
    encoding = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)
    encoding = encoding or _unmarked_encoding(head)
    if encoding:
        plain = f"{file.url.rsplit('/', 1)[-1].removesuffix('.gz')}"
        raise CorpusError.at(
            "file",
            file.url,
            f"it is {encoding} (its first bytes are {head[:4].hex(' ')}), and UTF-8 is read",
            fix=f"convert it: iconv -f {encoding.removesuffix('LE').removesuffix('BE')} -t UTF-8 "
            f"{plain} > utf8-{plain}",
        )
    looks = _looks(head)
    if looks:
        raise CorpusError.at(
            "file",
            file.url,
            f"it is not {file.format}, as its name says{looks}",
            fix="give it the name's ending of what it is, or set `format` of its domain",
        )


def _unmarked_encoding(head: bytes) -> str | None:
    """Return the encoding of text whose every second byte is zero, as ASCII in UTF-16 is."""
    if len(head) < 8:
        return None
    even, odd = head[::2], head[1::2]
    if 2 * odd.count(0) > len(odd) and not even.count(0):
        return "UTF-16LE"
    return "UTF-16BE" if 2 * even.count(0) > len(even) and not odd.count(0) else None


def _looks(head: bytes) -> str:
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    return f": it begins as {kind} does" if kind else ""
