"""Basis histograms over domains, which a mixer weighs in place of thousands of domains.

Axes: D domains, N histograms.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from raymix._utils.json import parse_json
from raymix.errors import RecipeError, did_you_mean
from raymix.mixers.adaptive.simplex import Floats
from raymix.mixers.base import MixerContext

_FORMS = (
    "A .json file maps names to {domain: share}, a .csv file has one column per domain and one "
    "row per histogram, an .npz file holds `histograms` (N, D) and perhaps `domains` (D)"
)
_PATH = "mixer.bases"
# Whatever a damaged or foreign file makes json, csv and numpy raise.
_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, BadZipFile, csv.Error,
)  # fmt: skip


def read_bases(
    source: str | Mapping[str, Mapping[str, float]], context: MixerContext, *, uniform: bool
) -> Floats:
    """Return the histograms, each scaled to sum to 1, shape (N, D).

    Args:
        source: A file, or shares by domain by name.
        context: What is known of the run.
        uniform: Append the uniform histogram over the domains that are mixed.

    Raises:
        RecipeError: If a histogram names no domain, is negative or empty, or has a target in it.
    """
    rows_ND = _read(source, context) if isinstance(source, str) else _by_name(source, context)
    # Without it, a domain that is in no histogram could never be read again.
    if uniform:
        mixed_D = context.mixed_D & (context.tokens_D > 0)
        rows_ND = np.vstack([rows_ND, mixed_D.astype(np.float64)])
    named = source if isinstance(source, str) else list(source)[:8]  # for messages
    shape = f"{rows_ND.shape[0]} histograms over {rows_ND.shape[1]} domains"
    if not np.isfinite(rows_ND).all() or (rows_ND < 0).any():
        raise RecipeError.at(_PATH, named, "a share is not a number >= 0")
    if not len(rows_ND) or (rows_ND.sum(axis=1) == 0).any():
        raise RecipeError.at(_PATH, named, "a histogram is empty", fix=f"Found {shape}")
    if (rows_ND[:, ~context.mixed_D] > 0).any():
        raise RecipeError.at(
            _PATH,
            named,
            "a histogram has a share in a target, which is never trained on",
            fix="Leave targets out of the histograms",
        )
    return rows_ND / rows_ND.sum(axis=1, keepdims=True)


def _by_name(bases: Mapping[str, Mapping[str, float]], context: MixerContext) -> Floats:
    index = {name: at for at, name in enumerate(context.domains)}
    rows_ND = np.zeros((len(bases), len(index)))
    for row, (basis, shares) in enumerate(bases.items()):
        for name, share in shares.items():
            if name not in index:
                near = did_you_mean(name, index)
                raise RecipeError.at(
                    f"{_PATH}.{basis}.{name}", share, "the corpus has no such domain", fix=near
                )
            rows_ND[row, index[name]] = share
    return rows_ND


def _read(path: str, context: MixerContext) -> Floats:
    readers = {".json": _read_json, ".csv": _read_csv, ".npz": _read_npz}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise RecipeError.at(_PATH, path, "not a known kind of file", fix=_FORMS)
    try:
        return reader(path, context)
    except RecipeError:  # a ValueError, too, but one that names its field already
        raise
    except _UNREADABLE as error:
        raise RecipeError.at(_PATH, path, f"cannot be read ({error})", fix=_FORMS) from error


def _read_json(path: str, context: MixerContext) -> Floats:
    raw: Any = parse_json(Path(path).read_text("utf-8"))
    return _by_name(raw, context)


def _read_csv(path: str, context: MixerContext) -> Floats:
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    named = {
        str(at): {name: float(share) for name, share in row.items()} for at, row in enumerate(rows)
    }
    return _by_name(named, context)


def _read_npz(path: str, context: MixerContext) -> Floats:
    # Pickled arrays would run code of whoever wrote the file.
    with np.load(path, allow_pickle=False) as arrays:
        rows_ND = np.asarray(arrays["histograms"], dtype=np.float64)
        domains = arrays["domains"].tolist() if "domains" in arrays else list(context.domains)
    if rows_ND.ndim != 2 or rows_ND.shape[1] != len(domains):
        raise ValueError(f"histograms of shape {rows_ND.shape} for {len(domains)} domains")
    return _by_name(
        {str(at): dict(zip(domains, row, strict=True)) for at, row in enumerate(rows_ND.tolist())},
        context,
    )
