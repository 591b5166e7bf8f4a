"""A model trained twice from the same weights, by plain PyTorch and by the engine, and what of it is compared."""

from collections.abc import Callable

import megalith.engine as engine
import torch
from megalith.engine.shard import engine_of
from tiny import update_error, weights_of
from torch import Tensor, nn


def adamw(model: nn.Module, **changes) -> torch.optim.AdamW:
    """eps above the noise of a gradient that is zero in exact arithmetic, which Adam would turn into steps."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, **{"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1, **changes})


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[nn.Module, int], Tensor], steps) -> None:
    """The user's loop, clipped at norm 1 in both cases; `steps` is a count or the steps' numbers."""
    torch.manual_seed(7)
    for step in range(steps) if isinstance(steps, int) else steps:
        loss = loss_of(model, step)
        if isinstance(optimizer, engine.ZeroOptimizer):
            optimizer.backward(loss)
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def initialized(build: Callable[[], nn.Module], make_optimizer=adamw, **options) -> tuple:
    """A seeded model and its optimizer, given to the engine. Small chunks, so that modules outside blocks have groups
    of their own and are really released."""
    torch.manual_seed(0)
    model = build()
    return engine.initialize(model, make_optimizer(model), **{"max_chunk_numel": 100, "max_grad_norm": 1.0, **options})


def error_against_torch(build, loss_of, steps=4, make_optimizer=adamw, **options) -> float:
    """The relative error of the engine's update against plain PyTorch's."""
    torch.manual_seed(0)
    plain = build()
    initial = weights_of(plain)
    ours, optimizer = initialized(build, make_optimizer, **options)
    fit(plain, make_optimizer(plain), loss_of, steps)
    fit(ours, optimizer, loss_of, steps)
    for (name, buffer), ours_buffer in zip(plain.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(ours_buffer, buffer, msg=name)
    return update_error(initial, gathered_weights(ours), weights_of(plain))


def gathered_weights(model: nn.Module) -> dict[str, Tensor]:
    with engine.gathered(model):
        return weights_of(model)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What is at rest, at one rank: "payload fqn" to values, for the weights, their masters and the moments."""
    result = {}
    for chunk in engine_of(model).chunks:
        for owned in chunk.owned_slots:
            payloads = ("weight", "master", "exp_avg", "exp_avg_sq") if chunk.spec.trainable else ("weight",)
            for payload in payloads:
                result[f"{payload} {owned.slot.fqn}"] = chunk.values_of(payload, owned.shard_slice).clone()
    return result


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names under which two states differ in any bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
