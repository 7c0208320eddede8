"""What stands beside a number that was made in a hurry, or on toy data: in figures, tables and reports."""
from collections.abc import Iterable
from typing import Any

TOYS = ("digits", "digit_scenes")               # embedded data sets: to see that everything runs and is learned


def caveat(data: str = "", quick: bool = False) -> str:
    """The sentence for results on a data set (its name), made with a notebook's quick settings or not; or ""."""
    toy = data in TOYS
    if quick:
        return f"quick{', toy data' if toy else ''}: says nothing about quality"
    return "toy data: says nothing about other models and images" if toy else ""


def with_caveat(text: str, data: str = "", quick: bool = False) -> str:
    """A caption, and the caveat on a line of its own where there is one."""
    return "\n".join(part for part in (text, caveat(data, quick)) if part)


def caveat_of(rows: Iterable[Any]) -> str:
    """The sentence for a table of result rows, which are read beside each other: one such row is enough."""
    rows = list(rows)
    toys = [row.dataset for row in rows if row.dataset in TOYS]
    return caveat(toys[0] if toys else "", any(is_quick(row) for row in rows))


def is_quick(row: Any) -> bool:
    """Whether a result row says of itself, or of its speed, that it was made quickly."""
    return bool(row.conditions.get("quick") or row.conditions.get("speed", {}).get("quick"))
