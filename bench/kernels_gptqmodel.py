"""GPTQModel's own product of 4-bit weights for bench/kernels.py, run by the Python of an environment that has it.

    python kernels_gptqmodel.py DEVICE DTYPE THREADS

Says its version, then answers two kinds of lines (peer.py): [in_features, out_features, group_size, copies] makes so
many layers over random codes, with the kernel that GPTQModel itself chooses, and is answered with its name; [rows,
copies] goes once through so many of them, and is answered with the seconds of one.
"""

import functools
import json
import sys
import time

import torch
from gptqmodel import BACKEND, __version__
from gptqmodel.utils.importer import select_quant_linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SYMMETRIC = 0x88888888 - (1 << 32)  # eight zero-points of 8, as an int32


@torch.no_grad()
def main() -> None:
    device, dtype, threads = torch.device(sys.argv[1]), DTYPES[sys.argv[2]], int(sys.argv[3])
    torch.set_num_threads(threads)
    reply({"gptqmodel": __version__})
    layers, x = [], torch.empty(0)
    for line in sys.stdin:
        question = json.loads(line)
        if len(question) == 4:
            layers = []  # its memory first
            in_features, out_features, group_size, copies = question
            layers = [make_layer(in_features, out_features, group_size, device, dtype) for _ in range(copies)]
            reply(type(layers[0]).__name__)
            continue
        rows, copies = question
        if x.shape != (rows, in_features):
            x = torch.randn(rows, in_features, device=device).to(dtype)
        run = functools.partial(pass_through, layers[:copies], x)
        reply(seconds(record(run) if device.type == "cuda" else run, device) / copies)


def pass_through(layers, x) -> None:
    for layer in layers:
        layer(x)


def seconds(run, device) -> float:
    synchronize(device)
    start_s = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start_s


def record(run):
    """One replay of a CUDA graph, as the benchmark does with every entry."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def make_layer(in_features, out_features, group_size, device, dtype):
    form = {"bits": 4, "group_size": group_size, "desc_act": False, "sym": True, "pack_dtype": torch.int32}
    kind = select_quant_linear(**form, device=device.type, backend=BACKEND.AUTO, dtype=dtype)
    layer = kind(**form, in_features=in_features, out_features=out_features, bias=False, dtype=dtype)
    groups = in_features // group_size
    codes = torch.randint(-(1 << 31), 1 << 31, (in_features // 8, out_features)).int()
    layer.qweight = codes.to(device)
    layer.qzeros = torch.full((groups, out_features // 8), SYMMETRIC, dtype=torch.int32, device=device)
    layer.scales = torch.rand(groups, out_features).mul_(0.01).half().to(device)
    layer.g_idx = (torch.arange(in_features, device=device) // group_size).int()
    layer.post_init()
    return layer.eval()


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reply(value) -> None:
    print("\nreply " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
