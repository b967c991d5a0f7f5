"""Process groups of the teams of ranks that may share a sequence."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from raymix.schedule import Layout

Team = tuple[int, ...]


class ContextParallelGroups:
    """The process group of each team that this rank is in.

    Every rank of the job makes the groups of all teams, in the same order, as
    `torch.distributed.new_group` asks: so one is made once per job, not per step.
    """

    def __init__(self, groups: Mapping[Team, dist.ProcessGroup] | None = None) -> None:
        """Hold groups by the ranks in them; without any, all sequences are local."""
        self._groups = dict(groups or {})

    @classmethod
    def of(cls, layout: Layout) -> ContextParallelGroups:
        """Return the groups of all teams that a layout allows; a collective over all ranks.

        Raises:
            ValueError: If the job has another number of ranks.
        """
        teams = [
            tuple(range(first, first + width))
            for width in layout.widths
            if width > 1
            for first in range(0, layout.ranks, width)
        ]
        if teams and dist.get_world_size() != layout.ranks:
            raise ValueError(f"{dist.get_world_size()} ranks for a layout of {layout.ranks}")
        groups = {team: dist.new_group(list(team)) for team in teams}
        # A rank outside of a team gets a number in place of its group.
        return cls(
            {t: group for t, group in groups.items() if isinstance(group, dist.ProcessGroup)}
        )

    def group(self, team: Team) -> dist.ProcessGroup:
        """Return the group of a team that this rank is in.

        Raises:
            KeyError: If no group was made for it.
        """
        return self._groups[team]
