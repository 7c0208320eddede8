"""What scoring every head and neuron by HSIC costs: beside a plain forward, and beside a loop that does one unit at a
time.

    python benchmarks/hsic_speed.py [weights.safetensors]

DeiT-Ti, batch 64, float32: 9,216 neurons and 36 heads. Without weights the model is random. Rows go to
benchmarks/results/hsic_speed.jsonl: medians over rounds that go through all in turn. The loops are timed for the first
UNITS neurons of one block and scaled to all: "formula" as methods B1 is written, "same code" the package's own, one
unit a call; "batched" is the same dependence of the block's neurons, scaled to all blocks. unit_scores does more: heads
too, magnitudes, and it keeps kernels until the output is known.
"""
import statistics
import sys
import time
from pathlib import Path

import torch

from vitlab.criteria.hsic import CHUNK, dependence, gaussian_kernels, units_first
from vitlab.measure.throughput import conditions
from vitlab.measure.units import unit_scores
from vitlab.models.create import create_model
from vitlab.models.support import shape_of
from vitlab.runtime.results import ResultRow, write_rows

NAME, REPEATS, BATCH, UNITS, BLOCK = "deit_tiny_patch16_224", 7, 64, 128, 5


def formula(x: torch.Tensor, output: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """trace(H K H L) of one unit: x (B, N), output L (B, B), center H (B, B)."""
    squared = torch.cdist(x, x).square()
    kernel = sum(torch.exp(-squared / (2 * sigma**2)) for sigma in (1, 2, 4, 8, 16)) / 5
    return torch.trace(center @ kernel @ center @ output)


@torch.no_grad()
def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model(NAME, weights=sys.argv[1] if len(sys.argv) > 1 else None).to(device)
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    targets, shape, hidden = torch.zeros(BATCH, dtype=torch.long, device=device), shape_of(model), []
    handle = model.blocks[BLOCK].mlp.fc2.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    y = model(images).softmax(dim=1)
    handle.remove()
    output, center = y @ y.T, torch.eye(BATCH, device=device) - 1 / BATCH
    steps = {
        "forward": lambda: model(images),
        "forward and unit_scores": lambda: unit_scores(model, [(images, targets)], progress=False),
        "batched": lambda: [dependence(gaussian_kernels(units_first(part)), y)
                            for part in hidden[0].split(CHUNK, dim=2)],
        "loop, formula": lambda: [formula(hidden[0][:, :, m], output, center) for m in range(UNITS)],
        "loop, same code": lambda: [dependence(gaussian_kernels(hidden[0][None, :, :, m]), y) for m in range(UNITS)],
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS + 1):                                # the first round warms up
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    scales = {"batched": shape.depth,
              **{name: shape.depth * shape.num_neurons / UNITS for name in steps if name.startswith("loop")}}
    seconds = {name: statistics.median(values[1:]) * scales.get(name, 1) for name, values in times.items()}
    added = statistics.median(b - a for a, b in zip(times["forward"][1:], times["forward and unit_scores"][1:]))
    print(f"unit_scores adds {added:.3f} s to the forward, {added / seconds['forward']:.2f} of it")
    rows = []
    for name, value in {**seconds, "unit_scores less the forward": added}.items():
        told = {"ratio": "time over that of the batched dependence", "of_forward": value / seconds["forward"],
                "weights": len(sys.argv) > 1}
        rows.append(ResultRow(model=f"{NAME} {name}", latency_ms=1000 * value, ratio=value / seconds["batched"],
                              conditions=conditions(device, "float32", BATCH, REPEATS) | told))
        print(f"{name}: {value:.3f} s, {rows[-1].ratio:.1f} times the batched dependence")
    write_rows(Path(__file__).parent / "results" / "hsic_speed.jsonl", rows)


if __name__ == "__main__":
    main()
