"""An optimizer whose thirtieth step takes eight seconds, as if it waited for something."""

from __future__ import annotations

import time
from typing import Any

import torch


class LateAdam(torch.optim.Adam):
    """Adam, late once; plans try an optimizer for two steps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._steps = 0

    def step(self, closure: Any = None) -> Any:
        self._steps += 1
        if self._steps == 30:
            time.sleep(8)
        return super().step(closure)
