"""Mixtures without training: shares from how hard each domain's text is to predict.

Ge et al. 2024 (arXiv 2405.14908, "BiMix") propose r_i = exp(H_i) / sum_j exp(H_j) with H_i an
entropy of domain i in nats, and find the conditional one best. These are proxies: they know
neither the model nor what the mixture is for, so judge them by runs. Entropies counted with
different tokenizers cannot be compared. Joint entropies spread over several nats and von Neumann
ones over the log of the number of features; at temperature 1 their largest takes nearly all.

Shapes: D domains, N documents, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from raymix.errors import LawError, did_you_mean
from raymix.laws.table import Floats
from raymix.store.manifest import DomainInfo

Proxy = Literal["unigram", "joint", "conditional"]
"""Of a token; of a pair of tokens; of the next token given the current one."""


def entropy_shares(
    domains: Mapping[str, DomainInfo], proxy: Proxy = "conditional", *, temperature: float = 1.0
) -> dict[str, float]:
    """Return shares from the entropies that preparing a corpus counted, by domain.

    Args:
        domains: Those of a corpus' manifest: `manifest.domains`.
        proxy: Which entropy. The manifest has H(token) and H(next | current); the joint one is
            their sum.
        temperature: Nats; entropies are divided by it. Above 1 evens the shares out.

    Raises:
        LawError: If the proxy is unknown, the temperature is not above 0, or a domain is empty.
    """
    if proxy not in get_args(Proxy):
        raise LawError.at(
            "proxy",
            proxy,
            "no entropy",
            allowed=f"Known: {', '.join(get_args(Proxy))}",
            fix=did_you_mean(proxy, get_args(Proxy)),
        )
    for name, info in domains.items():
        if not info.train.tokens:
            raise LawError.at(
                f"corpus.domains.{name}.train.tokens",
                0,
                "has no tokens to count",
                fix="Leave it out",
            )
    unigram_D = np.array([info.train.unigram_entropy for info in domains.values()])
    conditional_D = np.array([info.train.bigram_entropy for info in domains.values()])
    entropy_D = {
        "unigram": unigram_D,
        "joint": unigram_D + conditional_D,
        "conditional": conditional_D,
    }[proxy]
    return dict(zip(domains, shares_of_entropy(entropy_D, temperature).tolist(), strict=True))


def shares_of_entropy(entropy_D: Floats, temperature: float = 1.0) -> Floats:
    """Return exp(H / temperature) / its sum, shape (D,), for entropies in nats, shape (D,).

    Raises:
        LawError: If the temperature is not above 0, or an entropy is not finite.
    """
    if not 0 < temperature < np.inf:
        raise LawError.at(
            "temperature", temperature, "not allowed", allowed="Allowed: a finite number above 0"
        )
    if not entropy_D.size or not np.isfinite(entropy_D).all():
        raise LawError.at("entropy", entropy_D.tolist(), "not finite numbers in nats")
    weight_D = np.exp((entropy_D - entropy_D.max()) / temperature)
    return weight_D / weight_D.sum()


def von_neumann_entropy(embedding_NF: Floats) -> float:
    """Return -sum_k l_k log l_k in nats, with l the eigenvalues of Z^T Z / tr(Z^T Z).

    It is 0 where all documents point one way, and log F where they spread evenly. Directions
    are all that counts where rows have length 1; center first if the mean direction should not.

    Args:
        embedding_NF: Z, one document per row, shape (N, F).

    Raises:
        LawError: If Z is no matrix of finite numbers, or all of it is 0.
    """
    if embedding_NF.ndim != 2 or not embedding_NF.size or not np.isfinite(embedding_NF).all():
        shape = embedding_NF.shape
        raise LawError.at("embedding", shape, "not a matrix of finite numbers")
    size = float(np.abs(embedding_NF).max())
    if not size:
        raise LawError.at("embedding", 0.0, "all of it is 0: no document has a direction")
    # Singular values squared are the eigenvalues, without squaring their rounding errors.
    power = np.linalg.svd(embedding_NF / size, compute_uv=False) ** 2
    share = power / power.sum()
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())
