"""The page that a model has on the Hugging Face hub, written from what was measured and from what made it."""
import json
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vitlab.data.images import image_config, in_words
from vitlab.models.checkpoint import Checkpoint
from vitlab.models.segmenter import Segmenter
from vitlab.models.support import encoder_of
from vitlab.plan import BlockPlan, CompressionPlan, cost
from vitlab.runtime.caveats import is_quick
from vitlab.runtime.results import ResultRow, conditions_of, format_cell, notes, shown, titles, with_distance

COLUMNS = ("model", "dataset", "split", "top1_pct", "miou_pct", "gmacs", "params_m", "throughput_img_s", "ratio",
           "latency_ms")
UNTOLD = ("iou_pct", "versions", "quick")       # of the conditions: too long, said elsewhere
TASKS = {"miou_pct": ("image-segmentation", "mean_iou"), "top1_pct": ("image-classification", "accuracy")}
WIDEST = 400                                    # characters of a value that is shown of what made a model


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _head(found: Checkpoint, name: str, rows: Sequence[ResultRow], licence: str | None) -> str:
    results = [EvalResult(task_type=task, dataset_type=row.dataset, dataset_name=row.dataset, dataset_split=row.split,
                          metric_type=metric, metric_name=column, metric_value=round(getattr(row, column), 2))
               for row in rows if not is_quick(row) and row.conditions.get("limit") is None
               for column, (task, metric) in TASKS.items() if getattr(row, column) is not None]
    does = ("image-segmentation" if isinstance(found.model, Segmenter) else
            "image-classification" if found.model.num_classes else "image-feature-extraction")
    return ModelCardData(license=licence, library_name="vitlab", pipeline_tag=does, tags=["vitlab", "timm"],
                         model_name=name if results else None, eval_results=results or None).to_yaml()


def _cut(plan: CompressionPlan) -> str:
    cut = [block for block in plan.blocks if block != BlockPlan()]
    if not cut:
        return "nothing is cut"
    kinds = {"heads": any(block.heads is not None for block in cut),
             "neurons": any(block.neurons is not None for block in cut),
             "widths of queries": any(block.qk_width is not None for block in cut),
             "tokens": any(block.tokens is not None for block in cut)}
    return f"{', '.join(name for name, some in kinds.items() if some)} of {len(cut)} of {len(plan.blocks)} blocks cut"


def _measured(rows: Sequence[ResultRow]) -> str:
    if not rows:
        return "Nothing was measured of it: `vitlab evaluate` and `vitlab throughput` do that."
    columns = [name for name in with_distance(list(rows), COLUMNS)
               if name == "model" or any(getattr(row, name) not in (None, "") for row in rows)]
    under = [f"{row.model}, {row.dataset or 'speed'}: " + ", ".join(
        f"{key} {format_cell(value, '')}" for key, value in conditions_of(row).items()
        if key.split(".")[0] not in UNTOLD) for row in rows]
    return "\n\n".join(part for part in (
        _table(titles(list(rows), tuple(columns)), [[shown(row, name) for name in columns] for row in rows]),
        notes(list(rows), tuple(columns)), "Conditions:\n\n" + "\n".join(f"- {each}" for each in under)) if part)


def _made_by(found: Checkpoint) -> str:
    def lines(values: dict[str, Any], prefix: str = "") -> list[str]:
        return [line for key, value in values.items() for line in (
            lines(value, f"{prefix}{key}.") if isinstance(value, dict) else
            [f"- {prefix}{key}: {json.dumps(value, default=str)[:WIDEST]}"] if value not in (None, [], "") else [])]
    return "\n".join(lines({"plan": found.plan.made_by, **found.info.get("made_by", {}),
                            "versions": found.info.get("versions", {})}))


def model_card(found: Checkpoint, name: str, rows: Sequence[ResultRow] = (), *, licence: str | None = None,
               exported: Sequence[str] = ()) -> str:
    """Markdown of a checkpoint that is pushed as OWNER/NAME. rows: what was measured of it; licence: an identifier of
    the hub's (None: it is said that it is not known); exported: names of files for other runtimes beside it."""
    encoder, dense = encoder_of(found.model), CompressionPlan.empty(found.plan.shape)
    architecture = found.info["model"]["name"] if "model" in found.info else encoder.pretrained_cfg["architecture"]
    known = encoder.pretrained_cfg.get("license")
    prepared = in_words(image_config(encoder), resized=not isinstance(found.model, Segmenter))
    parts = {
        "": f"A {architecture}{' with a Segmenter decoder' if isinstance(found.model, Segmenter) else ''} made by "
            f"vitlab: {_cut(found.plan)}. Images: {prepared}.",
        "Cost": _table(("", "GMACs an image", "parameters (M)"),
                       [("dense", f"{cost.gmacs(dense):.4f}", "-"),
                        ("this model", f"{cost.gmacs(found.plan):.4f}",
                         f"{cost.params(found.model)['total'] / 1e6:.3f}")])
        + "\n\nGMACs: 10^9 multiply-adds of the deployed form, everything that is multiplied; one is two FLOPs.",
        "Measured": _measured(rows),
        "How it was made": _made_by(found),
        "Use": f"```python\nimport vitlab\n\nfound = vitlab.load(\"hf-hub:{name}\")\nmodel = vitlab.deploy(found.model)"
               f"    # found.plan says what was cut\n```" if not found.info.get("deployed") else
               f"```python\nimport vitlab\n\nmodel = vitlab.load(\"hf-hub:{name}\").model\n```",
        **({"Files for other runtimes": "\n".join(f"- `{each}`" for each in exported)} if exported else {}),
        "Licence": licence or "Not given by who pushed it; that of the dense model's weights and of the images counts."
                              + (f" timm's own weights of {architecture} have {known}." if known else "")}
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in parts.items())
    return f"---\n{_head(found, name, rows, licence)}\n---\n\n# {name.partition('/')[2]}\n\n{body}\n"
