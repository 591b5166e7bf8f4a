"""The state of every random generator that a training loop draws from."""

import random
from typing import Any

import numpy
import torch


def capture_rng_state() -> dict[str, Any]:
    """The states of torch's CPU generator, Python's, numpy's, and the current CUDA device's where there is one."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy.random.get_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Set what `capture_rng_state` returned. A CUDA state is left out where there is no CUDA device."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
