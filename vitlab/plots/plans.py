"""Figures of plans: what they leave of each block, and what that costs, part by part."""
from collections.abc import Mapping

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from vitlab.plan import CompressionPlan, cost
from vitlab.plots.base import MARKERS, PALETTE, bars, legend_above, new_axes, stack
from vitlab.plots.colours import class_colours
from vitlab.runtime.files import require

GROWS = "attention"                             # the part that grows with the square of the tokens, drawn at the bottom


def kept_counts(plans: Mapping[str, CompressionPlan]) -> Figure:
    """Tokens that enter each block's attention, one line per plan, with the dense model's count."""
    figure, axes = new_axes(1, 1, 6.4, 3.4)
    axis, shape = axes[0, 0], next(iter(plans.values())).shape
    axis.axhline(shape.num_tokens, color="0.5", linestyle="--", label="dense")
    for (name, plan), marker in zip(plans.items(), MARKERS * len(plans)):
        axis.plot(range(shape.depth), plan.tokens_per_block(), marker=marker, label=name)
    axis.set(xlabel="block", ylabel="tokens in the block", xticks=range(shape.depth), ylim=(0, shape.num_tokens * 1.05))
    axis.legend(frameon=False, loc="lower left", ncols=2)
    return figure


def plan_bars(plans: Mapping[str, CompressionPlan]) -> Figure:
    """What stays per block, in percent of the dense model: heads, neurons, tokens in the attention, and, where a plan
    cuts them, widths of queries and keys; a bar per plan. 0: the attention or MLP is left out."""
    counts = {name: cost.counts_of(plan) for name, plan in plans.items()}
    kinds = {"heads\nkept (%)": ("heads", "num_heads"), "neurons\nkept (%)": ("neurons", "num_neurons"),
             "tokens in\nattention (%)": ("attended", "num_tokens")}
    if any(block.qk_width for plan in plans.values() for block in plan.blocks):
        kinds["widths of\nqueries (%)"] = ("widths", "head_dim")
    figure, axes = new_axes(len(kinds), 1, 9.4, 1.8)
    depth = max((plan.shape.depth for plan in plans.values()), default=1)
    for axis, (label, (count, whole)) in zip(axes[:, 0], kinds.items()):
        bars(axis, {name: 100 * getattr(counts[name], count) / getattr(plan.shape, whole)
                    for name, plan in plans.items()})
        axis.set(ylabel=label, ylim=(0, 100), xlim=(-0.6, depth - 0.4), xticks=range(depth), yticks=(0, 50, 100))
    axes[-1, 0].set_xlabel("block")
    legend_above(figure, *axes[0, 0].get_legend_handles_labels())
    return figure


def compare_plans(plans: Mapping[str, CompressionPlan], note: str = "") -> Figure:
    """`plan_bars`, and below it the MACs per image by part: a stacked bar for the dense model and for each plan, behind
    it its sum, in 10^9 or 10^6 MACs as the size asks for, and in percent of the dense model's. note: lines below."""
    figure = plan_bars(plans)
    dense = CompressionPlan.empty(next(iter(plans.values())).shape)
    macs = {name: cost.macs(plan) for name, plan in {"dense": dense, **plans}.items()}
    whole = macs["dense"]["total"]
    scale, unit = (1e9, "G") if whole >= 1e9 else (1e6, "M")
    height = 0.9 + 0.34 * len(macs)                                             # inches
    count = len(figure.axes)
    rows = figure.add_gridspec(count + 1, 1, height_ratios=(*(1.2,) * count, height))
    figure.set_size_inches(9.4, 1.2 * count + height + 1.6)
    for axis, row in zip(figure.axes, rows):
        axis.set_subplotspec(row)
    axis = figure.add_subplot(rows[count])
    # a part of no plan keeps its colour
    widths = {part: np.array([parts[part] for parts in macs.values()]) / scale for part in cost.PARTS}      # (plans)
    shown = {part: each for part, each in widths.items() if each.any()}
    stack(axis, shown, [PALETTE[list(widths).index(part) % len(PALETTE)] for part in shown], lying=True)
    ends = np.sum(list(shown.values()), axis=0)
    for place, parts in enumerate(macs.values()):
        axis.text(ends[place], place, f"  {parts['total'] / scale:.4g} {unit}, {parts['total'] / whole:.1%}",
                  va="center", fontsize=9)
    axis.set(yticks=range(len(macs)), xlabel=f"MACs per image, deployed ({unit})", xlim=(0, 1.2 * ends.max()))
    axis.set_yticklabels(macs, fontsize=10)
    axis.invert_yaxis()
    axis.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=8, frameon=False, fontsize=9, handlelength=1.2,
                columnspacing=1.2)
    sns.despine(ax=axis)
    figure.supxlabel(note, fontsize="small")
    return figure


def cost_by_part(bars: Mapping[str, Mapping[str, int]]) -> Figure:
    """MACs per image by part, a stacked bar for each of `bars` {label: {part: MACs}}, such as the resolutions a model
    works at: left in 10^9 or 10^6, right in per cent of its sum. What grows with the square of the tokens stands at
    the bottom. Raises InputError for no bar, one that sums to 0, or a negative number."""
    require(len(bars) > 0, "no bar was given")
    names = list(dict.fromkeys(part for parts in bars.values() for part in parts if part != "total" and parts[part]))
    names.sort(key=lambda part: part != GROWS)
    # (bars, parts)
    counts = np.array([[parts.get(part, 0) for part in names] for parts in bars.values()], dtype=np.float64)
    for label, row in zip(bars, counts):
        require(row.sum() > 0 and row.min() >= 0, f"{label}: MACs must be at least 0 and not all of them 0")
    sums = counts.sum(axis=1, keepdims=True)
    scale, unit = (1e9, "GMACs") if sums.max() >= 1e9 else (1e6, "10^6 MACs")
    colours = PALETTE if len(names) <= len(PALETTE) else class_colours(len(names))
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, bars)) * len(bars) > 45 else {}
    figure, (axes,) = new_axes(1, 2, 4.7, 3.8)
    for axis, values in zip(axes, (counts / scale, 100 * counts / sums)):
        stack(axis, dict(zip(names, values.T)), colours)
        axis.set_xticks(range(len(bars)), bars, fontsize=9, **turned)
    for place, whole in enumerate(sums[:, 0] / scale):
        axes[0].text(place, whole, f"{whole:.3g}", ha="center", va="bottom", fontsize=9)
    for place, share in enumerate(100 * counts[:, 0] / sums[:, 0]):
        if names[0] == GROWS and share >= 5:                                    # there is room for it
            axes[1].text(place, share / 2, f"{share:.0f}%", ha="center", va="center", fontsize=9, color="white")
    axes[0].set(ylabel=f"{unit} per image")
    axes[1].set(ylabel="share of the bar (%)", ylim=(0, 100))
    legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure
