"""Training: from a recipe to a run directory; the package itself can be called.

`raymix.train(recipe)` is `raymix.train.api.train(recipe)`. In the order in which to read them:
`preflight` says what a run would do, `api` does it, `setup` builds the parts of a rank's `loop`.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymix.recipe import Recipe
    from raymix.train.rundir import IfExists


class _Callable(ModuleType):
    """A package that trains when it is called, so that the public name can be `raymix.train`."""

    def __call__(
        self,
        recipe: Recipe | str | os.PathLike[str],
        *,
        if_exists: IfExists = "resume",
        report: bool = True,
    ) -> dict[str, Any]:
        """Return what a run came to; see `raymix.train.api.train`."""
        from raymix.train.api import train

        return train(recipe, if_exists=if_exists, report=report)


sys.modules[__name__].__class__ = _Callable
