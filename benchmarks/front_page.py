"""The figure of the README: top-1 against speed of a DeiT-tiny right after compression, ours beside ToMe.

    python benchmarks/front_page.py             # from benchmarks/results/off_the_shelf.jsonl into docs/
"""
from pathlib import Path

from vitlab.plots import save_figure, trade_offs
from vitlab.runtime.files import read_lines

HERE = Path(__file__).parent
LINES = {"ToMe": "ToMe", "merging by content": "vitlab, merging by content"}


def main(folder: Path = HERE.parent / "docs") -> None:
    """front_page.png."""
    rows = read_lines(HERE / "results" / "off_the_shelf.jsonl")
    dense, shown = rows[0], [row for row in rows if row["family"] in LINES]
    speed, xlabel = dense["conditions"]["speed"], "times as fast as the dense model"
    lines = {label: [(row["ratio"], row["top1_pct"], row["top1_se"]) for row in shown if row["family"] == family]
             for family, label in LINES.items()}
    off = max(abs(end / row["ratio"] - 1) for row in shown for end in row["conditions"]["speed"]["ratio_range"])
    figure = trade_offs({xlabel: lines}, "ImageNet top-1 (%)", {xlabel: (1.0, dense["top1_pct"], dense["top1_se"])})
    figure.axes[0].set_ylim(72, 84)
    save_figure(figure, folder, "front_page", f"""\
DeiT-tiny right after compression, without any training; {dense["conditions"]["images"]} validation images.
Speed: {speed["device"]}, {speed["threads"]} threads, {speed["dtype"]}, batch {speed["batch_size"]}; medians, at worst \
{100 * off:.0f} % off (95 %)""")


if __name__ == "__main__":
    main()
