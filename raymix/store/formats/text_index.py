"""Dolma's index of a `.npy` of token ids: a line `start,end,...` per document, compressed."""

from __future__ import annotations

import csv
import functools
import gzip
import io

import numpy as np
import numpy.typing as npt

from raymix.errors import CorpusError
from raymix.store.formats.info import FileStamp, bad_file


# Asked for the width of the ids, and again for the documents; a part may hold slices of two files.
@functools.lru_cache(maxsize=2)
def document_ends(index: FileStamp) -> npt.NDArray[np.int64]:
    """Return the end of each document in tokens, from a `.csv.gz`, shape (documents,).

    Raises:
        CorpusError: If it is damaged, or its documents leave gaps.
    """
    ends: list[int] = []
    last = 0
    try:
        with gzip.open(index.path) as raw:
            for row in csv.reader(io.TextIOWrapper(raw, "utf-8", newline="")):
                start, end = int(row[0]), int(row[1])
                if start != last or end < start:
                    problem = f"document {len(ends):,} is [{start:,}, {end:,}), {last:,} expected"
                    raise bad_file(index.path, problem)
                ends.append(end)
                last = end
    except CorpusError:
        raise
    except (OSError, EOFError, ValueError, IndexError, csv.Error) as error:
        raise bad_file(index.path, f"cannot be read as lines `start,end`: {error}") from error
    return np.array(ends, np.int64)
