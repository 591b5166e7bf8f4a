"""Dead ranks, ranks that differ, exceptions, and everything else that runs beside an engine: an error, never a hang."""

import multiprocessing
import os
import signal
import socket
import time
import traceback
from datetime import timedelta

import megalith.engine as engine
import torch
import torch.distributed as dist
from launch import run_ranks
from megalith.rlhf import decoding
from megalith.rlhf.experience import collect
from ppo_cases import PROMPTS, cpu_ranks, make_learner
from tiny import batches, make_model, rank_rows, update_error, weights_of
from torch import nn

PROMISED_S = 30


def _start(family="llama", seed=0, timeout_s=60, **options):
    model = make_model(family, seed=seed, num_hidden_layers=3)
    return engine.initialize(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6), timeout_s=timeout_s, **options
    )


def _step(model, optimizer, rank, world_size, seed=0):
    rows = rank_rows(batches(1, seed=seed)[0], rank, world_size)
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    return loss.item()


# Ranks that die. They cannot go through run_ranks, which takes a death for a failure.


def _mortal(rank, port, function, folder, started):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    # torch's default time-out of 30 minutes: nothing may depend on it.
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=30))
    try:
        function(rank, 2, folder, started)
        outcome = "ended"
    except Exception:
        outcome = traceback.format_exc()
    (folder / f"outcome-{rank}").write_text(outcome)
    os._exit(0)


def _survivors(cases, folder):
    """Run each (name, function) on two ranks of its own, all side by side. `function` sets `started` before its rank 1
    or 0 kills itself. Returns {name: [(exit code, outcome) by rank]}; none may need more than PROMISED_S from then."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "megalith.engine"])
    running = {}
    for name, function in cases:
        (folder / name).mkdir()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        started = context.Event()
        processes = [
            context.Process(target=_mortal, args=(rank, port, function, folder / name, started), daemon=True)
            for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        running[name] = started, processes
    try:
        outcomes = {}
        for name, (started, processes) in running.items():
            assert started.wait(60), f"{name}: training never began"
            deadline = time.monotonic() + PROMISED_S
            for process in processes:
                process.join(max(deadline - time.monotonic(), 0))
                assert process.exitcode is not None, f"{name}: a rank hangs"
            outcomes[name] = [
                (process.exitcode, path.read_text() if (path := folder / name / f"outcome-{rank}").exists() else None)
                for rank, process in enumerate(processes)
            ]
        return outcomes
    finally:
        for _, processes in running.values():
            for process in processes:
                process.kill()
                process.join()


def _die_in_training(rank, world_size, folder, started):
    model, optimizer = _start()
    for step in range(1000):
        if rank == 1 and step == 3:
            # In the backward pass, in the middle of transfers.
            model.model.layers[1].register_full_backward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            started.set()
        _step(model, optimizer, rank, world_size, step)


def _die_in_a_save(dying_rank):
    writes_left = 5

    def run(rank, world_size, folder, started):
        from megalith.engine.safetensors_io import SafetensorsWriter

        model, optimizer = _start()
        _step(model, optimizer, rank, world_size)
        engine.save_checkpoint(folder / "last", model, optimizer, "complete")
        _step(model, optimizer, rank, world_size)
        write = SafetensorsWriter.write

        def write_until_killed(*args, **kwargs):
            nonlocal writes_left
            writes_left -= 1
            if writes_left == 0:
                started.set()
                os.kill(os.getpid(), signal.SIGKILL)
            write(*args, **kwargs)

        if rank == dying_rank:
            SafetensorsWriter.write = write_until_killed
        engine.save_checkpoint(folder / "last", model, optimizer, "interrupted")

    return run


def _die_in_a_save_of_rank_1(*args):
    _die_in_a_save(1)(*args)


def _die_in_a_save_of_rank_0(*args):
    _die_in_a_save(0)(*args)


def test_a_killed_rank_is_an_error_on_the_other_in_time_and_keeps_the_last_checkpoint(tmp_path):
    outcomes = _survivors(
        [("train", _die_in_training), ("save 0", _die_in_a_save_of_rank_0), ("save 1", _die_in_a_save_of_rank_1)],
        tmp_path,
    )
    for name, dead in (("train", 1), ("save 0", 0), ("save 1", 1)):
        assert outcomes[name][dead] == (-signal.SIGKILL, None), name
        code, outcome = outcomes[name][1 - dead]
        assert code == 0 and "Error" in outcome, (name, outcome)
    for name in ("save 0", "save 1"):
        model, optimizer = _start(seed=8)
        assert engine.load_checkpoint(tmp_path / name / "last", model, optimizer) == "complete"
        assert set(optimizer.steps_taken.values()) == {1}
        engine.save_checkpoint(tmp_path / name / "last", model, optimizer)
        assert not [path for path in os.listdir(tmp_path / name) if path.startswith(".last")]


def _fail_in_a_rollout(rank, world_size, folder, started):
    """Rank 1 runs out of memory between two tokens, while both gather the weights block by block."""
    step = decoding.Decoder.step

    def failing(self):
        if rank == 1 and len(self.answers[0].tokens) > 2:
            started.set()
            raise torch.OutOfMemoryError("no memory is left")
        return step(self)

    decoding.Decoder.step = failing
    collect(make_learner(cpu_ranks(rank, world_size), gather_for_generation="never"), PROMPTS)


def test_a_rank_that_fails_in_a_streamed_rollout_ends_the_other(tmp_path):
    [(_, waiting), (_, failed)] = _survivors([("rollout", _fail_in_a_rollout)], tmp_path)["rollout"]
    assert "OutOfMemoryError: no memory is left" in failed and "Error" in waiting


# Ranks that run different programs


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, order):
        for index in order:
            x = torch.tanh(self.blocks[index](x))
        return x.sum()


def _run_orders(rank, world_size):
    """In stage 3 a rank that runs its blocks in an order of its own, or skips one, gathers other chunks than its peer.
    The transfers of different chunks have different tags, so that each waits for the other, until the time-out. (With
    prefetching, a rank may have gathered the block that it skips: then the transfers agree, and so do the numbers.)"""
    errors = []
    for orders in (((0, 1, 2, 3), (3, 2, 1, 0)), ((0, 1, 2, 3), (0, 2, 3))):
        torch.manual_seed(0)
        model = Chain()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
        model, optimizer = engine.initialize(model, optimizer, zero_stage=3, timeout_s=3, prefetch=0)
        x = torch.randn(2, 8)
        for _ in range(2):
            model(x, (0, 1, 2, 3)).backward()
            optimizer.step()
        counts = dict(optimizer.steps_taken)
        error = None
        try:
            model(x, orders[rank]).backward()
            optimizer.step()
        except RuntimeError as caught:
            error = str(caught)
        errors.append(error)
        assert optimizer.steps_taken == counts
        dist.barrier()
    return errors


def test_ranks_that_run_blocks_in_different_orders_get_an_error_and_never_step():
    for errors in run_ranks(2, _run_orders):
        for error in errors:
            assert error is not None and ("different" in error or "transfers" in error), error


# What runs beside an engine


def _retry(rank, world_size):
    """A forward and a backward pass that raise on all ranks, then the same step again: as if nothing had happened."""
    results = []
    for options in ({}, {"zero_stage": 1}, {"placement": "host"}):
        for fails in (None, "forward", "backward"):
            model, optimizer = _start(**options)
            _step(model, optimizer, rank, world_size, 0)

            def fail(*_, fails=fails):
                raise MemoryError(f"in {fails}")

            layer = model.model.layers[1].mlp
            if fails is not None:
                register = layer.register_forward_hook if fails == "forward" else layer.register_full_backward_hook
                handle = register(fail)
                try:
                    _step(model, optimizer, rank, world_size, 1)
                except MemoryError as error:
                    assert str(error) == f"in {fails}"
                else:
                    raise AssertionError("nothing was raised")
                handle.remove()
            for step in (1, 2):
                _step(model, optimizer, rank, world_size, step)
            with engine.gathered(model):
                results.append((options, fails, weights_of(model)))
    return results


def test_a_pass_that_raised_on_all_ranks_can_be_tried_again():
    for options, fails, weights in (results := run_ranks(2, _retry)[1]):
        expected = next(w for o, f, w in results if o == options and f is None)
        assert all(torch.equal(weights[name], expected[name]) for name in weights), (options, fails)


def _two_engines_and_own_collectives(rank, world_size):
    """Two models in turn, with the caller's own collectives in the forward pass, in backward hooks and between."""
    results = []
    for disturbed in (False, True):
        runs = [_start("llama_tied"), _start("qwen2", zero_stage=2, placement="host")]
        sums = []

        def own_collective(*_, sums=sums):
            value = torch.full((1000,), float(rank + 1))
            dist.all_reduce(value)
            sums.append(value.unique().tolist())

        if disturbed:
            for model, _ in runs:
                model.model.layers[1].register_forward_hook(own_collective)
                model.model.layers[2].register_full_backward_hook(own_collective)
        for step in range(3):
            losses = []
            for model, _ in runs:  # both forward passes, then both backward passes
                rows = rank_rows(batches(1, seed=step)[0], rank, world_size)
                losses.append(model(input_ids=rows, labels=rows).loss)
                own_collective()
            for loss, (_, optimizer) in zip(losses, runs, strict=True):
                loss.backward()
                own_collective()
                optimizer.step()
        assert all(value == [3.0] for value in sums)
        for model, _ in runs:
            with engine.gathered(model):
                results.append(weights_of(model))
    return results


def test_two_engines_and_the_callers_own_collectives_do_not_disturb_each_other():
    alone_llama, alone_qwen, llama, qwen = run_ranks(2, _two_engines_and_own_collectives)[0]
    for ours, expected in ((llama, alone_llama), (qwen, alone_qwen)):
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def _generate(rank, world_size):
    """Tokens of generations of different lengths, and of one on rank 0 alone, and the weights after steps between."""
    tokens = []
    for options in ({}, {"prefetch": 3}, {"device_budget": "300KB"}, {"placement": "host"}):
        model, optimizer = _start(**options)
        for step in range(4):
            _step(model, optimizer, rank, world_size, step)
            prompt = batches(1, rows=1, length=3, seed=step)[0]
            with engine.gathered(model), torch.no_grad():
                length = 1 + 2 * step + 3 * rank
                generated = model.generate(prompt, max_new_tokens=length, do_sample=False, pad_token_id=0)
                again = model.generate(prompt, max_new_tokens=length, do_sample=False, pad_token_id=0)
                assert torch.equal(generated, again)
                tokens.append(generated[0].tolist())
                if rank == 0:  # part of the model, in an order of its own, on one rank alone
                    embeddings = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
                    for layer in reversed(model.model.layers):
                        layer(torch.randn(1, 3, 32), position_embeddings=embeddings)
    return tokens


def test_generation_of_different_lengths_never_hangs():
    first, second = run_ranks(2, _generate)
    for short, long in zip(first, second, strict=True):
        assert len(long) == len(short) + 3 and long[: len(short)] == short
    for start in range(0, len(first), 4):  # the same tokens with every option
        assert first[start : start + 4] == first[:4]


def _in_a_sub_group(rank, world_size):
    """Ranks 0 and 2 train two engines; rank 1 does something else."""
    pair = dist.new_group([0, 2])
    if rank == 1:
        return None
    results = []
    for stage in (1, 3):
        model, optimizer = _start(process_group=pair, zero_stage=stage)
        for step in range(3):
            _step(model, optimizer, rank // 2, 2, step)
        with engine.gathered(model):
            results.append(weights_of(model))
    return results


def test_a_sub_group_trains_while_other_ranks_stay_away():
    first, outsider, third = run_ranks(3, _in_a_sub_group)
    assert outsider is None
    model = make_model("llama", num_hidden_layers=3)
    initial, optimizer = weights_of(model), torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    for step in range(3):
        rows = batches(1, seed=step)[0]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(first, third, strict=True):
        assert update_error(initial, ours, weights_of(model)) < 1e-3
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
