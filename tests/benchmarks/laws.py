"""Mixing laws on public tables, beside laws fitted as others do: `python -m tests.benchmarks.laws`.

The tables lie in `../shared/data/mixtures` (`--data`); they are not ours to ship. Everything is
fitted in this run, on the same rows, on one thread; scores are of rows no fit has seen, means over
targets. `--quick` leaves out the peers and the subsets of rows.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from raymix.laws import MixtureTable, build_law, mean_score, read_table, scores
from raymix.laws.models.fitted_law import own_domains
from tests.benchmarks import _law_peers as peers
from tests.benchmarks._report import row, write_results
from tests.support.paths import SHARED_DATA

DATA = SHARED_DATA / "mixtures"
ROWS = (32, 64, 128, 256, 512)
SUBSETS = 5
SPLITS = 2
TRAIN_SHARE = 0.7
EARLY = 0.6
OURS = ("bimix", "exponential", "additive", "regression", "gp", "auto")
SINGLE = {
    "mean": peers.mean,
    "linear regression": peers.linear,
    "Data Mixing Laws, published fit": peers.mixing_laws,
    "additive, plain least squares": peers.additive,
    "LightGBM, RegMix": peers.lightgbm,
    "Gaussian process, sklearn": peers.process,
}
GROUPS = {
    "academic": ("arxiv", "nih_exporter", "philpapers", "pubmed_abstracts", "pubmed_central"),
    "prose": ("bookcorpus2", "books3", "pg19"),
    "dialogue": (
        "enron_emails",
        "europarl",
        "hackernews",
        "opensubtitles",
        "ubuntu_irc",
        "youtubesubtitles",
    ),
    "symbolic": ("dm_mathematics", "github", "stackexchange"),
    "internet": ("freelaw", "openwebtext2", "pile-cc", "uspto_backgrounds", "wikipedia_en"),
}
"""Losses of the 22-target table by the domain they are nearest to by name: our reading."""

Answer = tuple[np.ndarray, float]
Method = Callable[[MixtureTable, MixtureTable], np.ndarray]


def ours(kind: str) -> Method:
    def method(train: MixtureTable, test: MixtureTable) -> np.ndarray:
        law = build_law(kind)
        law.fit(train)
        chosen[kind] = law.kind
        return law.predict(test.share_RD, test.step_R)

    return method


chosen: dict[str, str] = {}


def theirs(peer: peers.Peer | None) -> Method:
    """Return a peer fitted target by target; None: BiMix on each target's own domain."""

    def method(train: MixtureTable, test: MixtureTable) -> np.ndarray:
        own_V, _ = own_domains(train)
        unit = 1.0 if train.step_R is None else np.exp(np.log(train.step_R).mean())
        step, late = (
            np.zeros(len(t)) if t.step_R is None else np.log(t.step_R / unit) for t in (train, test)
        )
        predictions = []
        for at in range(len(train.targets)):
            seen = np.isfinite(train.loss_RV[:, at])
            one = peer or peers.bimix_of(int(own_V[at]))
            shares, losses = train.share_RD[seen], train.loss_RV[seen, at]
            predictions.append(one(shares, step[seen], losses, test.share_RD, late))
        return np.stack(predictions, axis=1)

    return method


def measured(
    name: str, method: Method, pairs: Sequence[tuple[MixtureTable, MixtureTable]]
) -> tuple[np.ndarray, float]:
    """Return (rank correlation, R2, error in percent), means over pairs, and CPU s of one."""
    figures, began = [], time.process_time()
    for train, test in pairs:
        score = mean_score(scores(test, method(train, test)))
        figures.append((score.spearman, score.r2, 100 * score.mre))
    return np.array(figures), (time.process_time() - began) / len(pairs)


def single(data: Path, *, quick: bool) -> Iterator[dict[str, object]]:
    """Yield rows of the 17-domain table: 256 runs that were left out, from 32 to 512."""
    train, test = (read_table(data / f"pile17_1m_{part}.csv") for part in ("train", "test"))
    methods = {f"raymix {kind}": ours(kind) for kind in OURS}
    if not quick:
        methods |= {name: theirs(peer) for name, peer in SINGLE.items()}
    for count in (512,) if quick else ROWS:
        draws = [np.random.default_rng(k).permutation(512)[:count] for k in range(SUBSETS)]
        draws = [np.arange(512)] if count == 512 else draws
        pairs = [(train.rows(draw), test) for draw in draws]
        yield from table(f"17 domains, 1M, {count} runs", methods, pairs, "auto")


def steps(data: Path, *, quick: bool) -> Iterator[dict[str, object]]:
    """Yield rows of the 5-domain tables with checkpoints: unseen mixtures, and later steps."""
    methods = {
        f"raymix {kind}": ours(kind) for kind in ("bimix", "additive", "joint", "gp", "auto")
    }
    if not quick:
        methods |= {"BiMix, published fit": theirs(None), "joint of the notes": theirs(peers.joint)}
    for size in ("70M", "410M"):
        whole = read_table(data / "pile5_steps.csv", where={"size": size})
        whole = whole.rows((whole.step_R >= 9000) & (whole.step_R <= 30000))
        for kind, table_ in (("22 losses", whole), ("5 groups of them", grouped(whole))):
            names = np.array(table_.runs)
            runs = np.unique(names)
            pairs = []
            for seed in range(SPLITS):
                selected = np.random.default_rng(seed).permutation(len(runs))[
                    : int(TRAIN_SHARE * len(runs))
                ]
                use = np.isin(names, runs[selected])
                pairs.append((table_.rows(use), table_.rows(~use)))
            last = table_.step_R.max()
            ends = [(a, b.rows(b.step_R == last)) for a, b in pairs]
            yield from table(f"{size}, {kind}, unseen mixtures", methods, pairs, "auto")
            yield from table(f"{size}, {kind}, unseen, last step", methods, ends, "auto")
            first = table_.step_R.min()
            use = table_.step_R <= first + EARLY * (last - first)
            pair = [(table_.rows(use), table_.rows(~use))]
            yield from table(f"{size}, {kind}, later 40 % of steps", methods, pair, "auto")


def grouped(table_: MixtureTable) -> MixtureTable:
    """Return the table with the mean loss of each group in place of its losses."""
    whole = table_.rows(np.isfinite(table_.loss_RV).all(axis=1))
    means = [
        whole.loss_RV[:, [whole.targets.index(name) for name in names]].mean(axis=1)
        for names in GROUPS.values()
    ]
    return MixtureTable(
        domains=whole.domains,
        targets=tuple(GROUPS),
        runs=whole.runs,
        share_RD=whole.share_RD,
        loss_RV=np.stack(means, axis=1),
        step_R=whole.step_R,
    )


def table(
    title: str,
    methods: dict[str, Method],
    pairs: Sequence[tuple[MixtureTable, MixtureTable]],
    against: str,
) -> Iterator[dict[str, object]]:
    """Yield one row per method and print them; the ratio is of errors, to `auto`'s."""
    print(f"\n{title} ({len(pairs)} of them)" if len(pairs) > 1 else f"\n{title}")
    print(
        f"  {'':34s} {'rank corr.':>10s} {'R2':>8s} {'error %':>8s} {'CPU s':>7s}  error to auto's"
    )
    results: dict[str, tuple[np.ndarray, float]] = {}
    for name, method in methods.items():
        try:
            results[name] = measured(name, method, pairs)
        except (ImportError, ValueError) as error:
            print(f"  {name:34s} cannot: {str(error).splitlines()[0][:80]}")
    base = results[f"raymix {against}"][0][:, 2]
    for name, (figures, cpu) in results.items():
        rank, r2, error = figures.mean(axis=0)
        ratios = figures[:, 2] / base
        spread = (float(ratios.min()), float(ratios.max()))
        label = f"{name} ({chosen['auto']})" if name == "raymix auto" else name
        print(
            f"  {label:34s}{rank:11.4f}{r2:9.4f}{error:9.3f}{cpu:8.2f}  "
            f"{ratios.mean():.2f} ({spread[0]:.2f} to {spread[1]:.2f})",
            flush=True,
        )
        yield row(
            f"{title}: {name}",
            error,
            "% mean relative error",
            ratio=float(ratios.mean()),
            spread=spread,
            baseline="raymix auto",
        ) | {"spearman": rank, "r2": r2, "cpu_s": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=("rows", "steps"), help="only one of the two tables")
    options = parser.parse_args()
    if not options.data.exists():
        raise SystemExit(f"--data = {options.data}: not there")
    parts = {"rows": single, "steps": steps}
    names = [options.part] if options.part else list(parts)
    rows = [one for name in names for one in parts[name](options.data, quick=options.quick)]
    write_results("laws", rows)


if __name__ == "__main__":
    main()
