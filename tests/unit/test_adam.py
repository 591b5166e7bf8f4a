"""The fused Adam on the CPU: bit-identical to its oracle in every form, and in its numbers to torch.optim."""

import dataclasses

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
from hypothesis import given, settings
from hypothesis import strategies as st
from megalith.kernels import AdamHyper, fused_adam_, join_master, native, split_master
from megalith.kernels.adam_step import AdamTensors
from megalith.kernels.cpu_adam import blocked_adam_
from megalith.kernels.reference import adam_reference_

ONE, ZERO = torch.ones(1), torch.zeros(1)
needs_library = pytest.mark.skipif(native.best_isa() == "torch", reason="the compiled CPU kernels are absent")


def public(tensors, hyper, factor, found_inf):
    weight, grad, exp_avg, exp_avg_sq, remainder, master, scales = tensors
    fused_adam_(
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        hyper,
        factor=factor,
        found_inf=found_inf,
        remainder=remainder,
        master=master,
        scales=scales,
    )


def compiled(isa):
    def step(tensors, hyper, factor, found_inf):
        assert found_inf.item() == 0
        native.adam_(tensors, hyper.scalars(), decoupled=hyper.decoupled, factor=factor.item(), isa=isa)

    known = [] if native.best_isa() == "torch" else native.ISAS[: native.ISAS.index(native.best_isa()) + 1]
    return pytest.param(step, id=isa, marks=pytest.mark.skipif(isa not in known, reason=f"this CPU has no {isa}"))


IMPLEMENTATIONS = [
    pytest.param(public, id="public"),
    *map(compiled, native.ISAS[:-1]),  # `public` is the best of them
    pytest.param(blocked_adam_, id="blocked"),
]


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", HYPERS)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_has_the_bits_of_the_oracle(form, grad_dtype, kind, step):
    factor = torch.tensor([0.37])
    for numel in SIZES:
        tensors = make_tensors(form, grad_dtype, numel)
        expected = copy_of(tensors)
        step(tensors, HYPERS[kind], factor, ZERO)
        adam_reference_(expected, HYPERS[kind], factor, ZERO)
        assert differing(tensors, expected) == [], numel


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", HYPERS)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_special_values_have_the_bits_of_the_oracle(form, grad_dtype, kind, step):
    tensors = make_special_tensors(form, grad_dtype)
    expected = copy_of(tensors)
    step(tensors, HYPERS[kind], ONE, ZERO)
    adam_reference_(expected, HYPERS[kind], ONE, ZERO)
    assert differing(tensors, expected) == []


@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("form", FORMS)
def test_unaligned_views_are_updated_and_their_neighbours_are_not(form, offset):
    tensors = make_tensors(form, torch.bfloat16, 4097, offset=offset)
    expected = make_tensors(form, torch.bfloat16, 4097)
    public(tensors, ADAMW, ONE, ZERO)
    adam_reference_(expected, ADAMW, ONE, ZERO)
    assert differing(tensors, expected) == []
    for tensor in tensors:
        if tensor is not None:
            assert not tensor._base[:offset].any() and not tensor._base[-offset:].any()


@pytest.mark.parametrize("step", [public, blocked_adam_])
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_may_be_several_tensors(form, step):
    whole, cut = (make_tensors(form, torch.bfloat16, 1000) for _ in range(2))
    step(whole, ADAMW, ONE, ZERO)
    pieces = tuple(piece.clone() for piece in cut.grad.split([1, 499, 500]))
    step(cut._replace(grad=pieces), ADAMW, ONE, ZERO)
    assert differing(cut, whole) == []
    with pytest.raises(ValueError, match="grad has 999 elements, but 1000 are needed"):
        public(cut._replace(grad=(cut.grad[:999],)), ADAMW, ONE, ZERO)


@pytest.mark.parametrize("flag", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("form", FORMS)
def test_found_inf_leaves_every_tensor_as_it_was(form, flag):
    tensors = make_tensors(form, torch.float16, 4097)
    before = copy_of(tensors)
    for step in (public, blocked_adam_):
        step(tensors, ADAMW, ONE, torch.tensor([flag]))
        assert differing(tensors, before) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_factor_scales_the_gradient(form):
    tensors, scaled = make_tensors(form, torch.float32, 4097), make_tensors(form, torch.float32, 4097)
    scaled.grad.mul_(1024.0)
    public(tensors, ADAMW, ONE, ZERO)
    public(scaled, ADAMW, ONE / 1024.0, ZERO)
    assert differing(scaled._replace(grad=None), tensors) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_changes_no_bit(form, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        tensors = make_tensors(form, torch.bfloat16, 100_003)
        public(tensors, ADAMW, ONE, ZERO)
        results.append(tensors)
    assert differing(results[1], results[0]) == differing(results[2], results[0]) == []


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMS), st.lists(st.integers(0, 70_000), max_size=8))
def test_cutting_a_shard_changes_no_bit(form, cuts):
    whole, cut = (make_tensors(form, torch.bfloat16, 70_000) for _ in range(2))
    public(whole, ADAMW, ONE, ZERO)
    borders = [0, *sorted(cuts), 70_000]
    for start, stop in zip(borders, borders[1:], strict=False):
        public(cut.block(start, stop), ADAMW, ONE, ZERO)
    assert differing(cut, whole) == []


@pytest.mark.parametrize("lr", [1e-3, 1e-4])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam])
def test_100_steps_make_the_update_of_torch_optim(optimizer, lr):
    torch.manual_seed(0)
    start = torch.randn(20_000) * 0.02
    parameter = torch.nn.Parameter(start.clone())
    peer = optimizer([parameter], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    moments = {form: (torch.zeros_like(start), torch.zeros_like(start)) for form in FORMS}
    whole, (high, low) = start.clone(), split_master(start)
    masters = {torch.bfloat16: start.clone(), torch.float16: start.clone()}
    weights = {dtype: master.to(dtype) for dtype, master in masters.items()}
    for step in range(1, 101):
        parameter.grad = torch.randn_like(start) * (1.0 + start)
        peer.step()
        decoupled = optimizer is torch.optim.AdamW
        hyper = AdamHyper(lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, decoupled=decoupled, step=step)
        grad = parameter.grad
        public(AdamTensors(whole, grad, *moments["float32"]), hyper, ONE, ZERO)
        public(AdamTensors(high, grad, *moments["split"], remainder=low), hyper, ONE, ZERO)
        for dtype, form in ((torch.bfloat16, "master_bfloat16"), (torch.float16, "master_float16")):
            public(AdamTensors(weights[dtype], grad, *moments[form], master=masters[dtype]), hyper, ONE, ZERO)
    update = parameter.detach() - start
    for master in (whole, join_master(high, low), *masters.values()):
        error = ((master - start) - update).norm() / update.norm()
        assert error < 1e-6, error
    for dtype, master in masters.items():
        assert torch.equal(weights[dtype], master.to(dtype))


def test_no_elements_are_no_work():
    for form in FORMS:
        public(make_tensors(form, torch.float32, 0), ADAMW, ONE, ZERO)


@pytest.mark.parametrize(
    "form, changes, message",
    [
        ("float32", {"weight": torch.zeros(5, dtype=torch.float64)}, "weight is torch.float64"),
        ("float32", {"weight": torch.zeros(5, dtype=torch.bfloat16)}, "weight is torch.bfloat16"),
        ("split", {"weight": torch.zeros(5, dtype=torch.float16)}, "weight is torch.float16"),
        ("split", {"remainder": torch.zeros(5, dtype=torch.int32)}, "remainder is torch.int32"),
        ("split", {"master": torch.zeros(5)}, "remainder and master are both given"),
        ("master_float16", {"master": torch.zeros(5, dtype=torch.bfloat16)}, "master is torch.bfloat16"),
        ("master_float16", {"weight": torch.zeros(5)}, "weight is torch.float32"),
        ("float32", {"grad": torch.zeros(5, dtype=torch.int16)}, "grad is torch.int16"),
        ("float32", {"grad": torch.zeros(4)}, "grad has shape \\[4\\], but \\[5\\]"),
        ("float32", {"grad": torch.zeros(5, device="meta")}, "grad is on meta"),
        ("float32", {"exp_avg": torch.zeros(5, dtype=torch.bfloat16)}, "exp_avg is torch.bfloat16"),
        ("float32", {"exp_avg": torch.zeros(1, 5)}, "exp_avg has shape \\[1, 5\\]"),
        ("float32", {"exp_avg_sq": torch.zeros(10)[::2]}, "exp_avg_sq has stride 2"),
        ("float32", {"factor": torch.zeros(())}, "factor has shape \\[\\]"),
        ("float32", {"found_inf": torch.zeros(1, dtype=torch.bool)}, "found_inf is torch.bool"),
    ],
)
def test_a_wrong_tensor_is_named(form, changes, message):
    arguments = {**make_tensors(form, torch.float32, 5)._asdict(), "factor": ONE, "found_inf": ZERO, **changes}
    with pytest.raises(ValueError, match=message):
        fused_adam_(**arguments, hyper=ADAMW)


def test_on_meta_tensors_are_checked_and_nothing_is_done():
    tensors = [torch.zeros(5, device="meta") for _ in range(4)]
    with pytest.raises(ValueError, match="factor is on cpu, but the weight on meta"):
        fused_adam_(*tensors, ADAMW, factor=ONE, found_inf=ZERO)
    fused_adam_(*tensors, ADAMW, factor=ONE.to("meta"), found_inf=ZERO.to("meta"))


@pytest.mark.parametrize(
    "field, value", [("beta1", 1.0), ("beta2", -0.1), ("lr", float("nan")), ("eps", -1e-8), ("step", 0)]
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        dataclasses.replace(ADAMW, **{field: value})


@needs_library
def test_an_instruction_set_that_the_cpu_lacks_is_refused():
    tensors = make_tensors("float32", torch.float32, 5)
    for isa in {*native.ISAS[native.ISAS.index(native.best_isa()) + 1 :], "sse9"}:
        with pytest.raises(ValueError, match=f"isa is '{isa}'"):
            native.adam_(tensors, ADAMW.scalars(), decoupled=True, factor=1.0, isa=isa)


@needs_library
def test_a_stale_build_is_refused(monkeypatch):
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    with pytest.raises(ImportError, match="build megalith again"):
        native.library.__wrapped__()


def test_an_absent_library_is_said_once_and_replaced_by_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.warns(UserWarning, match="compiled CPU kernels are absent"):
        assert native.library.__wrapped__() is None
    monkeypatch.setattr(native, "library", lambda: None)
    assert native.best_isa.__wrapped__() == "torch"
    monkeypatch.setattr(native, "best_isa", lambda: "torch")
    tensors, expected = (make_tensors("split", torch.bfloat16, 4097) for _ in range(2))
    public(tensors, ADAMW, ONE, ZERO)
    adam_reference_(expected, ADAMW, ONE, ZERO)
    assert differing(tensors, expected) == []
