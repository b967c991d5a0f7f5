"""The rows of the stream benchmark that need neither Ray nor another environment."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from tests.benchmarks._stream_common import (
    BATCH,
    DOMAINS,
    LENGTH,
    ROWS,
    WEIGHTS,
    Fill,
    fill_from,
    gather_fill,
    memmap,
    timed_row,
    weighted_order,
)


def torch_loader() -> Fill:
    """Return a plain DataLoader over a map-style data set, the order drawn beforehand."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Mapped(Dataset[Any]):
        def __init__(self) -> None:
            self.rows = memmap()

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, at: int) -> Any:
            return torch.from_numpy(self.rows[at].astype(np.int32))

    order = weighted_order(3, 60_000).ravel().tolist()
    loader = DataLoader(Mapped(), batch_size=BATCH, sampler=order)
    return fill_from(batch.numpy() for batch in loader)


def raymix_local() -> Fill:
    """Return raymix' stream in this process: no actors, blocks mapped from files."""
    from raymix.mixers import MixerContext, Planned
    from raymix.recipe.training import PackedData
    from raymix.streaming.batches.stream import MixtureStream
    from raymix.streaming.blocks.sources import LocalSource
    from raymix.streaming.controller.build import build_mixture_state
    from raymix.streaming.controller.local import LocalController
    from tests.benchmarks._stream_corpus import corpus

    data = corpus()
    tokens_D = np.full(DOMAINS, ROWS * LENGTH)
    context = MixerContext(data.domain_names, tokens_D, total_tokens=10**9, total_steps=10**6)
    state = build_mixture_state(Planned("fixed", [WEIGHTS]), context)
    stream = MixtureStream(
        data,
        PackedData(sequence_length=LENGTH, rows_per_step=BATCH),
        seed=1,
        rank=0,
        world_size=1,
        controller=LocalController(state),
        source=LocalSource(data, row_tokens=LENGTH),
    )
    return lambda staging: np.copyto(staging, stream.next().tokens)


ROWS_BY_NAME = {
    "numpy gather (reference)": gather_fill,
    "torch DataLoader": torch_loader,
    "raymix, without Ray": raymix_local,
}

if __name__ == "__main__":
    for name in json.loads(sys.argv[1]):
        print(json.dumps({"name": name, **timed_row(ROWS_BY_NAME[name])}), flush=True)
