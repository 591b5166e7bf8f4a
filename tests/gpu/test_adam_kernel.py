"""The Triton kernels on a GPU against the oracles on the CPU, by bits. Run with -s to see their speed."""

import pytest
import torch
from adam_cases import (
    ADAMW,
    DTYPES,
    FORMS,
    HYPERS,
    SIZES,
    copy_of,
    differing,
    make_special_tensors,
    make_tensors,
)
from megalith.kernels import fused_adam_, join_master, split_master, sum_of_squares
from megalith.kernels.adam_step import AdamTensors
from megalith.kernels.reference import SUM_BLOCK_NUMEL, SUM_LANES, adam_reference_, sum_of_squares_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def on_cuda(tensors: AdamTensors, offset: int = 0) -> AdamTensors:
    """Copies on the GPU, each a view that starts `offset` elements into its own buffer."""
    views = []
    for tensor in tensors:
        if tensor is None:
            views.append(None)
            continue
        buffer = torch.zeros(tensor.numel() + 2 * offset, dtype=tensor.dtype, device="cuda")
        views.append(buffer[offset : offset + tensor.numel()].copy_(tensor))
    return AdamTensors(*views)


def step(tensors: AdamTensors, hyper, factor: float = 1.0, found_inf: float = 0.0) -> None:
    device = tensors.weight.device
    fused_adam_(
        *tensors[:4],
        hyper,
        factor=torch.tensor([factor], device=device),
        found_inf=torch.tensor([found_inf], device=device),
        remainder=tensors.remainder,
        master=tensors.master,
    )


@pytest.mark.parametrize("kind", HYPERS)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_has_the_bits_of_the_oracle(form, grad_dtype, kind):
    for numel in (0, *SIZES):
        expected = make_tensors(form, grad_dtype, numel)
        tensors = on_cuda(expected)
        step(tensors, HYPERS[kind], factor=0.37)
        adam_reference_(expected, HYPERS[kind], torch.tensor([0.37]), torch.zeros(1))
        assert differing(tensors, expected) == [], numel


@pytest.mark.parametrize("kind", HYPERS)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_special_values_have_the_bits_of_the_oracle(form, grad_dtype, kind):
    expected = make_special_tensors(form, grad_dtype)
    tensors = on_cuda(expected)
    step(tensors, HYPERS[kind])
    adam_reference_(expected, HYPERS[kind], torch.ones(1), torch.zeros(1))
    assert differing(tensors, expected) == []


@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("form", FORMS)
def test_unaligned_views_are_updated_and_their_neighbours_are_not(form, offset):
    expected = make_tensors(form, torch.bfloat16, 4097)
    tensors = on_cuda(expected, offset)
    step(tensors, ADAMW)
    adam_reference_(expected, ADAMW, torch.ones(1), torch.zeros(1))
    assert differing(tensors, expected) == []
    for tensor in tensors:
        if tensor is not None:
            assert not tensor._base[:offset].any() and not tensor._base[-offset:].any()


@pytest.mark.parametrize("form", FORMS)
def test_ten_steps_on_the_gpu_and_on_the_cpu_have_the_same_bits(form):
    cpu = make_tensors(form, torch.bfloat16, 100_003)
    gpu = on_cuda(cpu)
    for _ in range(10):
        step(cpu, ADAMW, factor=0.5)
        step(gpu, ADAMW, factor=0.5)
    assert differing(gpu, cpu) == []


@pytest.mark.parametrize("flag", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("form", FORMS)
def test_found_inf_leaves_every_tensor_as_it_was(form, flag):
    tensors = on_cuda(make_tensors(form, torch.float16, 4097))
    before = copy_of(tensors)
    step(tensors, ADAMW, found_inf=flag)
    assert differing(tensors, before) == []


def test_the_host_never_waits():
    tensors = on_cuda(make_tensors("split", torch.bfloat16, 4096))
    factor, found_inf = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")

    def both():
        fused_adam_(*tensors[:4], ADAMW, factor=factor, found_inf=found_inf, remainder=tensors.remainder)
        sum_of_squares(tensors.grad)

    both()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_split_master_comes_back_on_the_gpu():
    bits = torch.randint(-(1 << 31), 1 << 31, (3_000_000,), generator=torch.Generator().manual_seed(0))
    master = bits.to(torch.int32).view(torch.float32)
    weight, remainder = split_master(master.cuda())
    on_cpu = split_master(master)
    assert torch.equal(weight.cpu().view(torch.int16), on_cpu[0].view(torch.int16))
    assert torch.equal(remainder.cpu(), on_cpu[1])
    joined, number = join_master(weight, remainder).cpu(), ~master.isnan()
    assert torch.equal(joined.view(torch.int32)[number], master.view(torch.int32)[number])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_squares_has_the_bits_of_the_oracle(dtype):
    for numel in (0, 1, 3, SUM_LANES + 1, SUM_BLOCK_NUMEL, SUM_BLOCK_NUMEL + 1, 10_000_019):
        x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = sum_of_squares_reference(x) if numel else torch.zeros(1, dtype=torch.float64)
        assert torch.equal(sum_of_squares(x.cuda()).cpu(), expected), numel


def test_more_than_2_to_the_31_elements():
    numel = (1 << 31) + 4097
    if torch.cuda.mem_get_info()[0] < 15 * numel:
        pytest.skip(f"needs {15 * numel / 2**30:.0f} GiB of free GPU memory")
    ends = make_tensors("split", torch.bfloat16, 8194)
    dtypes = [None if tensor is None else tensor.dtype for tensor in ends]
    whole = AdamTensors(*(dtype and torch.zeros(numel, dtype=dtype, device="cuda") for dtype in dtypes))
    for tensor, end in zip(whole, ends, strict=True):
        if tensor is not None:
            tensor[:4097].copy_(end[:4097])
            tensor[-4097:].copy_(end[4097:])
    step(whole, ADAMW)
    adam_reference_(ends, ADAMW, torch.ones(1), torch.zeros(1))
    assert differing(whole.block(0, 4097), ends.block(0, 4097)) == []
    assert differing(whole.block(numel - 4097, numel), ends.block(4097, 8194)) == []
    assert not whole.exp_avg[4097:-4097].any()
    # Squares of ones, and none of them beyond the borders of a block is lost.
    assert sum_of_squares(whole.grad.fill_(1.0)).item() == numel


def test_the_speed_is_shown(capsys):
    numel = 1 << 27
    tensors = AdamTensors(
        torch.zeros(numel, dtype=torch.bfloat16, device="cuda"),
        torch.ones(numel, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(numel, device="cuda"),
        torch.zeros(numel, device="cuda"),
        torch.zeros(numel, dtype=torch.int16, device="cuda"),
    )
    copied = torch.empty_like(tensors.exp_avg)
    timings = {
        "fused Adam, split master": (26, lambda: step(tensors, ADAMW)),
        "sum of squares, bfloat16": (2, lambda: sum_of_squares(tensors.grad)),
        "copy, float32": (8, lambda: copied.copy_(tensors.exp_avg)),
    }
    with capsys.disabled():
        for name, (bytes_per_element, call) in timings.items():
            call()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                call()
            end.record()
            end.synchronize()
            print(f"\n{name}: {10 * numel * bytes_per_element / start.elapsed_time(end) / 1e6:,.0f} GB/s")
