"""What a training needs: memory counted exactly for a batch, time measured here and estimated elsewhere.

    python benchmarks/scale.py [--quick]

Memory: weights, gradients, Adam's two moments, the moving average and the teacher from the parameters; activations by
counting each tensor that autograd keeps, in a real forward of the model on the CPU (autocast to bfloat16, as on a GPU).
Time: training steps in float32 on this CPU; on a GPU estimated from the multiply-adds, three forwards a step (one of
the model, two for its backward) and one of the teacher, at UTILISATION of the bfloat16 peak that its maker states, and
so marked. Rows: benchmarks/results/scale.jsonl.
"""
import argparse
import time
from pathlib import Path

import torch

from vitlab.measure.throughput import conditions
from vitlab.models import shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.runtime.files import write_lines
from vitlab.training.recipes import recipe

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
PEAK_TFLOPS = {"A100": 312, "H100": 989}            # bfloat16, dense, from their data sheets
# of the peak; what well-tuned ViT trainings reach lies between 0.3 and 0.5
UTILISATION = 0.35
IMAGES, GB = 1_281_167, 1e9
RESULTS = Path(__file__).parent / "results" / "scale.jsonl"


def kept_bytes(model: torch.nn.Module, batch: int) -> int:
    """Bytes that autograd keeps of a forward, parameters left out."""
    seen, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor
    images = torch.randn(batch, 3, *model.patch_embed.img_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().sum()
    found = sum(seen.values())
    del loss
    return found


def train_rate(model: torch.nn.Module, batch: int, steps: int) -> float:
    """Images/s of forward, backward and AdamW in float32."""
    optimizer, images = torch.optim.AdamW(model.parameters()), torch.randn(batch, 3, *model.patch_embed.img_size)
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(images).logsumexp(1).mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return batch / min(seconds[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two smaller models")
    args = parser.parse_args()
    rows = []
    for name in MODELS[:2] if args.quick else MODELS:
        model = create_model(name).train()
        parameters, macs = sum(p.numel() for p in model.parameters()), gmacs(CompressionPlan.empty(shape_of(model)))
        few, more = kept_bytes(model, 1), kept_bytes(model, 3)
        model.set_grad_checkpointing(True)
        few_ckpt, more_ckpt = kept_bytes(model, 1), kept_bytes(model, 3)
        model.set_grad_checkpointing(False)
        per_image, per_image_ckpt = (more - few) / 2, (more_ckpt - few_ckpt) / 2
        cpu = train_rate(model, 4, 2)
        # an image of a step, with a teacher as large
        flops = 2 * macs * 1e9 * (3 + 1)
        row = {"model": name, "params_m": parameters / 1e6, "gmacs": macs, "state_gb": parameters * 20 / GB,
               "activations_mb": per_image / 1e6, "activations_checkpointed_mb": per_image_ckpt / 1e6, "cpu_img_s": cpu,
               "conditions": conditions(torch.device("cpu"), "float32", 4, 2)}
        for gpu, peak in PEAK_TFLOPS.items():
            row[f"{gpu}_img_s"] = UTILISATION * peak * 1e12 / flops
        finetune = recipe("deit_tiny_pm").epochs * IMAGES
        row["finetune_hours"] = {"8 x A100": finetune / row["A100_img_s"] / 8 / 3600,
                                 "1 x A100": finetune / row["A100_img_s"] / 3600,
                                 "16 x H100": finetune / row["H100_img_s"] / 16 / 3600}
        rows.append(row)
        print(f"{name:26s} {parameters / 1e6:6.1f} M, state {row['state_gb']:.2f} GB, {per_image / 1e6:.0f} MB an "
              f"image "
              f"({per_image_ckpt / 1e6:.0f} checkpointed), {cpu:.2f} images/s here, A100 about {row['A100_img_s']:.0f}",
              flush=True)
    write_lines(RESULTS, rows)
