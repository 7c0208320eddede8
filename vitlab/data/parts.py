"""Which images of train serve which purpose: one permutation, cut at fixed shares, so that nothing is chosen on the
images it was made from, and nothing reported on those it was chosen on.

The shares are of all of train, not of what a command asks for: commands given one after another with one seed (score,
search, calibrate) agree without knowing each other's numbers of images.
"""
from dataclasses import dataclass, field
from typing import Any

import torch

# Scores and refits take some hundred images each; a choice, or a number to report, needs fewer, and the same of both.
SHARES = {"score": 0.35, "calibrate": 0.35, "choose": 0.15, "report": 0.15}
FITTED = ("score", "calibrate")                 # what only fits: where its share is short, it goes on into the other's
STREAM, FEW = "of a stream, the first images serve every role", "which are too few to be divided"
LEAST = 8                                       # of fewer images there is not one for each role, and all serve all


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The images of each role, by number, and in words where they are fewer than asked for, or another role's too."""

    indices: dict[str, list[int]]
    said: tuple[str, ...] = field(default=())


def share_of(total: int, role: str) -> range:
    """Which places of the permutation of `total` images are a role's: divided at the rounded sums of SHARES."""
    ends = [round(total * sum(list(SHARES.values())[:count])) for count in range(len(SHARES) + 1)]
    at = list(SHARES).index(role)
    return range(ends[at], ends[at + 1])


def part(total: int, seed: int, limits: dict[str, int | None]) -> Parts:
    """The images of some roles of SHARES, out of `total`, for each at most so many (None: its share).

    All are places of one permutation by `seed`. "score" takes from the front of the first two shares, "calibrate" from
    their end, so that they meet only where both need more than half; "choose" and "report" take from the front of their
    own, and no more than it has. Below LEAST images every role takes from the front of all. What a role shares with
    another, or lacks, is `said`.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    indices, said = {}, []
    for role, limit in limits.items():
        own = share_of(total, role)
        if total < LEAST:
            indices[role] = order[:limit]
            continue
        wanted = len(own) if limit is None else limit
        places = own
        if role in FITTED:
            pool = range(share_of(total, FITTED[0]).start, share_of(total, FITTED[1]).stop)
            places = pool if role == FITTED[0] else pool[::-1]
        indices[role] = [order[place] for place in places[:wanted]]
        taken, over = len(indices[role]), len(indices[role]) - len(own)
        short = f" of the {wanted} asked for" if taken < wanted else ""
        other = f", {over} of them from the share of {FITTED[1 - FITTED.index(role)]}" if over > 0 else ""
        if short or other:
            said.append(f"{role} takes {taken} images{short}{other}")
    if total < LEAST and limits:
        said.append(f"{', '.join(limits)} {'share' if len(limits) > 1 else 'takes'} the same images, {FEW}")
    return Parts(indices=indices, said=tuple(said))


def reported_on(roles: dict[str, Any]) -> str:
    """The images of role "report" in words, from `ImageData.roles`: "on 32 other images", and where they serve every
    role, that they do; of a stream the number is the most that were read."""
    said = " ".join(roles.get("shared", ()))
    count = f"{'up to ' if STREAM in said else ''}{roles['report']}"
    return f"on {count} {'images, which it was chosen on too' if STREAM in said or FEW in said else 'other images'}"
