"""Speeds, not correctness: `make bench` and `make gpu` run these, by --benchmark-only, on all cores or the GPU."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def only_when_asked_for(request):
    if not request.config.getoption("--benchmark-only", default=False):
        pytest.skip("a speed: run with --benchmark-only")
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)
