"""datatrove and nanotron: `NAME.ds` holds ids end to end, `NAME.ds.index` the ends of documents.

The index is uint64 per document, in ids; `NAME.ds.loss`, if there, one byte per id: 1 where it is
in the loss; `NAME.ds.metadata`, if there, names the tokenizer and the bytes per id. From
`datatrove.pipeline.tokens.tokenizer` 0.10.
"""

from __future__ import annotations

from pathlib import Path

from raymix.store.formats.info import (
    EdgesInfo,
    FileStamp,
    TokenFileInfo,
    TokenFileOptions,
    bad_file,
    check_dtype,
)
from raymix.store.formats.token_file import map_file, numbers


def datatrove_file(path: str, options: TokenFileOptions) -> TokenFileInfo:
    """Return the facts of a `.ds` file, from its index.

    Raises:
        CorpusError: If the index is missing, or not of this file.
    """
    stamp = FileStamp.of(path)
    if not Path(path + ".index").is_file():
        problem = f"its index {path}.index is missing"
        raise bad_file(path, problem, fix="restore it, or set format: nanogpt for ids without one")
    index = FileStamp.of(path + ".index")
    documents, rest = divmod(index.size, 8)
    if rest or not documents:
        raise bad_file(index.path, f"it is cut short: {index.size:,} bytes are no 8 per document")
    tokens = int(numbers(map_file(index), 8 * (documents - 1), 1, "<u8")[0])
    width, rest = divmod(stamp.size, tokens) if tokens else (0, 0)
    if rest or width not in (2, 4):
        side = "past the end of" if width < 2 else "not at the end of"
        problem = f"its index leads to token {tokens:,}, {side} the file of {stamp.size:,} bytes"
        raise bad_file(path, problem, allowed="2 or 4 bytes per token", fix="restore both")
    _check_metadata(path, tokens, width)
    loss = FileStamp.of(path + ".loss") if Path(path + ".loss").is_file() else None
    if loss is not None and loss.size != tokens:
        problem = f"it holds {loss.size:,} bytes, one for each of {tokens:,} tokens expected"
        raise bad_file(loss.path, problem)
    return TokenFileInfo(
        format="datatrove",
        file=stamp,
        dtype=check_dtype(path, "uint16" if width == 2 else "uint32", options),
        tokens=tokens,
        edges=EdgesInfo(file=index, offset=0, count=documents, dtype="<u8"),
        eos_at=options.eos_at or "end",
        loss=loss,
    )


def _check_metadata(path: str, tokens: int, width: int) -> None:
    metadata = Path(path + ".metadata")
    if not metadata.is_file():
        return
    lines = metadata.read_text("utf-8").splitlines()
    written = lines[0].rpartition("|")[2] if lines else ""
    # The bytes per id decide what every id is; the count tells files of two runs apart.
    if written.isdigit() and int(written) != width:
        raise bad_file(path, f"it has {width} bytes per token, {metadata} says {written}")
    if len(lines) > 1 and lines[1].isdigit() and int(lines[1]) != tokens:
        raise bad_file(path, f"it has {tokens:,} tokens, {metadata} says {int(lines[1]):,}")
