"""Published distributions of sequence lengths, for planning without a corpus.

Each is a table of cumulative fractions of sequences by length, log-uniform inside a bin; the first
bin begins at 32 tokens unless the table says otherwise. Only the fractions are published: the
distribution inside a bin is assumed, and `longest` cuts the tails.
"""

from __future__ import annotations

import numpy as np

from raymix.errors import ScheduleError, did_you_mean
from raymix.schedule.layout import Ints

# Upper ends of bins in tokens with cumulative percentages of sequences.
_TABLES: dict[str, tuple[tuple[float, float], ...]] = {
    # Skrull (arXiv 2505.19609), table 1.
    "wikipedia": (
        (32, 0), (1024, 87.88), (4096, 99.34), (8192, 99.92), (32768, 99.99), (79872, 100),
    ),
    "lmsys": (
        (32, 0), (1024, 87.12), (4096, 99.35), (8192, 99.87), (32768, 99.98), (131072, 99.99),
        (307200, 100),
    ),
    "chatqa2": (
        (32, 0), (1024, 21.92), (4096, 31.48), (8192, 40.43), (32768, 99.86), (101376, 100),
    ),
    # The text of the Llama 3 report: 99.89 % short, under 1K on average, and 0.11 % about 37K.
    "llama3": ((32, 0), (4096, 99.89), (32768, 99.8901), (41984, 100)),
    # MagiAttention's doc_length_distribution.csv, 13.5 million documents.
    "magi": (
        (4, 0), (10, 0.22), (50, 3.13), (100, 8.33), (200, 18.56), (500, 46.75), (1024, 71.38),
        (2048, 87.03), (4096, 94.37), (8192, 97.42), (16384, 98.71), (32768, 99.56),
        (65536, 99.70), (131072, 99.86), (196608, 100),
    ),
    # Quantiles of the million Wikipedia lengths that FlexSP (ASPLOS 2025) plans with.
    "flexsp_wiki": (
        (16, 0), (39, 1), (67, 5), (87, 10), (146, 25), (347, 50), (862, 75), (2112, 90),
        (3721, 95), (10921, 99), (15987, 99.5), (37367, 99.9), (102060, 99.99), (1820000, 100),
    ),
    # LongAlign: 10,000 of 8K-64K (shape inside assumed) among 100,000 of ShareGPT (recalled).
    "longalign": ((32, 0), (1024, 55), (4096, 88), (8192, 90.9), (65536, 100)),
}  # fmt: skip


def known_distributions() -> tuple[str, ...]:
    """Return the names of the published distributions."""
    return tuple(_TABLES)


def sample_lengths(name: str, count: int, *, seed: int, longest: int | None = None) -> Ints:
    """Return `count` lengths in tokens drawn from a published distribution, shape (count,).

    Args:
        name: One of `known_distributions()`.
        count: Sequences to draw.
        seed: Seed of the sample.
        longest: Tokens to cut longer sequences to, as training does at its sequence length.

    Raises:
        ScheduleError: If no distribution has that name.
    """
    if name not in _TABLES:
        known = known_distributions()
        suggestion = did_you_mean(name, known)
        raise ScheduleError.at(
            "lengths",
            name,
            "not a distribution",
            allowed=f"Known: {', '.join(known)}",
            fix=suggestion,
        )
    ends, percentages = np.array(_TABLES[name]).T
    # Inverse transform sampling; linear in the logarithm makes a bin log-uniform.
    uniforms = np.random.default_rng(seed).random(count) * 100
    lengths = np.exp(np.interp(uniforms, percentages, np.log(ends))).astype(np.int64)
    return np.minimum(lengths, longest) if longest is not None else lengths
