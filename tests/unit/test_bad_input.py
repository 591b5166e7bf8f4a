"""A mistake is one error, at once, that names what is wrong."""

import copy
import math

import megalith.engine as engine
import pytest
import torch
from against_torch import adamw, initialized
from megalith.engine.config import EngineConfig, parse_bytes
from torch import nn

WRONG = {
    "zero_stage": [4, -1, "3", [3], None, True],
    "placement": ["gpu", None, ["host"]],
    "param_offload": [-0.1, 1.1, math.nan, "0.5", True],
    "optimizer_offload": [-0.1, 1.1, math.nan, "0.5", True],
    "precision": ["fp8", None, torch.bfloat16, ["fp32"]],
    "max_grad_norm": [0, -1.0, math.nan, "1"],
    "device_budget": [0, -1, 1.5, True, "x", "12 QB", ""],
    "host_budget": [0, -1, 1.5, True, "x", "12 QB", ""],
    "nvme_dir": [3, True, "needs placement='nvme'"],
    "nvme_ring": [None, 0, "x"],
    "nvme_checksums": [1, "yes", None],
    "max_chunk_numel": [0, -1, 1.5, "many", True],
    "prefetch": [-1, 0.5, "1", True],
    "loss_scale": [0, -1.0, math.nan, math.inf, "big"],
    "timeout_s": [0, -1, "long", None],
    "seed": ["x", 1.5],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_wrong_option_is_named(field, value):
    options = {"placement": "host", "precision": "fp16", field: value}
    with pytest.raises((ValueError, TypeError), match=field):
        EngineConfig.from_keywords(**options)


def test_an_unknown_keyword_is_named_with_the_known_ones():
    with pytest.raises(TypeError, match="'zero_stages'.*zero_stage"):
        engine.initialize(nn.Linear(2, 2), zero_stages=3)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"placement": "device", "param_offload": 0.5}, "param_offload"),
        ({"placement": "device", "optimizer_offload": 0.5}, "optimizer_offload"),
        ({"placement": "host", "zero_stage": 2, "param_offload": 0.5}, "param_offload"),
        ({"nvme_dir": "somewhere"}, "nvme_dir"),
        ({"placement": "nvme"}, "nvme_dir"),
    ],
)
def test_options_that_need_others_say_so(options, field):
    with pytest.raises(ValueError, match=field):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("10 kb", 10**4), ("7", 7), (5, 5), ("2TiB", 2**41), (None, None)],
)
def test_budgets_are_read_with_their_unit(text, nbytes):
    assert parse_bytes(text, "device_budget") == nbytes


def refused(error, match, model, optimizer=None, **options):
    with pytest.raises(error, match=match):
        engine.initialize(model, optimizer, **options)


def test_optimizers_that_cannot_be_adopted():
    model, other = nn.Linear(3, 3), nn.Linear(4, 4)
    refused(TypeError, "SGD", model, torch.optim.SGD(model.parameters(), lr=1))
    refused(ValueError, "amsgrad", model, torch.optim.Adam(model.parameters(), amsgrad=True))
    refused(ValueError, "maximize", model, torch.optim.Adam(model.parameters(), maximize=True))
    refused(ValueError, "bias", model, torch.optim.Adam([model.weight]))
    refused(ValueError, r"\[4, 4\]", model, torch.optim.Adam([*model.parameters(), other.weight]))
    refused(ValueError, "optimizer=None.*weight", model)
    stepped = adamw(model)
    model(torch.ones(3)).sum().backward()
    stepped.step()
    refused(ValueError, "stepped", model, stepped)


def test_devices_and_folders_that_are_not_there():
    model = nn.Linear(3, 3).requires_grad_(False)
    refused(ValueError, "device", model, device="tpu")
    refused(FileNotFoundError, "pretrained", model, pretrained="no/such/folder")
    if not torch.cuda.is_available():
        refused(ValueError, "CUDA", model, device="cuda")
    refused(ValueError, "process_group", model, process_group=object())


def test_a_model_is_initialized_once_and_not_copied():
    model, _ = initialized(lambda: nn.Linear(3, 3))
    refused(ValueError, "before", model, adamw(model))
    with pytest.raises(RuntimeError, match="before initialize"):
        copy.deepcopy(model)
    with pytest.raises(ValueError, match="initialize"):
        engine.memory_report(nn.Linear(2, 2))


def test_state_dict_needs_the_weights_to_be_whole():
    model, optimizer = initialized(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), placement="host")
    with pytest.raises(RuntimeError, match="gathered"):
        model.state_dict()
    with engine.gathered(model):
        assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
            "0.weight": (16, 16),
            "0.bias": (16,),
            "1.weight": (16, 16),
            "1.bias": (16,),
        }
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="load_checkpoint"):
        model.load_state_dict(weights)
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(RuntimeError, match="_checkpoint"):
            call()
    whole, _ = initialized(lambda: nn.Linear(3, 3))
    assert whole.state_dict()["weight"].shape == (3, 3)


def test_parameters_thawed_or_added_later_are_refused():
    model, optimizer = initialized(lambda: nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match="initialize"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    model.requires_grad_(True)
    model(torch.ones(2)).sum().backward()
    with pytest.raises(RuntimeError, match="0.weight was frozen"):
        optimizer.step()


def test_a_sparse_gradient_is_refused_by_name():
    model, _ = initialized(lambda: nn.Embedding(10, 4, sparse=True))
    with pytest.raises(RuntimeError, match="weight: a sparse gradient"):
        model(torch.tensor([1])).sum().backward()


def test_a_backward_pass_without_the_loss_scale_is_refused_in_fp16():
    model, optimizer = initialized(lambda: nn.Linear(4, 4), precision="fp16")
    model(torch.ones(4)).float().sum().backward()
    with pytest.raises(RuntimeError, match="optimizer.backward"):
        optimizer.step()


@pytest.mark.parametrize("field", ["device_budget", "host_budget"])
def test_a_budget_that_is_too_small_is_an_error_with_both_counts(field):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    at_rest = engine.plan(model, placement="host", param_offload=0.0, max_chunk_numel=5000).bytes_at_rest
    needed = {tier.value: sum(payloads.values()) for tier, payloads in at_rest.items()}[field.removesuffix("_budget")]
    options = {"placement": "host", "param_offload": 0.0, "max_chunk_numel": 5000}
    with pytest.raises(engine.OutOfBudgetError, match=f"(?s){field}.*{needed - 1}.*{needed}"):
        engine.initialize(model, adamw(model), **options, **{field: needed - 1})
