"""What the tests' own launcher tells of a rank that never ends."""

import time

import pytest
from launch import run_ranks


def _rank_that_waits_for_ever(rank, world_size):
    while rank == 1:
        time.sleep(0.1)


def test_a_rank_that_outlives_the_timeout_fails_with_its_stack():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 was still running after 4 s:.*_rank_that_waits_for_ever"):
        run_ranks(2, _rank_that_waits_for_ever, timeout_s=4)
