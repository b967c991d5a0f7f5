"""Cutting a stream of documents into blocks of equal size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raymix.store import Block, TokenArray


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """Consecutive tokens of a stream, shape (T,), and where documents start in them, (S,)."""

    tokens: TokenArray
    starts: npt.NDArray[np.int64]


def cut_blocks(pieces: Iterable[TokenPiece], block_tokens: int) -> Iterator[Block]:
    """Yield the stream as blocks of exactly `block_tokens` tokens; the last may be shorter.

    Joined again, the blocks are the stream: every token and every start once, in order.
    """
    pending: list[TokenPiece] = []
    size = 0
    for piece in pieces:
        tail = piece
        while size + len(tail.tokens) >= block_tokens:
            head, tail = _split(tail, block_tokens - size)
            yield _join([*pending, head])
            pending, size = list[TokenPiece](), 0
        if len(tail.tokens):
            pending.append(tail)
            size += len(tail.tokens)
    if pending:
        yield _join(pending)


def _split(piece: TokenPiece, at: int) -> tuple[TokenPiece, TokenPiece]:
    # side="left": a document that starts exactly at the cut belongs to the second piece.
    border = int(np.searchsorted(piece.starts, at))
    head = TokenPiece(piece.tokens[:at], piece.starts[:border])
    return head, TokenPiece(piece.tokens[at:], piece.starts[border:] - at)


def _join(pieces: list[TokenPiece]) -> Block:
    offsets = np.cumsum([0, *(len(piece.tokens) for piece in pieces)])
    starts = [piece.starts + offset for piece, offset in zip(pieces, offsets, strict=False)]
    # One piece is passed on as it is: concatenating would copy every token once more.
    tokens = pieces[0].tokens if len(pieces) == 1 else np.concatenate([p.tokens for p in pieces])
    return Block(np.ascontiguousarray(tokens), np.concatenate(starts).astype(np.uint32))


def clip(pieces: Iterable[TokenPiece], low: int, high: int) -> Iterator[TokenPiece]:
    """Yield the tokens [low, high) of the stream that starts with `pieces`."""
    position = 0
    for piece in pieces:
        end = position + len(piece.tokens)
        if position < high and end > low:
            clipped, _ = _split(piece, min(high - position, len(piece.tokens)))
            _, clipped = _split(clipped, max(low - position, 0))
            yield clipped
        position = end
