"""Collectives over chunks: reading peers' memory and sending it give the same bits, and the first needs every rank."""

from dataclasses import replace

import pytest
import torch
from launch import run_ranks
from megalith.engine import collectives
from megalith.engine.collectives import all_gather_, all_reduce, make_rank_group, reduce_scatter
from megalith.engine.peer_memory import PeerMemory, can_read_own

needs_reads = pytest.mark.skipif(not can_read_own(), reason="this system does not let a process read another's memory")
SLICE_NUMEL = (1, 7, 1000, 2500)


def _collect(group, dtype):
    """Of every size: what is gathered, reduced, and reduced in place on all ranks."""
    results = []
    for numel in SLICE_NUMEL:
        generator = torch.Generator().manual_seed(100 * numel + group.rank)
        full = torch.randn(numel * group.world_size, generator=generator).to(dtype)
        scratch = torch.empty(group.scratch_numel(full.numel()), dtype=dtype)
        out = torch.empty(numel, dtype=dtype)
        reduce_scatter(full, out, scratch, group, tag=3)
        summed = full.clone()
        all_reduce(summed, summed, scratch, group, tag=4)
        all_gather_(full, group, tag=5)
        results.append((full, out, summed))
    return results


def _both_ways(rank, world_size):
    collectives.PIECE_NUMEL = 1000  # so that there are several, and one that is not whole
    reading = make_rank_group(None, torch.device("cpu"), timeout_s=20)
    sending = replace(reading, peers=None)
    assert reading.reads_peers
    return [(_collect(reading, dtype), _collect(sending, dtype)) for dtype in (torch.float32, torch.bfloat16)]


@needs_reads
@pytest.mark.parametrize("world_size", [2, 3])
def test_reading_and_sending_give_the_same_bits_and_sums(world_size):
    by_rank = run_ranks(world_size, _both_ways)
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        for index, numel in enumerate(SLICE_NUMEL):
            inputs = [
                torch.randn(numel * world_size, generator=torch.Generator().manual_seed(100 * numel + rank)).to(dtype)
                for rank in range(world_size)
            ]
            total = inputs[0].float()
            for each in inputs[1:]:
                total = total + each.float()
            total = total.to(dtype)
            gathered = torch.cat([each.chunk(world_size)[rank] for rank, each in enumerate(inputs)])
            for rank, results in enumerate(by_rank):
                for way in results[number]:
                    assert torch.equal(way[index][0], gathered)
                    assert torch.equal(way[index][1], total.chunk(world_size)[rank])
                    assert torch.equal(way[index][2], total)


def _one_rank_may_not_read(rank, world_size):
    def refuse(self, *_):
        raise PermissionError("not allowed")

    if rank == 1:
        PeerMemory.read = refuse
    group = make_rank_group(None, torch.device("cpu"), timeout_s=20)
    return group.reads_peers, _collect(group, torch.float32)


@needs_reads
def test_where_one_rank_may_not_read_all_send():
    first, second = run_ranks(2, _one_rank_may_not_read)
    assert not first[0]
    assert not second[0]
    for mine, theirs in zip(first[1], second[1], strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[2], theirs[2])


@needs_reads
def test_another_process_s_memory_that_is_not_there_is_an_error():
    out = torch.zeros(8)
    with pytest.raises(OSError, match="cannot read the memory of rank 0"):
        PeerMemory([2**22 + 1]).read(0, 4096, out)
