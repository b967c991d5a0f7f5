"""Several runs of one recipe, side by side; the package itself can be called.

`raymix.tune(recipe)` is `raymix.tune.tuning.tune(recipe)`: small runs of many mixtures, a law, its
optimum, verified. `compare.compare` trains a recipe under several mixers.

Both make a `group` of runs: `variants` and `mixtures` say what is run, `planning` refuses what
cannot work before anything starts, `trials` runs it through Ray Tune, `results` reads the run
directories. Of a comparison, `comparison` does the statistics; of a search, `proxies` makes the
small runs (`proposing`: one by one), `record` keeps their mixtures, `learning` fits the law, and
`verifying` sets what it predicts beside what was measured. Only `trials` and what is built on it
load Ray, so nothing is imported here.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymix.recipe import Recipe
    from raymix.tune.record import IfExists


class _Callable(ModuleType):
    """A package that tunes when it is called, so that the public name can be `raymix.tune`."""

    def __call__(
        self,
        recipe: Recipe | str | os.PathLike[str],
        *,
        out: str | os.PathLike[str] | None = None,
        parallel: int | None = None,
        smoke: bool = False,
        if_exists: IfExists = "resume",
    ) -> dict[str, Any]:
        """Return what a search came to; see `raymix.tune.tuning.tune`."""
        from raymix.tune.tuning import tune

        return tune(recipe, out=out, parallel=parallel, smoke=smoke, if_exists=if_exists)


sys.modules[__name__].__class__ = _Callable
