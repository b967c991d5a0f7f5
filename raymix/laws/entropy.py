"""Shares from the entropy of each domain's text, without training runs.

Ge et al. 2024 (arXiv 2405.14908, "BiMix") propose r_i = exp(H_i) / sum_j exp(H_j) with H_i an
entropy of domain i in nats, and report the best results for the conditional entropy. These are
proxies that ignore the model and the targets: check them by runs. Entropies counted with different
tokenizers are not comparable. Joint entropies differ by several nats between domains, von Neumann
entropies by up to the log of the number of features; at temperature 1 the domain with the largest
one gets nearly the whole share.

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
"""Entropy of a token; of a pair of tokens; of the next token given the current one."""


def entropy_shares(
    domains: Mapping[str, DomainInfo], proxy: Proxy = "conditional", *, temperature: float = 1.0
) -> dict[str, float]:
    """Return shares from the entropies in a corpus manifest, by domain.

    Args:
        domains: `manifest.domains` of a prepared corpus.
        proxy: The entropy to use. The manifest has H(token) and H(next | current); the joint
            entropy is their sum.
        temperature: Divisor of the entropies, in nats; above 1 makes the shares more uniform.

    Raises:
        LawError: If the proxy is unknown, the temperature is not above 0, a domain is empty, or its
            entropies were not counted.
    """
    if proxy not in get_args(Proxy):
        raise LawError.at(
            "proxy",
            proxy,
            "not an entropy",
            allowed=f"Known: {', '.join(get_args(Proxy))}",
            fix=did_you_mean(proxy, get_args(Proxy)),
        )
    # A domain without tokens has entropy 0 in the manifest, which would get a share all the same.
    for name, info in domains.items():
        if not info.train.tokens:
            raise LawError.at(
                f"corpus.domains.{name}.train.tokens",
                0,
                "has no tokens to count",
                fix="Leave it out",
            )
    unigram_D = _known(domains, "unigram_entropy")
    conditional_D = _known(domains, "bigram_entropy")
    entropy_D = {
        "unigram": unigram_D,
        "joint": unigram_D + conditional_D,  # chain rule of the entropy
        "conditional": conditional_D,
    }[proxy]
    return dict(zip(domains, shares_of_entropy(entropy_D, temperature).tolist(), strict=True))


def _known(
    domains: Mapping[str, DomainInfo], field: Literal["unigram_entropy", "bigram_entropy"]
) -> Floats:
    entropies = {name: getattr(info.train, field) for name, info in domains.items()}
    for name, entropy in entropies.items():
        if entropy is None:
            raise LawError.at(
                f"corpus.domains.{name}.train.{field}",
                None,
                "not counted, as the corpus is read in place",
                fix="Prepare it without corpus.in_place",
            )
    return np.array(list(entropies.values()), np.float64)


def shares_of_entropy(entropy_D: Floats, temperature: float = 1.0) -> Floats:
    """Return softmax(H / temperature), shape (D,), for entropies H in nats, shape (D,).

    Raises:
        LawError: If the temperature is not above 0, or an entropy is not finite.
    """
    if not 0 < temperature < np.inf:
        raise LawError.at(
            "temperature", temperature, "not allowed", allowed="Allowed: a finite number above 0"
        )
    if not entropy_D.size or not np.isfinite(entropy_D).all():
        raise LawError.at("entropy", entropy_D.tolist(), "not finite numbers in nats")
    # Less the largest, so that exp cannot overflow at low temperatures.
    weight_D = np.exp((entropy_D - entropy_D.max()) / temperature)
    return weight_D / weight_D.sum()


def von_neumann_entropy(embedding_NF: Floats) -> float:
    """Return -sum_k l_k log l_k in nats, with l the eigenvalues of Z^T Z / tr(Z^T Z).

    It is 0 where all documents have one direction, and log F where they spread evenly over all.
    Scale rows to length 1 to measure directions only; center them first to ignore the mean.

    Args:
        embedding_NF: Z, one document per row, shape (N, F).

    Raises:
        LawError: If Z is not a matrix of finite numbers, or is all 0.
    """
    if embedding_NF.ndim != 2 or not embedding_NF.size or not np.isfinite(embedding_NF).all():
        shape = embedding_NF.shape
        raise LawError.at("embedding", shape, "not a matrix of finite numbers")
    max_abs = float(np.abs(embedding_NF).max())
    if not max_abs:
        raise LawError.at("embedding", 0.0, "all of it is 0: no document has a direction")
    # Singular values squared are the eigenvalues of Z^T Z, without forming the product, which
    # squares rounding errors. Divided by the largest entry, so that squares stay in range.
    power = np.linalg.svd(embedding_NF / max_abs, compute_uv=False) ** 2
    share = power / power.sum()
    share = share[share > 0]  # 0 log 0 is 0 in the limit, NaN in floating point
    return float(-(share * np.log(share)).sum())
