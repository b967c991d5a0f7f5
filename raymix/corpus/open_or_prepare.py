"""A corpus that is there, or is made on the way: what `train` and `compare` begin with."""

from __future__ import annotations

from collections.abc import Callable

from raymix.corpus.console import print_manifest, watching
from raymix.corpus.preparation import prepare
from raymix.recipe import CorpusConfig
from raymix.store import Corpus
from raymix.store.manifest import MANIFEST
from raymix.store.remote import files


def open_or_prepare(
    config: CorpusConfig, refuse: Callable[[], object], *, wait_minutes: float = 0
) -> Corpus:
    """Return the prepared corpus, preparing it first where there are sources and none is there.

    Args:
        config: The corpus of the recipe.
        refuse: Called before a corpus is prepared: raises if what it is for cannot work anyway.
        wait_minutes: Minutes to wait for a node with CPUs: see `prepare`.

    Raises:
        CorpusError: If it cannot be prepared, or is of another configuration.
    """
    if not config.domains or files.exists(files.join(config.path, MANIFEST)):
        prepare(config)  # refuses a corpus of another configuration; reads no source
        return Corpus.open(config.path)
    refuse()
    with watching() as listener:
        manifest = prepare(config, wait_minutes=wait_minutes, progress=listener)
    print_manifest(config.path, manifest)
    return Corpus.open(config.path)
