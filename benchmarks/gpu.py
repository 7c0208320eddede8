"""What compression is worth on a GPU: inference of every rule against the dense model, training, scoring, and single
kernels.

    python benchmarks/gpu.py [--minutes 8] [--out benchmarks/results/gpu.jsonl] [--parts eager kernels steps compiled
    ...] [--quick]

Random weights and random scores: speed does not depend on them beyond the counts. Models are cast to bfloat16 whole,
images lie on the device. Rows are appended as they are measured, the most important first; what fails becomes a row
with its error, what does not fit into the time is named at the end. --quick: a tiny model, one repeat, to see that it
runs (on a CPU, too); written only with --out.
"""
import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tables import gpu as table
from tome import tome, tome_gmacs
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from vitlab.criteria.planning import prune_and_merge
from vitlab.measure.capture import token_scores
from vitlab.measure.throughput import Speed, conditions, measure, median_range
from vitlab.models import compress, deploy, shape_of
from vitlab.models.create import create_model
from vitlab.plan import CompressionPlan
from vitlab.plan.cost import gmacs
from vitlab.plan.shape import POOL_TOKEN, ViTShape
from vitlab.runtime.files import first_line
from vitlab.runtime.results import ResultRow, append_row
from vitlab.search import SearchSpace

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
TINY, SMALL, TI, BASE, LARGE = ("vit_nano_patch4_32", "deit_small_patch16_224", "deit_tiny_patch16_224",
                                "deit_base_patch16_224", "vit_large_patch16_224")
MORE_TOKENS = "vit_base_patch16_384"
SHARE = 0.6                                             # of the dense model's MACs, as near as counts allow
MERGED = f"Prune and Merge, keep {SHARE}"
MAIN = ("dense", MERGED, f"merging by content, {SHARE}", f"all together, {SHARE}", "ToMe")
# throughput ratios of arXiv 2503.23455 at keep 0.6; the last of MAE-B
PUBLISHED = {TI: 1.68, SMALL: 1.56, BASE: 1.67}
TOGETHER = 64                                           # neurons that matrix units like to have at a time
MODES = {"eager": None, "compiled": "default", "compiled, reduce-overhead": "reduce-overhead", "CUDA graph": None}
PARTS = ("eager", "kernels", "steps", "compiled", "large", "one")
# bfloat16 has 8 bits: attention differs by some of 2^-8 from float32's
AGREES = 2e-2
Make = Callable[[], tuple[nn.Module, float]]            # a model and its GMACs per image


def at_share(space: SearchSpace, dense: float, scores: dict[str, Tensor]) -> CompressionPlan:
    """The plan, one ratio for all dimensions, whose MACs are nearest to SHARE of the dense model's."""
    grid = np.linspace(0.005, space.max_ratio, 199)[:, None] * np.ones(space.size)
    return space.plan(grid[np.abs(space.gmacs(grid) - SHARE * dense).argmin()], **scores)


def in_groups(plan: CompressionPlan) -> CompressionPlan:
    """The plan with as many neurons in each block as the nearest multiple of TOGETHER."""
    def rounded(kept: tuple[int, ...] | None) -> tuple[int, ...] | None:
        every = range(plan.shape.num_neurons)
        count = min(max(round(len(kept or every) / TOGETHER), 1) * TOGETHER, len(every))
        return None if count == len(every) else tuple(every[:count])
    return dataclasses.replace(plan,
                               blocks=tuple(dataclasses.replace(b, neurons=rounded(b.neurons)) for b in plan.blocks))


def candidates(dense: nn.Module, shape: ViTShape) -> dict[str, Make]:
    """Every rule by name, the dense model first, then in order of importance."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(shape.depth, shape.num_patches, generator=draw) + 0.1
    units = {"heads": torch.rand(shape.depth, shape.num_heads, generator=draw),
             "neurons": torch.rand(shape.depth, shape.num_neurons, generator=draw)}
    total = gmacs(CompressionPlan.empty(shape))

    def merged(keep: float, form: str = "deployed") -> tuple[nn.Module, float]:
        plan = prune_and_merge(scores, shape, keep_rate=keep, boundary="reference", weights="reference", prune_rate=0.1)
        model = compress(dense, plan).eval()
        return (model, gmacs(plan, form)) if form == "training" else (deploy(model), gmacs(plan))

    def by(plan: CompressionPlan) -> tuple[nn.Module, float]:
        return deploy(compress(dense, plan)), gmacs(plan)

    def at(tokens: str, *cut: str) -> CompressionPlan:
        space = SearchSpace(shape=shape, units=cut, tokens=tokens, max_ratio=0.75 if tokens == "none" else 0.5,
                            read_out=tokens == "match" and shape.pool == POOL_TOKEN)
        return at_share(space, total, {unit: units[unit] for unit in cut})

    def by_tome() -> tuple[nn.Module, float]:
        prices = {r: tome_gmacs(dense, r) for r in range(1, shape.num_patches // 4)}
        r = min(prices, key=lambda r: abs(prices[r] - SHARE * total))
        return tome(dense, r), prices[r]
    return {"dense": lambda: (copy.deepcopy(dense), total),
            MERGED: lambda: merged(0.6), f"merging by content, {SHARE}": lambda: by(at("match")),
            f"all together, {SHARE}": lambda: by(at("match", "heads", "neurons")), "ToMe": by_tome,
            "shared updates, keep 0.6": lambda: by(prune_and_merge(scores, shape, keep_rate=0.6, prune_rate=0.0,
                                                                   share=True)),
            f"heads and neurons, {SHARE}": lambda: by(at("none", "heads", "neurons")),
            f"selection by class attention, {SHARE}": lambda: by(at("select")),
            "Prune and Merge, keep 0.7": lambda: merged(0.7), "Prune and Merge, keep 0.5": lambda: merged(0.5),
            f"{MERGED}, training form": lambda: merged(0.6, "training"),
            f"heads and neurons, {SHARE}, neurons in {TOGETHER}s": lambda: by(in_groups(at("none", "heads",
                                                                                           "neurons")))}


class Graphed(nn.Module):
    """A model whose forward is one CUDA graph, captured for these images."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model, self.patch_embed, self.in_chans, self.given = model, model.patch_embed, model.in_chans, x.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                model(self.given)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = model(self.given)

    def forward(self, x: Tensor) -> Tensor:
        self.given.copy_(x)
        self.graph.replay()
        return self.out


@torch.inference_mode()
def prepared(model: nn.Module, mode: str, x: Tensor) -> tuple[nn.Module, dict]:
    """(what runs the model in this mode; seconds until it did, what torch.compile left out, and the relative difference
    to eager)."""
    expected, began = model(x).float(), time.perf_counter()
    if mode == "eager":
        return model, {}
    counts = torch._dynamo.utils.counters
    counts.clear()
    made = Graphed(model, x) if mode == "CUDA graph" else torch.compile(model, dynamic=False, mode=MODES[mode])
    for _ in range(4):                                  # reduce-overhead: warm-up, recording, replays
        given = made(x)
    away = float((given.float() - expected).norm() / expected.norm())
    return made, {"prepared_s": time.perf_counter() - began, "difference": away,
                  "cudagraph_skips": counts["inductor"]["cudagraph_skips"],
                  "graph_breaks": [str(reason).splitlines()[0][:120] for reason in counts["graph_break"]]}


def in_turn(calls: dict[str, Callable[[], object]], device: torch.device, repeats: int,
            min_seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, in `repeats` rounds through all of them, by the GPU's events where there is one."""
    def once(call: Callable[[], object], runs: int) -> float:
        if device.type != "cuda":
            began = time.perf_counter()
            for _ in range(runs):
                call()
            return (time.perf_counter() - began) / runs
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        first.record()
        for _ in range(runs):
            call()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000 / runs
    runs = {}
    for name, call in calls.items():
        once(call, 2)
        runs[name] = max(1, round(min_seconds / max(once(call, 2), 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(once(call, runs[name]))
    return found


def backend_of(*given: Tensor, scale: float | None = None) -> str | None:
    """Which kernels scaled_dot_product_attention takes for query, key, value and mask; None where PyTorch does not
    say."""
    with contextlib.suppress(Exception):                # a private function of PyTorch's
        return torch.nn.attention.SDPBackend(torch._fused_sdp_choice(*given, scale=scale)).name
    return None


class OutOfTime(Exception):
    """Raised by the alarm, once all the time is spent."""


class Bench:
    """Measures, and appends each row at once."""

    def __init__(self, device: str, minutes: float, out: Path | None, quick: bool = False) -> None:
        self.device, self.out, self.quick = torch.device(device), out, quick
        self.deadline = time.monotonic() + 60 * minutes
        torch.manual_seed(0)
        self.repeats, self.min_seconds = (1, 0.0) if quick else (7, 0.1)
        self.batch = 2 if quick else 256
        self.rows: list[ResultRow] = []
        self.left_out: list[str] = []

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def add(self, model: str, batch: int, kind: str, found: dict | None = None, **fields: float | None) -> None:
        """One row, with what it was measured under."""
        quick = {"quick": True} if self.quick else {}
        under = conditions(self.device, "bfloat16", batch, self.repeats) | {"kind": kind} | (found or {}) | quick
        self.rows.append(ResultRow(model=model, conditions=under, **fields))
        if self.out is not None:
            append_row(self.out, self.rows[-1])
        speed = f"{fields['throughput_img_s']:.0f} images/s" if fields.get("throughput_img_s") else under.get("error",
                                                                                                              "")
        print(f"[{self.left():4.0f} s left] {model}: {speed} {fields.get('ratio') or ''}", flush=True)

    def failed(self, model: str, batch: int, kind: str, error: Exception) -> None:
        self.add(model, batch, kind, {"error": f"{type(error).__name__}: {first_line(error)}"})

    def dense(self, name: str) -> tuple[nn.Module, ViTShape]:
        with self.device:
            model = create_model(name)
        return model, shape_of(model)

    def images(self, model: nn.Module, batch: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, device=self.device).to(dtype)

    def models(self, name: str, batch: int, mode: str, only: tuple[str, ...] | None = None) -> None:
        """Rules of one architecture against the dense model, in turn."""
        dense, shape = self.dense(name)
        x, label = self.images(dense, batch), f"{name}, batch {batch}, {mode}"
        ready: dict[str, nn.Module] = {}
        about: dict[str, dict] = {}
        longest = 0.0
        for rule, make in candidates(dense, shape).items():
            if only is not None and rule not in only:
                continue
            if ready and self.left() < 1.5 * longest + self.repeats * 0.15 * (len(ready) + 1) + 3:
                self.left_out.append(f"{label}: {rule}")
                continue
            began = time.monotonic()
            try:
                model, cost = make()
                ready[rule], more = prepared(model.to(torch.bfloat16).eval(), mode, x)
                about[rule] = {"gmacs": cost, **more}
            except OutOfTime:
                raise
            except Exception as error:
                self.failed(f"{label}: {rule}", batch, "model", error)
            longest = max(longest, time.monotonic() - began)
        if "dense" not in ready:
            raise RuntimeError("the dense model could not be run, so there is nothing to compare with")
        speeds = measure(ready, batch_size=batch, repeats=self.repeats, warmup=1, dtype="bfloat16", device=self.device,
                         min_seconds=self.min_seconds, progress=False)
        for rule, speed in speeds.items():
            self.add_model(name, rule, batch, mode, speed, about[rule], about["dense"]["gmacs"])

    def add_model(self, name: str, rule: str, batch: int, mode: str, speed: Speed, about: dict, dense: float) -> None:
        mac_ratio = dense / about["gmacs"]
        # their memory lies in pools of their own
        pooled = mode in ("CUDA graph", "compiled, reduce-overhead")
        self.add(f"{name}, batch {batch}, {mode}: {rule}", batch, "model", {
            "of": name, "rule": rule, "mode": mode, "cast": "the whole model in bfloat16", "mac_ratio": mac_ratio,
            "of_mac_ratio": speed.ratio / mac_ratio, "ratio_range": [speed.ratio_min, speed.ratio_max],
            "peak_memory_mb": None if pooled else speed.peak_memory_mb,
            "published_ratio": PUBLISHED.get(name) if rule == MERGED else None,
            **{k: v for k, v in about.items() if k != "gmacs"}}, gmacs=about["gmacs"],
                 throughput_img_s=speed.throughput_img_s, latency_ms=speed.latency_ms, ratio=speed.ratio)

    def timed(self, title: str, batch: int, kind: str, calls: dict[str, Callable[[], object]],
              about: dict[str, dict] | None = None) -> None:
        """A row for each call, the first the baseline; batch: images of a call."""
        works, memory = {}, {}
        for name, call in calls.items():
            try:
                call()
                works[name] = call
                if self.device.type == "cuda":          # what a second call holds at most, beyond what lay there before
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    call()
                    memory[name] = {"call_memory_mb": (torch.cuda.max_memory_allocated() - before) / 2**20}
            except OutOfTime:
                raise
            except Exception as error:
                self.failed(f"{title}: {name}", batch, kind, error)
        if next(iter(calls)) not in works:
            raise RuntimeError(f"{title}: {next(iter(calls))} could not be run, so there is nothing to compare with")
        seconds = in_turn(works, self.device, self.repeats, self.min_seconds)
        first = seconds[next(iter(seconds))]
        for name, each in seconds.items():
            ratios, middle = [a / b for a, b in zip(first, each)], statistics.median(each)
            self.add(f"{title}: {name}", batch, kind,
                     {"of": title, "what": name, "ratio_range": list(median_range(ratios)),
                                                       **memory.get(name, {}), **(about or {}).get(name, {})},
                     latency_ms=1000 * middle, throughput_img_s=batch / middle, ratio=statistics.median(ratios))

    @torch.inference_mode()
    def size_mask(self, tokens: int, flex: bool = False) -> None:
        """Attention with log sizes added to the logits (12 heads of width 64): by a mask, or by more columns of queries
        and keys."""
        batch, heads, width = self.batch, 12, 64
        query, key, value = torch.randn(3, batch, heads, tokens, width, device=self.device).to(torch.bfloat16)
        logs = torch.randint(1, 9, (batch, tokens), device=self.device).float().log()
        coarse = logs.to(torch.bfloat16)
        mask = coarse[:, None, None]
        # (B, N, 2): 16 bits together
        both = torch.stack([coarse, (logs - coarse.float()).to(torch.bfloat16)], dim=-1)

        def widened(total: int) -> tuple[Tensor, Tensor, Tensor]:
            """q' k'^T = q k^T + sqrt(d) log size."""
            q, k, v = (F.pad(t, (0, total - width)) for t in (query, key, value))
            q[..., width:width + 2] = width ** 0.5
            k[..., width:width + 2] = both[:, None]
            return q, k, v

        def by_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, scale=width ** -0.5)[..., :width]

        def attention(mask: Tensor | None, *backend: torch.nn.attention.SDPBackend) -> Tensor:
            with torch.nn.attention.sdpa_kernel(list(backend)) if backend else contextlib.nullcontext():
                return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

        def sized(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + logs[b, j]
        calls = {"no mask": lambda: attention(None), "mask (B, 1, 1, N)": lambda: attention(mask)}
        about = {"no mask": {"backend": backend_of(query, key, value)},
                 "mask (B, 1, 1, N)": {"backend": backend_of(query, key, value, mask)}}
        for total in (72, 80):
            made, name = widened(total), f"columns, width {total}"
            calls |= {name: lambda total=total: by_columns(*widened(total)),
                      f"{name}, made before": lambda made=made: by_columns(*made)}
            about[name] = about[f"{name}, made before"] = {"backend": backend_of(*made, scale=width ** -0.5)}
        if self.device.type == "cuda":
            kinds = torch.nn.attention.SDPBackend
            for kind, given in ((kinds.FLASH_ATTENTION, (None,)), (kinds.EFFICIENT_ATTENTION, (None,)),
                                (kinds.CUDNN_ATTENTION, (None, mask))):
                for each in given:
                    calls[
                        f"{'no mask' if each is None else 'mask'}, {kind.name}"] = lambda each=each, kind=kind: attention(each, kind)  # noqa: E501
        if flex:
            attend = torch.compile(flex_attention, dynamic=False)
            calls = {"no mask": calls["no mask"], "flex_attention": lambda: attend(query, key, value, score_mod=sized)}
        few, title = slice(0, min(batch, 4)), f"attention over {tokens} tokens, 12 heads"
        q, k, v = (t[few].float() for t in (query, key, value))
        for name, call in list(calls.items()):
            try:
                exact = F.scaled_dot_product_attention(q, k, v,
                                                       attn_mask=None if "no mask" in name else logs[few, None, None])
                away = float((call()[few].float() - exact).norm() / exact.norm())
                if not away < AGREES:
                    raise ArithmeticError(f"differs by {away:.3g} from attention in float32")
                about[name] = about.get(name, {}) | {"difference": away}
            except OutOfTime:
                raise
            except Exception as error:
                self.failed(f"{title}: {name}", batch, "kernel", error)
                del calls[name]
        self.timed(title, batch, "kernel", calls, about)

    @torch.inference_mode()
    def fold(self) -> None:
        """The product between two blocks of a deployed DeiT-S, its matrix as it lies and with rows that begin at
        multiples of 16 bytes."""
        tokens, dim = 137, 384                          # keep 0.6: 118 that are merged, 19 that go around
        matrix = torch.randn(tokens, tokens, device=self.device).to(torch.bfloat16)
        x = torch.randn(self.batch, tokens, dim, device=self.device).to(torch.bfloat16)
        aligned = F.pad(matrix, (0, -tokens % 8))[:, :tokens]
        self.timed(f"fold of {tokens} tokens, {dim} wide", self.batch, "kernel", {
            "matrix as it lies": lambda: torch.matmul(matrix, x),
            "rows at multiples of 16 bytes": lambda: torch.matmul(aligned, x)})

    def scoring(self, name: str) -> None:
        """Token scores through V and its gradient."""
        dense, _ = self.dense(name)
        half, x = copy.deepcopy(dense).to(torch.bfloat16), self.images(dense, self.batch, torch.float32)
        targets = torch.randint(0, dense.num_classes, (self.batch,), device=self.device)

        def scores(model: nn.Module, images: Tensor, precision: str = "highest") -> None:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                token_scores(model, [(images, targets)], device=self.device, progress=False)
            finally:
                torch.set_float32_matmul_precision(before)
        small = x.to(torch.bfloat16)
        self.timed(f"token scores, {name}", self.batch, "step", {
            "float32": lambda: scores(dense, x), "float32, products in TF32": lambda: scores(dense, x, "high"),
            "bfloat16": lambda: scores(half, small)},
                   {"float32": {"dtype": "float32"}, "float32, products in TF32": {"dtype": "float32"}})

    def training(self, name: str) -> None:
        """One step: forward and backward with autocast to bfloat16, AdamW on float32 weights."""
        dense, shape = self.dense(name)
        made, wanted = candidates(dense, shape), ("dense", f"{MERGED}, training form", f"merging by content, {SHARE}")
        x = self.images(dense, self.batch, torch.float32)
        targets = torch.randint(0, dense.num_classes, (self.batch,), device=self.device)
        calls, about = {}, {}
        for rule in wanted:
            model = made[rule]()[0].train().requires_grad_(True)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

            def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.zero_grad()
                with torch.autocast(self.device.type, torch.bfloat16):
                    loss = F.cross_entropy(model(x), targets)
                loss.backward()
                optimizer.step()
            calls[rule], about[rule] = step, {"cast": "autocast"}
        self.timed(f"training step, {name}", self.batch, "step", calls, about)

    def processes(self) -> None:
        """NCCL in a process of its own, which may be stopped where it hangs; on a CPU gloo, here."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        if self.device.type == "cuda":
            command = [sys.executable, __file__, "--processes", "--device", "cuda"]
            done = subprocess.run(command, env=os.environ | env, timeout=max(10, min(90, self.left())),
                                  capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip()
                                   else f"exit {done.returncode}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
        else:
            with mock.patch.dict(os.environ, env):
                found = one_process(self.device)
        self.add(f"one process by {found['backend']}", 2, "processes", found)

    def onnx(self) -> None:
        """ONNX Runtime by its CUDA provider, where it has one."""
        try:
            runtime = importlib.import_module("onnxruntime")
            known = runtime.get_available_providers()
        except ImportError:
            known = []
        if self.device.type != "cuda" or "CUDAExecutionProvider" not in known:
            self.add("ONNX Runtime on the GPU", self.batch, "onnx", {"missing": f"no CUDAExecutionProvider; there are "
                                                                                f"{known}"})
            return
        dense, shape = self.dense(SMALL)
        x, calls = self.images(dense, self.batch, torch.float16), {}
        with tempfile.TemporaryDirectory() as folder:
            for rule in ("dense", MERGED):
                path = Path(folder) / f"{len(calls)}.onnx"
                torch.onnx.export(candidates(dense, shape)[rule]()[0].half(), (x,), path, dynamo=True, verbose=False)
                session = runtime.InferenceSession(path, providers=["CUDAExecutionProvider"])
                bound = session.io_binding()
                bound.bind_input(session.get_inputs()[0].name, "cuda", 0, np.float16, tuple(x.shape), x.data_ptr())
                bound.bind_output(session.get_outputs()[0].name, "cuda")
                calls[rule] = lambda session=session, bound=bound: session.run_with_iobinding(bound)
            self.timed(f"ONNX Runtime on the GPU, {SMALL}", self.batch, "step", calls,
                       {rule: {"dtype": "float16"} for rule in calls})

    def jobs(self) -> Iterator[tuple[str, str, float, Callable[[], None]]]:
        """(part, name, seconds that it takes at least, what to do), the most important first."""
        small, three = (TINY, (TINY,)) if self.quick else (SMALL, (TI, SMALL, BASE))

        def of(part: str, name: str, batch: int, mode: str, seconds: float,
               only: tuple[str, ...] | None = None) -> tuple:
            return part, f"{name}, batch {batch}, {mode}", seconds, lambda: self.models(name, batch, mode, only)
        for name in three:
            yield of("eager", name, self.batch, "eager", 15)
        for tokens in ((13,) if self.quick else (197, 130)):
            yield "kernels", f"attention over {tokens} tokens", 5, lambda tokens=tokens: self.size_mask(tokens)
        yield "kernels", "fold", 3, self.fold
        yield "steps", "training step", 10, lambda: self.training(small)
        yield "steps", "token scores", 8, lambda: self.scoring(small)
        yield "steps", "one process", 15, self.processes
        yield "steps", "ONNX Runtime", 5, self.onnx
        if self.quick:
            return
        yield of("compiled", SMALL, self.batch, "compiled", 60, MAIN)
        yield "compiled", "attention by flex_attention", 30, lambda: self.size_mask(197, flex=True)
        for name in (LARGE, MORE_TOKENS):
            yield of("large", name, self.batch, "eager", 25)
        for mode in ("CUDA graph", "eager"):
            for name in three:
                yield of("one", name, 1, mode, 15)
        for name in (TI, BASE):                         # compiling takes the longest
            yield of("compiled", name, self.batch, "compiled", 60, MAIN)
        for name in (SMALL, TI):
            yield of("one", name, 1, "compiled, reduce-overhead", 60, MAIN)

    def run(self, parts: tuple[str, ...] = PARTS) -> None:
        for part, name, seconds, job in self.jobs():
            if part not in parts:
                continue
            if self.left() < (0 if self.quick else seconds):
                self.left_out.append(name)
                continue
            try:
                job()
            except (Exception, OutOfTime) as error:
                self.failed(name, self.batch, "job", error)
            torch.compiler.reset()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def one_process(device: torch.device) -> dict:
    """A sum over all processes and one step of DistributedDataParallel, as torchrun's environment says; which backend
    it was by."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    try:
        ones = torch.ones(1024, device=device)
        dist.all_reduce(ones)
        model = create_model(TINY).train().to(device)
        shared = nn.parallel.DistributedDataParallel(model, device_ids=[0] if device.type == "cuda" else None)
        optimizer = torch.optim.AdamW(shared.parameters(), lr=1e-3)
        images, targets = torch.randn(2, 3, 32, 32, device=device), torch.zeros(2, dtype=torch.long, device=device)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(shared(images), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return {"backend": backend, "sum": float(ones.sum()), "losses": losses}
    finally:
        dist.destroy_process_group()


def main(given: list[str] | None = None) -> Bench | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="time for all of it")
    parser.add_argument("--out", type=Path, help=f"rows are appended there (default: {RESULTS.name} in results, with "
                                                 f"--quick nowhere)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repeat")
    parser.add_argument("--processes", action="store_true", help="only what is said of one process, as JSON")
    args = parser.parse_args(given)
    if args.processes:
        print(json.dumps(one_process(torch.device(args.device))))
        return None
    torch._dynamo.config.recompile_limit = 64           # models of one class share what is counted
    bench = Bench(args.device, args.minutes, args.out or (None if args.quick else RESULTS), args.quick)

    def ring(*_: object) -> None:
        raise OutOfTime("all the time is spent")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes + 15)
    try:
        bench.run(tuple(args.parts))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print("\n" + table([dataclasses.asdict(row) for row in bench.rows]))
    print(f"\nleft out for want of time: {'; '.join(bench.left_out) or 'nothing'}")
    return bench


if __name__ == "__main__":
    main()
