"""Process groups of the ranks that may share a document."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from raymix.schedule import Layout

RankGroup = tuple[int, ...]
"""Global ranks that share a document, increasing."""


class ContextParallelGroups:
    """The process groups that this rank is a member of, by their ranks.

    `torch.distributed.new_group` is a collective over all ranks of the job, members or not, so the
    groups are created once per job and not per step.
    """

    def __init__(self, groups: Mapping[RankGroup, dist.ProcessGroup] | None = None) -> None:
        """Wrap existing groups; without any, all documents must be local."""
        self._groups = dict(groups or {})

    @classmethod
    def of(cls, layout: Layout) -> ContextParallelGroups:
        """Create the groups of all widths of a layout; a collective over all ranks.

        Raises:
            ValueError: If the job has another number of ranks.
        """
        # The order is the same on all ranks: new_group matches its calls by order alone. Groups
        # begin at multiples of their width, as the slots of `Layout` do.
        rank_groups = [
            tuple(range(first, first + width))
            for width in layout.widths
            if width > 1
            for first in range(0, layout.ranks, width)
        ]
        if rank_groups and dist.get_world_size() != layout.ranks:
            raise ValueError(f"{dist.get_world_size()} ranks for a layout of {layout.ranks}")
        groups = {ranks: dist.new_group(list(ranks)) for ranks in rank_groups}
        # new_group returns a placeholder instead of a ProcessGroup to ranks outside the group.
        return cls(
            {
                ranks: group
                for ranks, group in groups.items()
                if isinstance(group, dist.ProcessGroup)
            }
        )

    def group(self, ranks: RankGroup) -> dist.ProcessGroup:
        """Return the process group of these ranks, this rank among them.

        Raises:
            KeyError: If no group was created for them.
        """
        return self._groups[ranks]
