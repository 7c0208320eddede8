"""What a scoring step costs: token scores against a plain forward and backward of the same model and batch, in turn.

    python benchmarks/score_cost.py

Rows go to benchmarks/results/score_cost.jsonl: seconds and ratio for DeiT-Ti and DeiT-S at batch 16.
"""
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from vitlab.measure.capture import token_scores
from vitlab.measure.throughput import conditions
from vitlab.models.create import create_model
from vitlab.runtime.results import ResultRow, write_rows

REPEATS, BATCH = 7, 16


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in ("deit_tiny_patch16_224", "deit_small_patch16_224"):
        model = create_model(name).to(device)
        images, targets = torch.randn(BATCH, 3, 224, 224,
                                      device=device), torch.zeros(BATCH, dtype=torch.long, device=device)

        def plain(model=model, images=images, targets=targets) -> None:
            F.cross_entropy(model(images), targets).backward()
            model.zero_grad(set_to_none=True)

        def scoring(model=model, images=images, targets=targets) -> None:
            token_scores(model, [(images, targets)], progress=False)

        times: dict[str, list[float]] = {"plain": [], "scoring": []}
        for _ in range(REPEATS + 1):                            # the first round warms up
            for key, step in (("plain", plain), ("scoring", scoring)):
                began = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[key].append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(times["plain"][1:], times["scoring"][1:])]
        rows.append(ResultRow(model=f"{name} token scores over forward and backward", ratio=statistics.median(ratios),
                              latency_ms=1000 * statistics.median(times["scoring"][1:]),
                              conditions=conditions(device, "float32", BATCH, REPEATS)
                              | {"ratio_range": [min(ratios), max(ratios)]}))
        print(f"{name}: {rows[-1].ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    write_rows(Path(__file__).parent / "results" / "score_cost.jsonl", rows)


if __name__ == "__main__":
    main()
