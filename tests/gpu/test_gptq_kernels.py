"""The Triton kernels of GPTQ on a GPU against numbers computed apart. Run with -s to see their speed."""

import pytest
import torch
from gptq_cases import CASES, LIMITS, expected_product, make_weight, mean_relative_error
from megalith.bench.kernels import recorded
from megalith.kernels import gptq_dequantize, gptq_matmul, pack_codes, prepare_gptq_weight
from megalith.kernels.gptq_triton import dense_matmul, fused_matmul, is_fusible

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

HALVES = (torch.float16, torch.bfloat16)
ROWS = (1, 2, 3, 5, 16, 17, 31, 33, 64, 65, 130)


def random_weight(in_features: int, out_features: int, group_size: int = 128):
    codes = torch.randint(0, 16, (in_features, out_features), device="cuda")
    scales = torch.rand(in_features // group_size, out_features, device="cuda").mul_(0.02).half()
    return prepare_gptq_weight(
        pack_codes(codes, 4), scales, None, bits=4, group_size=group_size, in_features=in_features
    )


@pytest.mark.parametrize("case", CASES)
def test_dequantized_weights_are_exact(case):
    weight, dense = make_weight(case)
    for dtype in LIMITS:
        assert torch.equal(gptq_dequantize(weight.to("cuda"), dtype).cpu(), dense.to(dtype))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_float32(case, dtype):
    weight, dense = make_weight(case)
    on_gpu = weight.to("cuda")
    for rows in ROWS:
        x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
        y = gptq_matmul(x.cuda(), on_gpu)
        assert y.dtype == dtype and y.shape == (rows, weight.out_features)
        error = mean_relative_error(y.cpu(), expected_product(x, weight, dense))
        assert error < LIMITS[dtype], (rows, error)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 22016), (11008, 4096), (8192, 1024)])
def test_large_products_are_those_of_float32(shape, dtype):
    weight = random_weight(*shape)
    dense = gptq_dequantize(weight, torch.float32)
    for rows in (1, 16, 64, 300):
        x = torch.randn(rows, shape[0], device="cuda").to(dtype)
        error = mean_relative_error(gptq_matmul(x, weight), expected_product(x, weight, dense))
        assert error < LIMITS[dtype], (rows, error)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ten_runs_have_the_same_bits(dtype):
    weight = random_weight(4096, 4096)
    for rows in (1, 16, 40, 100):
        x = torch.randn(rows, 4096, device="cuda").to(dtype)
        first = gptq_matmul(x, weight)
        assert all(torch.equal(gptq_matmul(x, weight), first) for _ in range(9))


def test_a_cuda_graph_captures_it_and_the_host_never_waits():
    weight, _ = make_weight("act_order")
    weight = weight.to("cuda")
    x = torch.randn(2, weight.in_features, device="cuda").half()
    expected = gptq_matmul(x, weight)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gptq_matmul(x, weight)
    x_again = torch.randn_like(x)
    for values in (x.clone(), x_again):
        x.copy_(values)
        graph.replay()
        assert torch.equal(y, gptq_matmul(x, weight))
    assert not torch.equal(y, expected)


def test_torch_compile_takes_it():
    weight = random_weight(512, 384)
    x = torch.randn(3, 512, device="cuda").half()
    compiled = torch.compile(lambda x: torch.relu(gptq_matmul(x, weight)), fullgraph=True)
    assert torch.equal(compiled(x), torch.relu(gptq_matmul(x, weight)))


def test_the_crossover_is_shown(capsys):
    """Where FUSED_ROWS comes from: both ways of computing a product, by rows."""
    weight = random_weight(4096, 11008)
    assert is_fusible(weight)
    with capsys.disabled():
        for rows in (1, 16, 32, 64):
            x = torch.randn(rows, 4096, device="cuda").half()
            times = [_microseconds(lambda way=way, x=x: way(x, weight)) for way in (fused_matmul, dense_matmul)]
            print(f"\n{rows} rows of 4096 x 11008: fused {times[0]:.1f} us, dequantised first {times[1]:.1f} us")


def _microseconds(call) -> float:
    """In a CUDA graph, as decoding runs it: at one row, launching from Python takes longer than the kernels."""
    replay = recorded([call])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    start.record()
    for _ in range(20):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / 20
