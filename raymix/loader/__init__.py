"""`MixtureLoader`: the mixture as finished batches, for a training loop that is not raymix's.

Read in this order: `mixture_loader` (the object that a loop iterates over), `rank` (which part of a
batch a process reads), `opening` (corpus and stream), `tensors` (from a step's rows or documents to
tensors), `step_info` (figures of steps), `feedback` with `loss_sums` and `probe` (what adaptive
mixers learn from), `collectives` (values exchanged between ranks), `checks` (bad use).

One process needs no Ray, nor do several ranks with `torch.distributed`: each rank plans the same
steps and reads its own part.
"""

from raymix.loader.loss_sums import token_losses
from raymix.loader.mixture_loader import MixtureLoader
from raymix.loader.step_info import StepInfo

__all__ = ["MixtureLoader", "StepInfo", "token_losses"]
