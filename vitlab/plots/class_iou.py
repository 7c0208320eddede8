"""Figure of how well each class is segmented."""
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitlab.plots.base import as_array, bars, legend_above, new_axes
from vitlab.runtime.files import require
from vitlab.runtime.uncertainty import plus_minus

PER_ROW = 45                                    # classes in one row of bars, so that their names can be read


def class_iou_bars(ious: Mapping[str, Any], classes: Sequence[str], *, by: str | None = None,
                   errors: Mapping[str, float | None] | None = None) -> Figure:
    """IoU of each class in per cent: a group of bars per class, a bar per model; the legend has their means (mIoU),
    with the standard errors {model: points} that are known.

    ious {model: (K) in per cent, NaN for a class in neither the truth nor the prediction}. by: the model by whose IoU
    classes are sorted, the highest first; None: by number. A class that is NaN for all models is left out; below it is
    named, and so are those that are NaN for some. Raises InputError for what does not fit.
    """
    require(len(ious) > 0, "no model was given")
    values = {name: as_array(each) for name, each in ious.items()}
    for name, each in values.items():
        require(each.shape == (len(classes),),
                f"{name}: IoU of {each.shape}; one of each of {len(classes)} classes is needed")
        require(bool(((each >= 0) & (each <= 100) | np.isnan(each)).all()),
                f"{name}: an IoU is not in [0, 100] per cent")
    require(by is None or by in values, f"by is {by!r}; known are {list(values)}")
    gone = np.isnan(np.stack(list(values.values()))).all(axis=0)                # (K)
    left = [i for i in range(len(classes)) if not gone[i]]
    require(len(left) > 0, "no class has an IoU")
    if by is not None:
        left.sort(key=lambda i: -np.nan_to_num(values[by][i], nan=-1.0))
    rows = -(-len(left) // PER_ROW)
    some = -(-len(left) // rows)                                                # classes in a row
    turned, longest = some > 12, max(len(classes[i]) for i in left)
    figure, axes = new_axes(rows, 1, 9.4, 2.5 + (0.07 if turned else 0.03) * longest)
    for row, axis in enumerate(axes[:, 0]):
        chosen = left[row * some:(row + 1) * some]
        bars(axis, {f"{name}: mIoU {plus_minus(np.nanmean(each), (errors or {}).get(name), 1)}%": each[chosen]
                    for name, each in values.items()})
        axis.set_xticks(range(len(chosen)), [classes[i] for i in chosen], rotation=90 if turned else 35, fontsize=9,
                        ha="center" if turned else "right", rotation_mode=None if turned else "anchor")
        axis.set(ylabel="IoU (%)", ylim=(0, 100), xlim=(-0.6, some - 0.4))
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="y", alpha=0.3, linewidth=0.8)
        axis.set_axisbelow(True)
    legend_above(figure, *axes[0, 0].get_legend_handles_labels())
    absent = [("left out", gone), *((f"no bar of {name}", np.isnan(each) & ~gone) for name, each in values.items())]
    notes = [f"{what}: {', '.join(classes[i] for i in np.flatnonzero(which))}" for what, which in absent if which.any()]
    if notes:
        figure.supxlabel(fill(f"in neither truth nor prediction, {'; '.join(notes)}", 120), fontsize=9)
    return figure
