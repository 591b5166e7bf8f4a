"""The kernels: products with GPTQ weights, for the linear layers of LLaMA models, and the fused Adam.

    python -m megalith.bench.kernels                               # CPU: 7B's attention output and down projection
    python -m megalith.bench.kernels --layers qkv o gate_up down --gptqmodel_python PYTHON  # of an environment with it
    python -m megalith.bench.kernels --device cuda --models 7b 13b 70b --json record.json

GB/s counts the bytes that a product has to move, its weight (with scales), x and y, each once; the share is that of
the bandwidth that a plain copy reaches in the same run, so 100 % is the floor. A reading goes once through so many
copies of the weight that none is still in the cache, and gives the mean; on a GPU it replays a graph of that. Entries
take turns, round after round; a ratio is that of two readings of one round. torch's int4 kernels take bfloat16 here,
since the float32 one of the CPU is a plain loop, and few rows, since with more they fall behind the dense product by
multiples.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..kernels import GptqWeight, gptq_matmul
from . import adam, report
from .adam import Entry, take_turns
from .peer import Peer

GROUP = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Hidden size, size of the feed-forward layer, key and value features.
MODELS = {"7b": (4096, 11008, 4096), "13b": (5120, 13824, 5120), "70b": (8192, 28672, 1024), "tiny": (256, 384, 128)}
DEFAULT_ROWS = [1, 4, 16, 64, 256, 1024, 4096]
DEFAULT_LAYERS = {"cpu": ["o", "down"], "cuda": ["qkv", "o", "gate_up", "down"]}
CPU_CACHE_BYTES = 32 << 20
INT4_ROWS = 64
GPTQMODEL_WORKER = Path(__file__).with_name("kernels_gptqmodel.py")
GPTQMODEL_VARIABLE = "MEGALITH_GPTQMODEL_PYTHON"
COPY_NUMEL = 30_000_000  # as in adam.py
# Entry over peer in calls/s, by device and least rows; and shares of the copy bandwidth at one row.
RATIO_BARS = {
    "cpu": [
        ("megalith", "torch dense", 1, 1, 1.42),
        ("megalith", "torch int4", 1, 1, 1.0),
        ("megalith", "gptqmodel", 1, 1, 1.0),
    ],
    "cuda": [("megalith", "torch dense", 1, 16, 1.42), ("megalith", "torch dense", 1024, 4096, 0.95)],
}
SHARE_BARS = {"cpu": [], "cuda": [("gate_up", 0.8), ("down", 0.8)]}


@dataclass(frozen=True)
class Layer:
    model: str
    name: str
    in_features: int
    out_features: int

    def label(self, rows: int) -> str:
        return f"{self.model} {self.name} {self.in_features}x{self.out_features}, {rows} rows"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, checks = [], []
    copy_bytes_per_s = measure_copy(args)
    gptqmodel = open_gptqmodel(args)
    try:
        for layer in layers(args):
            weights = make_weights(layer, args, gptqmodel)
            for m in tqdm(args.rows, desc=f"{layer.model} {layer.name}", unit="product"):
                entries = product_entries(layer, m, weights, args, gptqmodel)
                readings = take_turns(entries, args.rounds)
                rows += [product_row(entry, layer, m, readings[entry.name], copy_bytes_per_s) for entry in entries]
                checks += product_checks(layer, m, entries, readings, copy_bytes_per_s, args.device)
            del weights, entries  # before those of the next layer
    finally:
        if gptqmodel:
            gptqmodel.close()
    if not args.skip_adam:
        adam_rows, adam_checks = measure_adam(copy_bytes_per_s, args)
        rows, checks = rows + adam_rows, checks + adam_checks
    settings = {"dtype": args.dtype, "group": GROUP, "rounds": args.rounds, "threads": args.threads}
    record = {
        "benchmark": "kernels",
        "environment": report.environment(args.device),
        "settings": {
            **settings,
            "copy GB/s": f"{copy_bytes_per_s / 1e9:.1f}",
            "gptqmodel": gptqmodel.facts["gptqmodel"] if gptqmodel else "absent: see --gptqmodel_python",
        },
        "rows": rows,
        "checks": checks,
    }
    print(report.render(record))
    if args.json:
        report.save(record, args.json)
    if args.plot:
        report.plot(record, args.plot, ["GB_per_s"])


def layers(args: argparse.Namespace) -> list[Layer]:
    found = []
    for model in args.models:
        hidden, feed_forward, key_value = MODELS[model]
        shapes = {
            "qkv": (hidden, hidden + 2 * key_value),
            "o": (hidden, hidden),
            "gate_up": (hidden, 2 * feed_forward),
            "down": (feed_forward, hidden),
        }
        found += [Layer(model, name, *shape) for name, shape in shapes.items() if name in args.layers]
    return found


# ---- products ----


def open_gptqmodel(args: argparse.Namespace) -> Peer | None:
    if not args.gptqmodel_python:
        return None
    settings = args.device, args.dtype, args.threads
    # On two cores it asks for more workers than it allows itself, and ends.
    return Peer(
        args.gptqmodel_python, GPTQMODEL_WORKER, *settings, needs="gptqmodel, a compiler", GPTQMODEL_CPU_WORKERS="4"
    )


@dataclass(frozen=True)
class Weights:
    """Of one layer: as many as the fewest rows need to go round."""

    packed: list[GptqWeight]
    dense: list[torch.Tensor]  # [K, N]
    int4: list[Callable[[torch.Tensor], torch.Tensor]]  # torch's product with each
    gptqmodel: str  # the kernel that it chose
    packed_bytes: int
    dense_bytes: int


def make_weights(layer: Layer, args: argparse.Namespace, gptqmodel: Peer | None = None) -> Weights:
    dtype, device = DTYPES[args.dtype], args.device
    activations = activation_bytes(layer, min(args.rows), dtype)
    first = random_weight(layer, device)
    packed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in first.tensors().values())
    dense_bytes = layer.in_features * layer.out_features * dtype.itemsize
    count = copies(packed_bytes, activations, args)
    shape = layer.out_features, layer.in_features
    kind = gptqmodel.ask([layer.in_features, layer.out_features, GROUP, count]) if gptqmodel else "absent"
    return Weights(
        packed=[first] + [random_weight(layer, device) for _ in range(count - 1)],
        dense=[
            torch.randn(shape, device=device).mul_(0.02).to(dtype).t()
            for _ in range(copies(dense_bytes, activations, args))
        ],
        int4=int4_products(layer, count, device),
        gptqmodel=kind,
        packed_bytes=packed_bytes,
        dense_bytes=dense_bytes,
    )


def activation_bytes(layer: Layer, rows: int, dtype: torch.dtype) -> int:
    return rows * (layer.in_features + layer.out_features) * dtype.itemsize


def product_entries(
    layer: Layer, rows: int, weights: Weights, args: argparse.Namespace, gptqmodel: Peer | None = None
) -> list[Entry]:
    """Every way to compute the product; `bytes_per_element` is that of the whole call."""
    dtype, device = DTYPES[args.dtype], args.device
    x = torch.randn(rows, layer.in_features, device=device).to(dtype)
    activations = activation_bytes(layer, rows, dtype)
    packed = weights.packed[: copies(weights.packed_bytes, activations, args)]
    dense = weights.dense[: copies(weights.dense_bytes, activations, args)]

    def entry(name: str, weight_bytes: int, calls: list[Callable[[], object]], note: str) -> Entry:
        run = recorded(calls) if device == "cuda" else lambda: [call() for call in calls]
        seconds = adam.stopwatch(run, device)
        return Entry(name, weight_bytes + activations, lambda: seconds() / len(calls), note)

    entries = [
        entry("megalith", weights.packed_bytes, [lambda w=w: gptq_matmul(x, w) for w in packed], "gptq_matmul, 4 bits"),
        entry("torch dense", weights.dense_bytes, [lambda w=w: x @ w for w in dense], f"x @ W in {args.dtype}"),
    ]
    if rows <= INT4_ROWS:
        half = x.bfloat16()
        calls = [lambda product=product: product(half) for product in weights.int4[: len(packed)]]
        entries.append(entry("torch int4", weights.packed_bytes, calls, f"bf16, up to {INT4_ROWS} rows"))
    if gptqmodel:
        turn = [rows, len(packed)]
        ask = Entry("gptqmodel", weights.packed_bytes + activations, lambda: gptqmodel.ask(turn), weights.gptqmodel)
        entries.append(ask)
    return entries


def recorded(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """One replay of a CUDA graph of all calls, as decoding runs them: at one row they take less time than Python needs
    to launch them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets libraries choose
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def copies(nbytes: int, activations: int, args: argparse.Namespace) -> int:
    """How many weights to go round, so that each was thrown out of the last cache since its last use, by the others and
    by x and y."""
    cache = CPU_CACHE_BYTES if args.device == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size
    return 1 + max(0, -(-(4 * cache - activations) // nbytes))


def random_weight(layer: Layer, device: str) -> GptqWeight:
    shape = layer.in_features // 8, layer.out_features
    groups = -(-layer.in_features // GROUP)
    return GptqWeight(
        qweight=torch.randint(-(1 << 31), 1 << 31, shape, device=device).int(),
        scales=torch.rand(groups, layer.out_features, device=device).mul_(0.01).half(),
        zeros=None,
        perm=None,
        bias=None,
        bits=4,
        group_size=GROUP,
        in_features=layer.in_features,
    )


def int4_products(layer: Layer, count: int, device: str) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """torch's own int4 products, with as many weights: bfloat16 x, and scales and zero-points rounded to bfloat16."""
    codes = torch.randint(0, 16, (layer.out_features, layer.in_features), dtype=torch.int32, device=device)
    scales_zeros = torch.rand(layer.in_features // GROUP, layer.out_features, 2, device=device).mul_(0.01).bfloat16()
    if device == "cpu":
        weights = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(count)]
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        weights = [torch.ops.aten._convert_weight_to_int4pack(pairs, 8) for _ in range(count)]
        product = torch.ops.aten._weight_int4pack_mm
    return [lambda x, w=w: product(x, w, GROUP, scales_zeros) for w in weights]


def product_row(entry: Entry, layer: Layer, rows: int, seconds: list[float], copy_bytes_per_s: float) -> dict:
    operations = 2 * rows * layer.in_features * layer.out_features
    return {
        "name": f"{layer.label(rows)}: {entry.name}",
        "note": entry.note,
        "metrics": {
            "calls_per_s": [1 / s for s in seconds],
            "GB_per_s": [entry.bytes_per_element / 1e9 / s for s in seconds],
            "copy_bandwidth_share": [entry.bytes_per_element / copy_bytes_per_s / s for s in seconds],
            "GFLOP_per_s": [operations / 1e9 / s for s in seconds],
        },
    }


def product_checks(layer: Layer, rows: int, entries, readings, copy_bytes_per_s: float, device: str) -> list[dict]:
    checks = []
    for own, peer, least, most, bar in RATIO_BARS[device]:
        if least <= rows <= most and peer in readings:
            values = [theirs / ours for ours, theirs in zip(readings[own], readings[peer], strict=True)]
            checks.append({"name": f"{layer.label(rows)}: {own} / {peer}", "values": values, "at_least": bar})
    for name, bar in SHARE_BARS[device]:
        if layer.name == name and rows == 1:
            values = [entries[0].bytes_per_element / copy_bytes_per_s / s for s in readings["megalith"]]
            checks.append({"name": f"{layer.label(rows)}: of copy bandwidth", "values": values, "at_least": bar})
    return checks


# ---- Adam, and what everything is measured against ----


def measure_copy(args: argparse.Namespace) -> float:
    """Bytes/s of a plain copy, read and written: the best of the rounds."""
    numel = args.numel or COPY_NUMEL
    source = torch.randn(numel, device=args.device)
    target = torch.empty_like(source)
    seconds = adam.stopwatch(lambda: target.copy_(source), args.device)
    seconds()
    return 8 * numel / min(seconds() for _ in range(max(3, args.rounds)))


def measure_adam(copy_bytes_per_s: float, args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    numel = args.numel or adam.NUMEL
    entries = adam.adam_entries(argparse.Namespace(numel=numel, device=args.device))
    readings = take_turns(entries, args.rounds)
    rows, checks = [], []
    for entry in entries:
        rates = [entry.bytes_per_element * numel / s for s in readings[entry.name]]
        shares = [rate / copy_bytes_per_s for rate in rates]
        metrics = {"GB_per_s": [rate / 1e9 for rate in rates], "copy_bandwidth_share": shares}
        rows.append({"name": f"adam: {entry.name}", "note": entry.note, "metrics": metrics})
        if args.device == "cuda" and entry.name in ("megalith split bf16", "megalith fp32"):
            checks.append({"name": f"adam: {entry.name}, of copy bandwidth", "values": shares, "at_least": 0.88})
    return rows, checks


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megalith.bench.kernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7b"])
    parser.add_argument("--layers", nargs="+", choices=DEFAULT_LAYERS["cuda"], help="CPU: o down; CUDA: all")
    parser.add_argument("--rows", nargs="+", type=int, help=f"of x; {DEFAULT_ROWS}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--numel", type=int, help="elements that Adam and the copy work on")
    parser.add_argument("--skip_adam", action="store_true")
    parser.add_argument(
        "--gptqmodel_python", default=os.environ.get(GPTQMODEL_VARIABLE), help=f"or ${GPTQMODEL_VARIABLE}"
    )
    parser.add_argument("--json", type=Path, help="where to keep the record")
    parser.add_argument("--plot", type=Path, help="a .png")
    args = parser.parse_args(argv)
    args.rows = args.rows or DEFAULT_ROWS
    args.layers = args.layers or DEFAULT_LAYERS[args.device]
    for name, value in (("rows", min(args.rows)), ("rounds", args.rounds), ("threads", args.threads)):
        if value < 1:
            parser.error(f"--{name} is {value}, and has to be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but this torch sees no GPU")
    return args


if __name__ == "__main__":
    main()
