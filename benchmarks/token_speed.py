"""Speed of Prune and Merge on DeiT-Ti and DeiT-S: dense, training form and deployed form, in turn in one process.

    python benchmarks/token_speed.py [--quick]

Random weights and random scores: speed does not depend on them beyond the counts. Rows go to
benchmarks/results/token_speed.jsonl (replaced), the figure to docs/token_speed.png. Run it with nothing else running.
"""
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from vitlab.criteria.planning import prune_and_merge
from vitlab.measure.throughput import conditions, measure
from vitlab.models import compress, deploy, shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plots import save_figure
from vitlab.plots.base import new_axes
from vitlab.runtime.results import ResultRow, format_table, write_rows

HERE = Path(__file__).parent
MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
KEEP_RATES, BATCHES = (0.7, 0.6), (32, 1)


def forms(name: str) -> dict[str, tuple[torch.nn.Module, float]]:
    """{label: (model, GMACs)} of one architecture, the dense one first."""
    dense = create_model(name)
    shape = shape_of(dense)
    scores = torch.rand(shape.depth, shape.num_patches, generator=torch.Generator().manual_seed(0)) + 0.1
    made = {"dense": (dense, gmacs(CompressionPlan.empty(shape)))}
    for keep in KEEP_RATES:
        plan = prune_and_merge(scores, shape, keep_rate=keep)
        trained = compress(dense, plan).eval()
        made[f"keep {keep} training form"] = (trained, gmacs(plan, "training"))
        made[f"keep {keep} deployed"] = (deploy(trained), gmacs(plan))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="DeiT-Ti at batch 32, 3 rounds; writes nothing")
    quick = parser.parse_args().quick
    settings = [("cpu", "float32")] + ([("cuda", "bfloat16")] if torch.cuda.is_available() else [])
    rows: list[ResultRow] = []
    for name in MODELS[:1] if quick else MODELS:
        for device, dtype in settings:
            for batch in BATCHES[:1] if quick else BATCHES:
                made, repeats = forms(name), 3 if quick else 15
                speeds = measure({k: m for k, (m, _) in made.items()}, batch_size=batch, repeats=repeats, dtype=dtype,
                                 device=device)
                base = made["dense"][1]
                for label, speed in speeds.items():
                    mac_ratio = base / made[label][1]
                    rows.append(ResultRow(
                        model=f"{name} {label}", gmacs=made[label][1], throughput_img_s=speed.throughput_img_s,
                        ratio=speed.ratio, latency_ms=speed.latency_ms,
                        conditions=conditions(torch.device(device), dtype, batch, repeats)
                        | {"mac_ratio": mac_ratio, "of_mac_ratio": speed.ratio / mac_ratio,
                           "peak_memory_mb": speed.peak_memory_mb, "ratio_range": [speed.ratio_min, speed.ratio_max]}))
                part = rows[-len(speeds):]
                print(format_table(part, ("model", "gmacs", "throughput_img_s", "latency_ms", "ratio")))
                print("of the MAC ratio:", ", ".join(f"{r.conditions['of_mac_ratio']:.2f}" for r in part),
                      f"({device}, batch {batch})\n")
    if quick:
        return
    write_rows(HERE / "results" / "token_speed.jsonl", rows)
    draw(rows)


def draw(rows: list[ResultRow]) -> None:
    """Throughput ratio against MAC ratio, one marker per form; on the diagonal, saved MACs are saved time."""
    figure, axes = new_axes(1, 1, 5.6, 4.4)
    axis = axes[0, 0]
    axis.axline((1, 1), slope=1, color="0.6", linestyle="--", label="saved MACs = saved time")
    groups = {(r.model.split()[-1], r.conditions["batch_size"], r.conditions["dtype"]) for r in rows
              if "dense" not in r.model}
    for (form, batch, dtype), marker in zip(sorted(groups), "osD^v<>p"):
        chosen = [r for r in rows if r.model.split()[-1] == form
                  and (r.conditions["batch_size"], r.conditions["dtype"]) == (batch, dtype)]
        axis.plot([r.conditions["mac_ratio"] for r in chosen], [r.ratio for r in chosen], marker, linestyle="none",
                  label=f"{'training form' if form == 'form' else form}, batch {batch}, {dtype}")
    axis.set(xlabel="dense GMACs / GMACs", ylabel="throughput / dense throughput")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small")
    threads = rows[0].conditions["threads"]
    save_figure(figure, HERE.parent / "docs", "token_speed", f"DeiT-Ti and DeiT-S at keep 0.7 and 0.6, {threads} CPU "
                                                             f"threads")
    plt.close(figure)


if __name__ == "__main__":
    main()
