"""Other loaders in the stream benchmark, run from an environment of their own.

Each reads the same rows in its own format, uncompressed, in one process, with the weights fixed:
none of them can change weights while it runs. `install` makes `.venv-peers`, torch first, as the
others would pull another one.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks._stream_common import (
    BATCH,
    CACHE,
    DOMAINS,
    LENGTH,
    ROOT,
    ROWS,
    WEIGHTS,
    Fill,
    fill_from,
    make_rows,
    memmap,
    timed_row,
)

VENV = ROOT / ".venv-peers"
_TORCH = "torch==2.13.0"
# Last: streaming pulls an old one, which the hub client that datasets needs does not go with.
_TRANSFORMERS = "transformers==5.23.0"


def install(names: list[str]) -> dict[str, str]:
    """Make the environment if need be; return the peers that cannot be installed, and why."""
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    noted = VENV / "installed.json"
    tried: dict[str, str] = json.loads(noted.read_text()) if noted.exists() else {}
    common = {"torch": ["numpy", "pyarrow"], "transformers": [_TRANSFORMERS]}
    for name in ["torch", *names, "transformers"]:
        packages = common[name] if name in common else PEERS[name][1]
        if name not in tried:
            print(f"... installing {' '.join(packages)}", file=sys.stderr, flush=True)
            done = subprocess.run(
                [str(python), "-m", "pip", "install", "--quiet", _TORCH, *packages],
                capture_output=True,
                text=True,
                check=False,
            )
            last = (done.stderr.strip() or "?").splitlines()[-1]
            tried[name] = last[:150] if done.returncode else ""
            noted.write_text(json.dumps(tried))
    return {name: tried[name] for name in names if tried[name]}


def torchdata_nodes() -> Fill:
    """Return torchdata's weighted sampler over eight shuffled map-style sources."""
    import torch
    from torch.utils.data import RandomSampler
    from torchdata.nodes import Batcher, Loader, MapStyleWrapper, MultiNodeWeightedSampler

    class Domain:
        def __init__(self, domain: int) -> None:
            self.rows = memmap()[domain * ROWS : (domain + 1) * ROWS]

        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, at: int) -> Any:
            return torch.from_numpy(self.rows[at].astype(np.int32))

    nodes = {}
    for domain in range(DOMAINS):
        source = Domain(domain)
        nodes[str(domain)] = MapStyleWrapper(source, RandomSampler(source))
    weights = {str(d): float(w) for d, w in enumerate(WEIGHTS)}
    mixed = MultiNodeWeightedSampler(nodes, weights, stop_criteria="CYCLE_FOREVER", seed=1)
    loader = Loader(Batcher(mixed, BATCH))
    return fill_from(torch.stack(batch).numpy() for batch in loader)


def grain_memmap() -> Fill:
    """Return grain's mix of eight shuffled, repeated sources."""
    import grain

    class Domain:
        def __init__(self, domain: int) -> None:
            self.rows = memmap()[domain * ROWS : (domain + 1) * ROWS]

        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, at: int) -> Any:
            return self.rows[at]

    sets = [grain.MapDataset.source(Domain(d)).shuffle(seed=d).repeat(20) for d in range(DOMAINS)]
    mixed = grain.MapDataset.mix(sets, weights=WEIGHTS.tolist()).batch(BATCH)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return fill_from(iter(mixed.to_iter_dataset(options)))


def litdata_combined() -> Fill:
    """Return litdata's combined streaming data set over token chunks."""
    from litdata import (
        CombinedStreamingDataset,
        StreamingDataLoader,
        StreamingDataset,
        TokensLoader,
    )

    sets = []
    for domain in range(DOMAINS):
        target = CACHE / "litdata" / str(domain)
        if not (target / "index.json").exists():
            _write_litdata(domain, target)
        loader = TokensLoader(block_size=LENGTH)
        sets.append(StreamingDataset(str(target), item_loader=loader, shuffle=True, seed=domain))
    mixed = CombinedStreamingDataset(sets, weights=WEIGHTS.tolist(), seed=1, iterate_over_all=False)
    loader = StreamingDataLoader(mixed, batch_size=BATCH, drop_last=True)
    epochs = (batch for _ in itertools.count() for batch in loader)
    return fill_from(batch.numpy() for batch in epochs if len(batch) == BATCH)


def _write_litdata(domain: int, target: Path) -> None:
    import torch
    from litdata import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    target.mkdir(parents=True, exist_ok=True)
    writer = BinaryWriter(
        str(target), chunk_bytes=64 << 20, item_loader=TokensLoader(block_size=LENGTH)
    )
    for at, tokens in enumerate(make_rows(domain)):
        writer[at] = torch.from_numpy(tokens)
    writer.done()
    writer.merge(1)


def mosaic_streaming() -> Fill:
    """Return mosaicml-streaming's mix by proportions, its own batching."""
    _stand_in_for_torchvision()
    from streaming import MDSWriter, Stream, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    streams = []
    for domain in range(DOMAINS):
        target = CACHE / "mds" / str(domain)
        if not (target / "index.json").exists():
            shutil.rmtree(target, ignore_errors=True)
            with MDSWriter(out=str(target), columns={"tokens": "ndarray:uint16"}) as out:
                for tokens in make_rows(domain):
                    out.write({"tokens": tokens})
        streams.append(Stream(local=str(target), proportion=float(WEIGHTS[domain])))
    dataset = StreamingDataset(streams=streams, shuffle=True, batch_size=BATCH)
    loader = DataLoader(dataset, batch_size=BATCH, collate_fn=lambda b: [x["tokens"] for x in b])
    return fill_from(np.stack(batch) for batch in loader)


def _stand_in_for_torchvision() -> None:
    """Let streaming be imported: it wants torchvision for images, which fails on CPU torch."""
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    for name in (f"torchvision{part}" for part in names):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, loader=None)
    vars(sys.modules["torchvision.transforms.functional"])["to_tensor"] = None
    vars(sys.modules["torchvision.datasets"])["VisionDataset"] = object


def hf_map_style() -> Fill:
    """Return Hugging Face map-style interleaving, shuffled."""
    import pyarrow as pa
    from datasets import Dataset, interleave_datasets

    sets = []
    for domain in range(DOMAINS):
        target = CACHE / "hf" / str(domain)
        if not target.exists():
            flat = pa.array(make_rows(domain).reshape(-1))
            table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, LENGTH)})
            Dataset(table).save_to_disk(str(target))
        sets.append(Dataset.load_from_disk(str(target)).shuffle(seed=domain))
    mixed = interleave_datasets(
        sets, probabilities=WEIGHTS.tolist(), seed=1, stopping_strategy="all_exhausted"
    ).with_format("numpy")

    def batches() -> Iterator[Any]:
        while True:
            for batch in mixed.iter(batch_size=BATCH, drop_last_batch=True):
                yield batch["tokens"]

    return fill_from(batches())


PEERS: dict[str, tuple[Callable[[], Fill], list[str]]] = {
    "torchdata nodes": (torchdata_nodes, ["torchdata==0.11.0"]),
    "grain": (grain_memmap, ["grain==0.2.18"]),
    "litdata": (litdata_combined, ["litdata==0.2.76"]),
    "mosaicml-streaming": (mosaic_streaming, ["mosaicml-streaming==0.13.0"]),
    "HF datasets, map-style": (hf_map_style, ["datasets==5.2.0"]),
}

if __name__ == "__main__":
    for name in json.loads(sys.argv[1]):
        print(json.dumps({"name": name, **timed_row(PEERS[name][0])}), flush=True)
