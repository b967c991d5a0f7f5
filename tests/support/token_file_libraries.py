"""Write token files by the libraries that own the formats, and dump what their readers return.

Runs in an environment of its own, which `make .venv-formats` makes:

    .venv-formats/bin/python tests/support/token_file_libraries.py DIRECTORY

For each case a folder of files, and in `expected.npz` what the library read back from them:
`CASE/tokens`, `CASE/lengths` of its documents, `CASE/loss` where the format has a loss mask. Ids
are below 257, or 100,278 in the cases `*_large`; the highest is end-of-text.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SMALL, LARGE = 257, 100_278
PACKAGES = (
    "megatron-core", "ai2-olmo-core", "dolma", "datatrove", "mosaicml-streaming", "litdata",
    "datasets",
)  # fmt: skip


def documents(vocabulary: int, count: int = 12) -> list[np.ndarray]:
    """Return documents of 1 to 60 ids, end-of-text last."""
    random = np.random.default_rng(vocabulary)
    ids = [random.integers(0, vocabulary - 1, random.integers(0, 60)) for _ in range(count)]
    return [np.append(document, vocabulary - 1) for document in ids]


def loss_of(docs: list[np.ndarray]) -> list[np.ndarray]:
    return [np.arange(len(document)) >= len(document) // 2 for document in docs]


def result(docs: list[Any], loss: Any = None) -> dict[str, np.ndarray]:
    lengths = np.array([len(document) for document in docs])
    arrays = {"tokens": np.concatenate([np.asarray(d, np.int64) for d in docs]), "lengths": lengths}
    return arrays | ({} if loss is None else {"loss": np.asarray(loss, np.bool_)})


def megatron(folder: Path, vocabulary: int) -> dict[str, np.ndarray]:
    import torch
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDataset,
        IndexedDatasetBuilder,
    )

    docs = documents(vocabulary)
    prefix = str(folder / "text_document")
    builder = IndexedDatasetBuilder(prefix + ".bin", DType.optimal_dtype(vocabulary))
    for number, document in enumerate(docs):
        if number == 5:  # what `preprocess_data.py` makes of an empty text without --append-eod
            builder.add_document(torch.tensor([], dtype=torch.int64), [0])
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(prefix + ".idx")
    dataset = IndexedDataset(prefix, mmap=True)
    return result([dataset[number] for number in range(len(dataset))])


def olmo(folder: Path, vocabulary: int) -> dict[str, np.ndarray]:
    from dolma.tokenizer.data_types import TokenizerOutput
    from dolma.tokenizer.memmap_writer import MemmapWriter
    from olmo_core.data.utils import get_document_indices, load_array_slice

    dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    path = str(folder / "part-0-00000.npy")
    with MemmapWriter(path=path, dtype=np.dtype(dtype)) as writer:
        for number, document in enumerate(documents(vocabulary)):
            output = TokenizerOutput.from_tokens(
                id=str(number), src="a.jsonl.gz", loc=number + 1, tokens=document.tolist()
            )
            assert writer.write(output)
    return result(
        [load_array_slice(path, low, high, dtype) for low, high in get_document_indices(path)]
    )


def datatrove(folder: Path, vocabulary: int) -> dict[str, np.ndarray]:
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile
    from datatrove.utils.dataset import DatatroveFileDataset

    docs = documents(vocabulary)
    size = 2 if vocabulary <= 1 << 16 else 4
    masked = vocabulary == LARGE
    loss = loss_of(docs)
    file = TokenizedFile(
        str(folder), "00000_unshuffled.ds", save_loss_metadata=masked, token_size=size,
        save_final_metadata=True, tokenizer_name_or_path="gpt2",
    )  # fmt: skip
    for document, mask in zip(docs, loss, strict=True):
        file.write(document.tolist(), mask.astype(float) if masked else None)
    file.close()
    # A window that divides the file, as the reader leaves out an incomplete last one.
    window = next(size for size in range(2, len(file) + 1) if len(file) % size == 0)
    path = str(folder / "00000_unshuffled.ds")
    dataset = DatatroveFileDataset(path, seq_len=window - 1, token_size=size, return_positions=True)
    items = [dataset[at] for at in range(len(dataset))]
    stream = np.concatenate([np.asarray(item["input_ids"]) for item in items])
    position = np.concatenate([np.asarray(item["positions"]) for item in items])
    # The reader counts a window from 0 where its first document goes on from the one before.
    starts = np.flatnonzero(position == 0)
    starts = starts[np.isin(starts, [0, *file.doc_ends])]
    read = np.split(stream, starts[1:])
    return result(read, np.concatenate(loss) if masked else None)


def nanogpt(folder: Path, vocabulary: int) -> dict[str, np.ndarray]:
    # As data/openwebtext/prepare.py writes, and train.py reads.
    docs = documents(vocabulary)
    stream = np.concatenate(docs)
    array = np.memmap(folder / "train.bin", dtype=np.uint16, mode="w+", shape=(len(stream),))
    array[:] = stream
    array.flush()
    read = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
    return result(np.split(read, np.cumsum([len(d) for d in docs])[:-1]))


def llmc(folder: Path, vocabulary: int) -> dict[str, np.ndarray]:
    # As llm.c/dev/data/data_common.py writes (`write_datafile`), end-of-text first.
    docs = [np.roll(document, 1) for document in documents(vocabulary)]
    stream = np.concatenate(docs)
    magic, version, dtype = (
        (20240520, 1, np.uint16) if vocabulary == SMALL else (20240801, 7, np.uint32)
    )
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(stream)
    with open(folder / "fineweb_train_000001.bin", "wb") as file:
        file.write(header.tobytes())
        file.write(stream.astype(dtype).tobytes())
    return result(docs)


def mds(folder: Path, encoding: str, compression: str | None) -> dict[str, np.ndarray]:
    # streaming imports torchvision for its vision datasets only.
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms"):
        sys.modules.setdefault(name, types.ModuleType(name))
    functional = types.ModuleType("torchvision.transforms.functional")
    vars(functional)["to_tensor"] = None
    sys.modules.setdefault("torchvision.transforms.functional", functional)
    vars(sys.modules["torchvision.datasets"])["VisionDataset"] = object
    from streaming import LocalDataset, MDSWriter

    docs = documents(LARGE if encoding.startswith("ndarray") else SMALL)
    columns = {"id": "int", "name": "str", "tokens": encoding}
    options = {"compression": compression, "size_limit": 1500}
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for number, document in enumerate(docs):
            cell: Any = document.astype(np.int32 if "int32" in encoding else np.int64)
            cell = cell.tobytes() if encoding == "bytes" else cell
            writer.write({"id": number, "name": f"n{number}" * number, "tokens": cell})
    if compression:  # LocalDataset reads raw shards only
        return result(docs)
    dataset = LocalDataset(str(folder))
    cells = [dataset[number]["tokens"] for number in range(len(dataset))]
    return result([np.frombuffer(c, np.int64) if isinstance(c, bytes) else c for c in cells])


def litdata(folder: Path, vocabulary: int) -> dict[str, np.ndarray]:
    import torch
    from litdata.streaming import Cache, StreamingDataset, TokensLoader

    docs = documents(vocabulary)
    cache = Cache(str(folder), chunk_size=200, item_loader=TokensLoader(block_size=8))
    for number, document in enumerate(docs):
        cache[number] = torch.tensor(document, dtype=torch.int32)
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=1), shuffle=False)
    read = np.concatenate([np.asarray(dataset[at]) for at in range(len(dataset))])
    return result(np.split(read, np.cumsum([len(d) for d in docs])[:-1]))


def arrow(folder: Path, ending: str) -> dict[str, np.ndarray]:
    from datasets import Dataset, load_from_disk

    docs = documents(SMALL)
    loss = loss_of(docs)
    labels = [np.where(mask, d, -100).tolist() for d, mask in zip(docs, loss, strict=True)]
    rows = {"input_ids": [d.tolist() for d in docs], "labels": labels}
    dataset = Dataset.from_dict(rows)
    if ending == "parquet":
        dataset.to_parquet(str(folder / "data.parquet"))
        with tempfile.TemporaryDirectory() as cache:
            dataset = Dataset.from_parquet(str(folder / "data.parquet"), cache_dir=cache)
    else:
        dataset.save_to_disk(str(folder))
        dataset = load_from_disk(str(folder))
    read = result(dataset["input_ids"])
    return read | {"loss": np.concatenate([np.array(row) for row in dataset["labels"]]) != -100}


CASES = {
    # First: datasets looks for torchvision, of which `mds` makes a stand-in.
    "arrow": lambda folder: arrow(folder, "arrow"),
    "parquet": lambda folder: arrow(folder, "parquet"),
    "megatron": lambda folder: megatron(folder, SMALL),
    "megatron_large": lambda folder: megatron(folder, LARGE),
    "olmo": lambda folder: olmo(folder, SMALL),
    "olmo_large": lambda folder: olmo(folder, LARGE),
    "datatrove": lambda folder: datatrove(folder, SMALL),
    "datatrove_large": lambda folder: datatrove(folder, LARGE),
    "nanogpt": lambda folder: nanogpt(folder, SMALL),
    "llmc": lambda folder: llmc(folder, SMALL),
    "llmc_large": lambda folder: llmc(folder, LARGE),
    "litdata": lambda folder: litdata(folder, SMALL),
    "mds": lambda folder: mds(folder, "bytes", None),
    "mds_zstd": lambda folder: mds(folder, "bytes", "zstd:7"),
    "mds_large": lambda folder: mds(folder, "ndarray:int32", None),
    "mds_dynamic_large": lambda folder: mds(folder, "ndarray", None),
}


def main() -> None:
    warnings.simplefilter("ignore")
    target = Path(sys.argv[1])
    expected: dict[str, np.ndarray] = {}
    for name, write in CASES.items():
        (target / name).mkdir(parents=True)
        for key, array in write(target / name).items():
            expected[f"{name}/{key}"] = array
        print(name, flush=True)
    np.savez_compressed(target / "expected.npz", **expected)
    versions = {package: metadata.version(package) for package in PACKAGES}
    (target / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
