"""The kernels of LLaMA-7B's layers by pytest-benchmark, whose --benchmark-compare tells one commit from another.

`python -m megalith.bench.kernels` times the same entries, in turns and against their bars.
"""

import argparse

import pytest
import torch
from megalith.bench import adam, kernels

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = kernels.DEFAULT_ROWS if DEVICE == "cuda" else [1, 16, 64]
ARGS = kernels.parse_args(["--device", DEVICE, "--rows", *map(str, ROWS), "--gptqmodel_python", ""])
LAYERS = kernels.layers(ARGS)
ADAM_NUMEL = adam.NUMEL if DEVICE == "cuda" else 10_000_000
ADAM = ("megalith split bf16", "megalith split bf16, 8-bit moments", "megalith fp32", "torch fused fp32")


@pytest.fixture(scope="module", params=LAYERS, ids=lambda layer: f"{layer.model}-{layer.name}")
def layer_and_weights(request):
    return request.param, kernels.make_weights(request.param, ARGS)


@pytest.fixture(scope="module")
def adam_entries():
    return {e.name: e for e in adam.adam_entries(argparse.Namespace(numel=ADAM_NUMEL, device=DEVICE))}


def run(benchmark, entry, elements=1):
    seconds = []
    benchmark.pedantic(lambda: seconds.append(entry.seconds()), rounds=5, warmup_rounds=1)
    benchmark.extra_info["GB_per_s"] = entry.bytes_per_element * elements / 1e9 / min(seconds[1:])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["megalith", "torch dense", "torch int4"])
def test_product(benchmark, layer_and_weights, name, rows):
    layer, weights = layer_and_weights
    entries = {entry.name: entry for entry in kernels.product_entries(layer, rows, weights, ARGS)}
    if name not in entries:
        pytest.skip(f"{name} is for fewer rows")
    benchmark.group = layer.label(rows)
    run(benchmark, entries[name])


@pytest.mark.parametrize("name", ADAM)
def test_adam(benchmark, adam_entries, name):
    benchmark.group = f"adam, {ADAM_NUMEL:,} elements"
    run(benchmark, adam_entries[name], ADAM_NUMEL)
