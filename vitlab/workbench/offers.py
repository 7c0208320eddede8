"""Offers: plans with what they are worth, the best of them within a budget, and their table and figure."""
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlab.measure.distance import output_of
from vitlab.plan import CompressionPlan, cost
from vitlab.runtime.files import InputError, write_lines

if TYPE_CHECKING:                               # what draws is loaded where it draws: every command knows of offers
    from matplotlib.figure import Figure

OFFERS, GMACS = "offers.jsonl", "GMACs per image"


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A plan and what it is worth, measured on images of train that it was neither made from nor chosen on, where
    they are enough to be divided (`vitlab.data.parts`)."""

    rule: str
    plan: CompressionPlan = field(repr=False)       # hundreds of lines
    gmacs: float
    agree_pct: float  # images, of a Segmenter pixels, of which the dense model says the same (`output_of`), 0 to 100
    distill_loss: float             # mean distance to the dense model
    chosen_by: float                # the same on the images to choose on, by which plans and offers are compared
    agree_se: float | None = None  # standard errors over images, in points and nats; None of a single image
    distill_loss_se: float | None = None


def worth_of(offer: Offer) -> dict[str, Any]:
    """The measures of an offer by name."""
    return {name: value for name, value in vars(offer).items() if name not in ("rule", "plan", "gmacs")
            and value is not None}


def best_offer(offers: Sequence[Offer], gmacs: float) -> Offer:
    """The one nearest to the dense model, on the images to choose on, among those that cost no more. Raises InputError
    where there is none."""
    within = [offer for offer in offers if offer.gmacs <= gmacs]
    if not within:
        least = f"; {min(offer.gmacs for offer in offers):.4g} is the least" if offers else ""
        raise InputError(f"no plan was found that costs {gmacs:.4g} GMACs or less{least}")
    return min(within, key=lambda offer: offer.chosen_by)


def write_offers(out: str | Path, offers: Sequence[Offer]) -> None:
    """out/offers.jsonl, a row each, and out/offers.png."""
    rows = [{"rule": o.rule, "gmacs": o.gmacs, **worth_of(o), "plan": json.loads(o.plan.to_json())} for o in offers]
    write_lines(Path(out) / OFFERS, rows)
    if offers:
        from vitlab.plots import save_figure
        save_figure(offers_figure(offers), out, "offers")


def offers_figure(offers: Sequence[Offer]) -> "Figure":
    """Agreement with the dense model against GMACs, a line per rule, with bars of one standard error."""
    from vitlab.plots import trade_offs
    lines: dict[str, list[tuple[float, float, float | None]]] = {}
    for offer in offers:
        lines.setdefault(offer.rule, []).append((offer.gmacs, offer.agree_pct, offer.agree_se))
    shape = offers[0].plan.shape
    label = f"{output_of(shape).agreement} (%)"
    figure = trade_offs({GMACS: lines}, label, {GMACS: (cost.gmacs(CompressionPlan.empty(shape)), 100.0)})
    axis, = figure.axes
    low, high = axis.get_ylim()
    axis.set_ylim(low, min(high, 100 + 0.04 * (100 - low)))                     # no bar leads above all images
    return figure
