"""Collectives over one chunk's flat buffer: free functions, and the only callers of torch.distributed in the hot path.

Ranks on one host that compute on the CPU read each other's memory, and gloo carries what tells them when. On several
hosts gloo carries the data too, in sends and receives straight into slices: its own all-gather and reduce-scatter go
through fresh temporaries and measure 5 to 6 times slower, at 5 times the CPU time, which on a CPU is the time of the
compute. The sum over ranks is taken in rank order, so that no bit of it depends on how parameters are cut into chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .peer_memory import PeerMemory, find_peers

PIECE_NUMEL = 1 << 18
"""Of what is read from a peer and added at once: it stays in the cache."""

_WORD = "failure of rank {}"


@dataclass(frozen=True)
class RankGroup:
    """The ranks that share a model. `transfers` carries chunks, `control` small agreements on the host; one engine
    alone uses them, so that the caller's own collectives can run beside a lane's."""

    rank: int
    world_size: int
    transfers: dist.ProcessGroup | None
    control: dist.ProcessGroup | None
    peers: PeerMemory | None = None
    """The ranks' memory, where all are on one host and compute on the CPU."""
    on_gpu: bool = False

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def scratch_numel(self, numel: int) -> int:
        """What a reduction of `numel` elements needs beside its result: the other ranks' slices, or pieces of them,
        which NCCL does not hand out."""
        if self.on_gpu or not self.is_distributed:
            return 0
        slice_numel = numel // self.world_size
        return (self.world_size - 1) * (min(slice_numel, PIECE_NUMEL) if self.reads_peers else slice_numel)

    @property
    def reads_peers(self) -> bool:
        return self.peers is not None

    def received_bytes(self, full: torch.Tensor) -> int:
        """By each rank, when `full` is gathered or reduced."""
        return full.nbytes // self.world_size * (self.world_size - 1)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values = [value]
        if self.is_distributed:
            values = [None] * self.world_size
            with self.explained():
                dist.all_gather_object(values, value, self.control)
        return values

    def tell(self, message: str) -> None:
        """Leave word for the other ranks of what fails here: they will see a connection that closes."""
        if self.control is not None:
            self.control.get_group_store().set(_WORD.format(self.rank), message)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An exchange with other ranks: where it fails, the error says what word they have left of why."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            words = self._words_of_others()
            if not words:
                raise
            raise RuntimeError(f"{'; '.join(words)} (seen here as: {error})") from error

    def _words_of_others(self) -> list[str]:
        words = []
        if self.control is not None:
            with suppress(RuntimeError):  # the rank that keeps them may be gone too
                store = self.control.get_group_store()
                for rank in _others(self):
                    if store.check([_WORD.format(rank)]):
                        words.append(f"rank {rank} failed: {store.get(_WORD.format(rank)).decode()}")
        return words

    def barrier(self, error: Exception | None = None) -> None:
        """Wait for all ranks. Where any brought an error, raise on all: its own, or a RuntimeError that names the
        rank."""
        messages = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"rank {rank} failed: {message}")


def make_rank_group(parent: dist.ProcessGroup | None, device: torch.device, timeout_s: float) -> RankGroup:
    """Called by every rank of `parent` (None: the default group, or one rank when torch.distributed is not
    initialised)."""
    if not dist.is_available() or not dist.is_initialized():
        if parent is not None:
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        return RankGroup(0, 1, None, None)
    world_size = dist.get_world_size(parent)
    if world_size == 1:
        return RankGroup(0, 1, None, None)
    ranks = dist.get_process_group_ranks(parent or dist.group.WORLD)

    def new_group(backend: str) -> dist.ProcessGroup:
        return dist.new_group(
            ranks,
            timeout=timedelta(seconds=timeout_s),
            backend=backend,
            use_local_synchronization=parent is not None,  # ranks outside a sub-group do not come here
        )

    transfers = new_group("nccl" if device.type == "cuda" else "gloo")
    group = RankGroup(dist.get_rank(parent), world_size, transfers, new_group("gloo"), on_gpu=device.type == "cuda")
    return group if group.on_gpu else replace(group, peers=find_peers(group.gather_objects))


def _slices(full: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    return list(full.view(world_size, -1).unbind())


def _exchange(sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor], group: RankGroup, tag: int) -> None:
    """Send to and receive from each peer (ranks in the group); returns when all is done."""
    operations = [
        dist.P2POp(op, tensor, group=group.transfers, tag=tag, group_peer=peer)
        for op, tensors in ((dist.isend, sends), (dist.irecv, receives))
        for peer, tensor in tensors.items()
    ]
    with group.explained():
        for work in dist.batch_isend_irecv(operations):
            work.wait()


@contextmanager
def _exposed(memory: torch.Tensor, group: RankGroup, tag: int) -> Iterator[dict[int, int]]:
    """{peer: the address of its `memory`}, while all ranks may read what all have written. Nobody goes on before all
    have read."""
    peers = _others(group)
    address = torch.tensor([memory.data_ptr()])
    addresses = {peer: torch.empty_like(address) for peer in peers}
    _exchange(dict.fromkeys(peers, address), addresses, group, tag)
    yield {peer: int(value) for peer, value in addresses.items()}
    _exchange(dict.fromkeys(peers, address), addresses, group, tag)


def _others(group: RankGroup) -> list[int]:
    """The other ranks, from the next one on, so that not all read from the same one first."""
    return [(group.rank + step) % group.world_size for step in range(1, group.world_size)]


def all_gather_(full: torch.Tensor, group: RankGroup, tag: int) -> None:
    """Fill `full` [numel] from every rank's own slice of it, in place. `tag` tells chunks apart: ranks that gather
    different chunks wait for each other instead of mixing weights. Nothing on meta, as the others."""
    if full.is_meta:
        return
    slices = _slices(full, group.world_size)
    own = slices[group.rank]
    if full.is_cuda:
        dist.all_gather_into_tensor(full, own, group=group.transfers)
        return
    if group.peers is not None:
        with _exposed(own, group, tag) as addresses:
            for peer, address in addresses.items():
                group.peers.read(peer, address, slices[peer])
        return
    peers = _others(group)
    _exchange(dict.fromkeys(peers, own), {peer: slices[peer] for peer in peers}, group, tag)


def reduce_scatter(full: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor, group: RankGroup, tag: int) -> None:
    """out [numel / world_size] = the sum over ranks of this rank's slice of `full` [numel]; 16-bit sums are taken in
    float32. `scratch` has `group.scratch_numel(numel)` elements."""
    if full.is_meta:
        return
    slices = _slices(full, group.world_size)
    if full.is_cuda:
        dist.reduce_scatter_tensor(out, full, group=group.transfers)
        return
    own = slices[group.rank]
    peers = _others(group)
    parts = dict(zip(peers, scratch.view(len(peers), -1), strict=True))
    if group.peers is None:
        _exchange({peer: slices[peer] for peer in peers}, parts, group, tag)
        sum_in_rank_order(parts | {group.rank: own}, group.rank, out)
        return
    with _exposed(full, group, tag) as addresses:
        for start in range(0, own.numel(), PIECE_NUMEL):
            part = slice(start, min(start + PIECE_NUMEL, own.numel()))
            pieces = {peer: parts[peer][: part.stop - part.start] for peer in peers}
            for peer, address in addresses.items():
                first = group.rank * own.numel() + part.start
                group.peers.read(peer, address + first * full.itemsize, pieces[peer])
            sum_in_rank_order(pieces | {group.rank: own[part]}, group.rank, out[part])


def all_reduce(full: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor, group: RankGroup, tag: int) -> None:
    """out [numel] = the sum over ranks of `full` [numel]; both may be the same memory. `scratch` as for
    reduce_scatter."""
    if full.is_meta:
        return
    if full.is_cuda:
        if out.data_ptr() != full.data_ptr():
            out.copy_(full)
        dist.all_reduce(out, group=group.transfers)
        return
    reduce_scatter(full, _slices(out, group.world_size)[group.rank], scratch, group, tag)
    all_gather_(out, group, tag)


def sum_in_rank_order(parts: dict[int, torch.Tensor], own_rank: int, out: torch.Tensor) -> None:
    """out = parts[0] + parts[1] + …; `out` may be the memory of the own part, the others are overwritten."""
    ordered = [parts[rank] for rank in sorted(parts)]
    if out.dtype != torch.float32:
        total = ordered[0].float()
        for part in ordered[1:]:
            total.add_(part)
        out.copy_(total)
        return
    scratch = parts[1 if own_rank == 0 else 0]  # read by the first addition, so free from then on
    total = ordered[0]
    for part in ordered[1:-1]:
        total = torch.add(total, part, out=scratch)
    torch.add(total, ordered[-1], out=out)


def sum_over_ranks(values: list[float], group: RankGroup) -> list[float]:
    """Host-side agreement on a few numbers, in float64. The same on every rank."""
    if not group.is_distributed:
        return values
    if group.control is None:  # of a rehearsal: every rank would bring the same
        return [value * group.world_size for value in values]
    tensor = torch.tensor(values, dtype=torch.float64)
    with group.explained():
        dist.all_reduce(tensor, group=group.control)
    return tensor.tolist()
