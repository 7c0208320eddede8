"""What it gives merging by content that tokens which stand for many patches count as less alike (vitlab.plan.matching).

    python benchmarks/by_size.py --weights FILE --model NAME --val IMAGENET_VAL [--gmacs 0.83 0.75 0.67 0.6] [--quick]

One ratio in the middle half of the blocks and the last block read out, as cut; distance to the dense model in nats and
top-1 less the dense one's on validation images, both without and with, and the differences of images' own. No image
chooses anything. Rows of the model go to benchmarks/results/by_size.jsonl, those of other models stay.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from tonight_quality import QUICK, Validation

from vitlab.measure.evaluate import each_divergence
from vitlab.models import compress, deploy, shape_of
from vitlab.plan import cost
from vitlab.runtime.files import read_lines, write_lines
from vitlab.runtime.uncertainty import standard_error
from vitlab.search import SearchSpace
from vitlab.workbench.cutting import least_ratio
from vitlab.workbench.steps import open_model

RESULTS = Path(__file__).parent / "results" / "by_size.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--weights", "--model", "--val"):
        parser.add_argument(option, required=True)
    parser.add_argument("--gmacs", type=float, nargs="+", default=[0.83, 0.75, 0.67, 0.6])
    parser.add_argument("--quick", action="store_true", help="few images; writes nothing")
    args = parser.parse_args()
    found = open_model(args.weights, model=args.model)
    model, shape = found.model.eval(), shape_of(found.model)
    validation = Validation(model, args.val, found, torch.device("cpu"), QUICK if args.quick else None)
    rows = []
    for limit in args.gmacs:
        each = {}
        for by_size in (False, True):
            space = SearchSpace(shape=shape, units=(), tokens="match", max_ratio=0.9, read_out=True,
                                settings={"by_size": by_size})
            plan = space.plan([least_ratio(space, limit, 400)])
            small = deploy(compress(model, plan))
            given = [validation.given(small, images) for images, _ in validation.batches]
            each[by_size] = (torch.cat([each_divergence(g, e) for g, e in zip(given, validation.expected)]).double()
                             .numpy(), 100 * (validation.right(given) - validation.dense))
        row = {"model": args.model, "gmacs_limit": limit, "gmacs": cost.gmacs(plan), "images": len(validation.dense)}
        for place, name in enumerate(("distill_loss", "against_dense")):
            without, counted = each[False][place], each[True][place]
            for what, values in (("without", without), ("by_size", counted), ("difference", counted - without)):
                row |= {f"{name}_{what}": float(np.mean(values)), f"{name}_{what}_se": standard_error(values)}
        rows.append(row)
        print(row, flush=True)
    if not args.quick:
        write_lines(RESULTS, [*(row for row in read_lines(RESULTS) if row["model"] != args.model), *rows])


if __name__ == "__main__":
    main()
