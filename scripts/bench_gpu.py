"What an accelerator brings: the simulator's rate by worker processes, whole pre-trainings, and an optimiser step by model, size, rows and precision."
import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from bench_training import batch_of
from torch.utils.data import DataLoader

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.streams import MetaIterableDataset
from causal_meta.models.base import build_model
from causal_meta.models.permutations import best_positions, sinkhorn, task_gumbel
from causal_meta.models.sequential_orders import task_uniforms
from causal_meta.runners import pre_training
from causal_meta.runners.config import load_config
from causal_meta.runners.distributed import Rank
from causal_meta.runners.runs import create_run
from causal_meta.runners.steps import gradients, micro_batches

SIZES = {"avici": ("small", "base", "paper"), "bcnp": ("small", "base", "paper"), "pairformer": ("small", "base")}
LARGE = {("avici", "base"), ("avici", "paper"), ("bcnp", "base"), ("bcnp", "paper")}  # also in micro-batches
# those of the configuration `audit`, and a Pairformer as it comes
TRAINED = {"avici": {"type": "avici", "config": {"size": "paper"}}, "bcnp": {"type": "bcnp", "config": {"size": "base"}}, "pairformer": {"type": "pairformer"}}
# only to see that this script runs
TINY = {"sizes": {m: ("tiny",) for m in SIZES}, "shapes": [(4, 20, 5)], "seconds": 1., "workers": (0, 1)}
REPEATS = 10


def synchronise(device: torch.device) -> None:
    "Wait for what was asked of the device."
    if device.type == "cuda": torch.cuda.synchronize()


def fresh(device: torch.device) -> None:
    "Give back what earlier measurements took, and forget their peak."
    gc.collect()
    if device.type != "cuda": return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> int: return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def timed(work: Callable[[], object], device: torch.device, seconds: float, warm: int = 2) -> list[float]:
    "Wall seconds of repetitions after a few that do not count: ten, or at least three where those take too long."
    for _ in range(warm): work()
    synchronise(device)
    times, begun = [], time.perf_counter()
    while len(times) < REPEATS and (len(times) < 3 or time.perf_counter() - begun < seconds):
        begin = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return times


def products(device: torch.device, size: int) -> dict[str, float]:
    "TFLOP/s of square matrix products: what the steps are to be held against."
    rates = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(size, size, device=device, dtype=dtype)
        rates[kind] = 2e-12*size**3/statistics.median(timed(lambda: a @ a, device, 1.))  # noqa: B023  called at once
    return rates


def step(model: str, size: str, shape: tuple[int, int, int], kind: str, micro: int | None, device: torch.device, seconds: float) -> dict:
    "An optimiser step on a batch that lies on the device: gradients and AdamW."
    net, batch = build_model(model, {"size": size}).to(device).train(), batch_of(*shape).to(device)
    optimizer = torch.optim.AdamW(net.parameters())

    def one() -> None:
        gradients(net, micro_batches([batch], micro), kind=kind)
        optimizer.step()
    times = timed(one, device, seconds)
    return {"parameters": sum(p.numel() for p in net.parameters()), "milliseconds": 1e3*statistics.median(times), "steps": len(times),
            "tasks_per_second": shape[0]/statistics.median(times), "peak_bytes": peak(device)}


def on_the_processor(shape: tuple[int, int, int], permutations: int, device: torch.device, seconds: float) -> dict[str, float]:
    "Milliseconds of those parts of a step of BCNP (and of a Pairformer's noise) that are made on the processor or wait for the device again and again."
    batch = batch_of(*shape).to(device)
    scores = torch.randn(shape[0], permutations, shape[2], shape[2], device=device)
    parts = {"noise of BCNP": lambda: task_gumbel(batch.keys, batch.node_mask, permutations), "assignments": lambda: best_positions(scores),
             "Sinkhorn, forward": lambda: sinkhorn(scores), "noise of a Pairformer": lambda: task_uniforms(batch.keys, batch.node_mask, 8)}
    return {name: 1e3*statistics.median(timed(part, device, seconds, warm=1)) for name, part in parts.items()}


def generation(benchmark: str, workers: int, seconds: float) -> dict[str, float]:
    "Tasks per second of the train stream, once the batches made beforehand are used up; and entries of tables, since tasks differ in size."
    loader = DataLoader(MetaIterableDataset(load_benchmark(benchmark), global_batch=32), batch_size=None, num_workers=workers)
    batches = iter(loader)
    for _ in range(2*workers + 1): next(batches)
    tasks, cells, begin = 0, 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for batch in next(batches): tasks, cells = tasks + len(batch), cells + batch.data.numel()
    spent = time.perf_counter() - begin
    del batches, loader  # ends the workers
    return {"tasks_per_second": tasks/spent, "cells_per_second": cells/spent}


class Enough(Exception):
    "The time for this measurement is over."


def training(model: str, workers: int, rows: int | None, micro: int | None, device: torch.device, seconds: float, tiny: bool) -> dict:
    "A whole pre-training as the configuration `audit` has it, broken off after some seconds; its rate in the second half of them."
    spec = {"type": model, "config": {"size": "tiny"}} if tiny else TRAINED[model]
    how = {"workers": workers, "rows": 20 if tiny else rows, "validate_every": 10**6, "checkpoint_every": 10**6, "keep_every": None, "log_every": 10**6, "micro_batch": micro}
    config = load_config("audit").model_dump(exclude_unset=True)
    if tiny: config, how = {**config, "benchmark": "smoke-v1"}, {**how, "precision": "fp32", "global_batch": 8}
    config = load_config({**config, "name": "bench", "models": {model: spec}, "pre_training": {**config["pre_training"], **how}})
    own, validation, ends, waited = pre_training.train_step, pre_training.validation_batches, [], []

    def noting(*given, **named):
        waited.append(time.perf_counter() - (ends[-1] if ends else time.perf_counter()))
        line = own(*given, **named)
        ends.append(time.perf_counter())
        if len(ends) >= 10 and ends[-1] - ends[4] > seconds: raise Enough
        return line
    pre_training.train_step, pre_training.validation_batches = noting, lambda benchmark: []
    try:
        with tempfile.TemporaryDirectory() as folder: pre_training.pre_train(create_run(config, Path(folder)), model, OnCPU() if device.type == "cpu" else None)
    except Enough: pass
    finally: pre_training.train_step, pre_training.validation_batches = own, validation
    middle = next(i for i, end in enumerate(ends) if end >= ends[4] + (ends[-1] - ends[4])/2 or i == len(ends) - 2)
    span, count = ends[-1] - ends[middle], len(ends) - 1 - middle
    return {"steps": len(ends), "tasks_per_second": config.pre_training.global_batch*count/span, "milliseconds": 1e3*span/count,
            "waiting_for_data": sum(waited[middle + 1:])/span, "peak_bytes": peak(device)}


class OnCPU(Rank):
    "The only process of a job, which leaves an accelerator alone."
    device = torch.device("cpu")


def guarded(work: Callable[..., dict], *given) -> dict:
    "What `work` says, or why it could not: out of memory is an answer."
    try: return work(*given)
    except Exception as e: return {"failed": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}


def told(row: dict) -> str:
    "The figures of a row, for a reader."
    if "failed" in row: return f"failed: {row['failed'][:110]}"
    text = f"{row['tasks_per_second']:>9.1f} tasks/s  {row['milliseconds']:>8.1f} ms/step  {row['peak_bytes']/1e9:>6.2f} GB"
    if "waiting_for_data" in row: return text + f"  {row['waiting_for_data']:>4.0%} of the time waiting for data"
    return text + f"  {row['parameters']:,} parameters"


def cases(quick: bool, tiny: bool) -> Iterator[tuple[str, str, tuple[int, int, int], str, int | None]]:
    "Model, size, shape, precision and micro-batch of each step that is measured, the cheap shapes first."
    shapes = TINY["shapes"] if tiny else [(32, 200, 20)] if quick else [(32, 200, 20), (32, 1000, 20)]
    sizes = TINY["sizes"] if tiny else {m: of[::2] for m, of in SIZES.items()} if quick else SIZES
    for shape, model in product(shapes, sizes):
        for size, kind in product(sizes[model], ("fp32", "bf16")):
            yield model, size, shape, kind, None
            if tiny or ((model, size) in LARGE and not quick): yield model, size, shape, kind, 2 if tiny else 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute instead of five, for a first look")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON, after each measurement")
    parser.add_argument("--only", choices=["training"], help="this part alone")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: tiny settings, to see that this runs
    options = parser.parse_args()
    device, quick = torch.device(options.device), options.quick
    tiny = device.type == "cpu"
    if device.type == "cuda" and not torch.cuda.is_available():
        print("scripts/bench gpu: this machine has no CUDA device, or its torch is built without CUDA.", file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(1)
    cpus, begun = len(os.sched_getaffinity(0)), time.perf_counter()
    found: dict = {"machine": {"device": "cpu" if tiny else torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "cpus": cpus}}

    def note(part: str, name: str, row: dict, text: str) -> None:
        found.setdefault(part, []).append(row)
        found["seconds"] = round(time.perf_counter() - begun, 1)
        print(f"{found['seconds']:>6.1f} s  {name:52} {text}", flush=True)
        if options.out: options.out.write_text(json.dumps(found, indent=1) + "\n")

    print(f"{found['machine']['device']}, torch {torch.__version__}, {cpus} processors", flush=True)
    if not options.only: print("generation: tasks per second of the train stream, by worker processes of one thread each; 0 is this process", flush=True)
    for benchmark in () if options.only else ("audit-v1",) if quick or tiny else ("audit-v1", "audit-small-v1"):
        for workers in TINY["workers"] if tiny else (1, 15) if quick else (0, 1, 4, 8, 15):
            rates = generation(benchmark, workers, TINY["seconds"] if tiny else 2. if quick else 3.)
            text = f"{rates['tasks_per_second']:>9.1f} tasks/s  {rates['cells_per_second']/1e6:>8.2f} million entries/s"
            note("generation", f"{benchmark}, {workers} workers", {"benchmark": benchmark, "workers": workers, **rates}, text)

    print("training: configuration audit without validations and checkpoints; as configured its tables have 100 rows in the first half", flush=True)
    runs = [(1, 100, None)] if tiny else [(15, 100, None)] if quick else [(8, 100, 8), (15, 100, 8), (15, 100, None), (15, None, 8), (15, None, None)]
    for model, (workers, rows, micro) in product(TRAINED, runs):
        fresh(device)
        row = guarded(training, model, workers, rows, micro, device, TINY["seconds"] if tiny else 5. if quick else 8., tiny)
        name = f"{model}, {workers} workers, {rows or 'all'} rows, {micro or 'all'} at a time"
        note("training", name, {"model": model, "workers": workers, "rows": rows, "micro_batch": micro, **row}, told(row))
    if options.only == "training": return

    found["machine"]["tflops"] = products(device, 256 if tiny else 8192)
    print("matrix products:", ", ".join(f"{kind} {rate:.1f} TFLOP/s" for kind, rate in found["machine"]["tflops"].items()), flush=True)
    for permutations in (8,) if tiny else (100,):
        shape = TINY["shapes"][0] if tiny else (32, 200, 20)
        fresh(device)
        row = guarded(on_the_processor, shape, permutations, device, 1.)
        text = row.get("failed") or ", ".join(f"{name} {ms:.1f} ms" for name, ms in row.items())
        note("parts", f"B {shape[0]}, d {shape[2]}, {permutations} permutations", {"shape": shape, "permutations": permutations, **row}, text)

    print("steps: gradients and AdamW on a batch that lies on the device", flush=True)
    for model, size, shape, kind, micro in cases(quick, tiny):
        fresh(device)
        row = guarded(step, model, size, shape, kind, micro, device, 1. if quick or tiny else 2.5)
        name = f"{model} {size} n {shape[1]} {kind}" + (f", micro-batches of {micro}" if micro else "")
        note("steps", name, {"model": model, "size": size, **dict(zip("Bnd", shape)), "precision": kind, "micro_batch": micro, **row}, told(row))

    print("messages: bytes of one gradient between ranks", flush=True)
    for model, sizes in (TINY["sizes"] if tiny else SIZES).items():
        for size in sizes:
            parameters = sum(p.numel() for p in build_model(model, {"size": size}).parameters())
            note("messages", f"{model} {size}", {"model": model, "size": size, "parameters": parameters, "bytes": 4*parameters}, f"{4*parameters:,} bytes")


if __name__ == "__main__": main()
