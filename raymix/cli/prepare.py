"""`raymix prepare`: turn text into a corpus of token blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymix.cli._run import (
    IfExists,
    Json,
    Overrides,
    RecipeSource,
    SetOverrides,
    load,
    run_command,
)

if TYPE_CHECKING:
    from raymix.store import Manifest


def command(
    recipe: RecipeSource,
    overrides: Overrides = None,
    set_overrides: SetOverrides = None,
    parallelism: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default=False,
            help="Tasks at a time on Ray; 0 works in this process. Default: all CPUs, or this "
            "process for a small corpus.",
        ),
    ] = None,
    if_exists: Annotated[
        IfExists,
        typer.Option(help="A corpus that is there: go on with it, refuse, or replace it."),
    ] = IfExists.RESUME,
    json: Json = False,
) -> None:
    """Tokenize, clean and shard the corpus of a recipe.

    Running it again goes on where it stopped, or does nothing when all is done. The result is the
    same to the byte however many tasks ran.
    """

    def work() -> dict[str, Any]:
        import time

        from raymix.corpus import prepare
        from raymix.corpus.console import print_manifest, watching

        loaded = load(recipe, overrides, set_overrides)
        config = loaded.corpus
        # Monotonic: setting the system's clock meanwhile must not change the duration.
        began = time.monotonic()
        with watching() as listener:
            manifest = prepare(
                config,
                parallelism=parallelism,
                address=loaded.cluster.address,
                wait_minutes=loaded.cluster.wait_minutes,
                if_exists=if_exists.value,
                progress=listener,
            )
        # After the listener is closed, whose live bar would draw over the summary.
        print_manifest(config.path, manifest)
        return document(config.path, manifest, seconds=time.monotonic() - began)

    run_command(work, json=json)


def document(path: str, manifest: Manifest, *, seconds: float) -> dict[str, Any]:
    """Return what `--json` prints: the manifest without its lists of files."""
    domains = manifest.model_dump()["domains"]
    for domain in domains.values():
        for split in ("train", "valid"):
            # Counted, not listed: a corpus may have thousands, and its manifest names them.
            domain[split]["shards"] = len(domain[split]["shards"])
        domain["token_files"] = len(domain["token_files"])
    return {
        "path": path,
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer.model_dump(),
        "block_tokens": manifest.block_tokens,
        "tokens": sum(info.train.tokens for info in manifest.domains.values()),
        "seconds": seconds,
        "domains": domains,
    }
