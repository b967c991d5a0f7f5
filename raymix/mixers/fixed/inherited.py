"""Shares of a run whose domains change: those that stay keep their proportions."""

from __future__ import annotations

from collections.abc import Mapping

from raymix.errors import RecipeError, did_you_mean
from raymix.mixers.base import Mixer, MixerContext, mixer
from raymix.mixers.by_name import some
from raymix.recipe.mixer import InheritMixer


def inherited_shares(
    config: InheritMixer, before: Mapping[str, float], tokens: Mapping[str, int]
) -> dict[str, float]:
    """Return the shares of a run from the step on at which its domains change, summing to 1.

    With s the sum of `config.added`, a domain that stays has (1 - s) times its share before, and so
    have the domains that one is split into, together; divided by the sum where a domain goes
    without parts.

    Args:
        config: The recipe's section.
        before: Share of each domain before.
        tokens: Training tokens of each domain from there on; their order is that of the result.

    Raises:
        RecipeError: If a new domain has no share, one that has is not new, or a domain to be split
            is not one that goes.
    """
    parts = {name: old for old, names in config.split.items() for name in names}
    _check_new(config, before, tokens, parts)
    share = {name: before[name] for name in tokens if name in before}
    for old, names in config.split.items():
        if old not in before or old in tokens:
            raise RecipeError.at(
                f"mixer.split.{old}",
                list(names),
                "not a domain that the run has read and reads no longer",
                allowed=f"Those are: {some([name for name in before if name not in tokens])}",
                fix=did_you_mean(old, before),
            )
        total = sum(tokens[name] for name in names)
        share |= {name: before[old] * tokens[name] / max(total, 1) for name in names}
    old_total, added = sum(share.values()), sum(config.added.values())
    if old_total <= 0:
        raise RecipeError.at(
            "mixer.kind",
            "inherit",
            "no domain with a share stays, nor a part of one",
            fix="Give the shares as static weights",
        )
    share = {name: value / old_total * (1 - added) for name, value in share.items()}
    return {name: (share | config.added)[name] for name in tokens}


def _check_new(
    config: InheritMixer,
    before: Mapping[str, float],
    tokens: Mapping[str, int],
    parts: Mapping[str, str],
) -> None:
    known = [name for name in (*config.added, *parts) if name in before or name not in tokens]
    if known:
        path = f"mixer.split.{parts[known[0]]}" if known[0] in parts else "mixer.added"
        raise RecipeError.at(
            path,
            known[0],
            "the run reads it already" if known[0] in before else "no domain of the corpus",
            allowed=f"New ones are: {some([name for name in tokens if name not in before])}",
            fix="Leave it out",
        )
    left = [
        name
        for name in tokens
        if name not in before and name not in config.added and name not in parts
    ]
    if left:
        raise RecipeError.at(
            "mixer.added",
            dict(config.added),
            f"{some(left)}: new in the run, without a share",
            fix=f"Give each one a share, as mixer.added.{left[0]}=0.1, or name it in mixer.split",
        )


@mixer("inherit")
def _inherit(config: InheritMixer, context: MixerContext) -> Mixer:
    raise RecipeError.at(
        "mixer.kind",
        "inherit",
        "its shares are those of a run whose domains change, and there is none",
        fix="Use it with raymix train RECIPE --domains-from STEP, or another mixer",
    )
