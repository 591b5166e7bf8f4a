"""The same short training by plain PyTorch and by the engine, for the parity tests."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import megalith.engine as engine
import torch
from tiny import batches, make_model, rank_rows, weights_of


@dataclass(frozen=True)
class Recipe:
    """What both sides do."""

    family: str = "llama"
    steps: int = 5
    adam: type = torch.optim.AdamW
    max_grad_norm: float | None = 1.0
    accumulation: int = 1
    frozen: str | None = None
    """Parameters whose name contains this are frozen."""
    reentrant_checkpoint: bool | None = None
    """Activation checkpointing: None for none, else which kind."""
    generates: bool = False
    """Greedy generation between the steps."""
    model_changes: tuple[tuple[str, Any], ...] = ()

    def but(self, **changes: Any) -> "Recipe":
        return replace(self, **changes)


@dataclass(frozen=True)
class Outcome:
    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    generated: list[list[int]]


def prepare(recipe: Recipe, device: str = "cpu") -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = make_model(recipe.family, **dict(recipe.model_changes)).to(device)
    if recipe.reentrant_checkpoint is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recipe.reentrant_checkpoint})
    for name, parameter in model.named_parameters():
        if recipe.frozen is not None and recipe.frozen in name:
            parameter.requires_grad_(False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.95)},
    ]
    # GPT-2's and OPT's key biases have a gradient that is zero in exact arithmetic. With torch's eps of 1e-8 Adam turns
    # its rounding noise into steps, which no two orders of summation share.
    return model, recipe.adam(groups, lr=1e-3, eps=1e-6)


@functools.cache
def reference(recipe: Recipe) -> "Outcome":
    """The outcome of plain PyTorch on one rank, computed once a process."""
    return train(recipe)


def train(
    recipe: Recipe,
    rank: int = 0,
    world_size: int = 1,
    options: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Outcome:
    """Train on this rank's rows; `options` None is plain PyTorch, else keywords of `initialize`."""
    model, optimizer = prepare(recipe, device)
    initial = weights_of(model)
    plain = options is None
    if not plain:
        model, optimizer = engine.initialize(model, optimizer, max_grad_norm=recipe.max_grad_norm, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.3 * step))
    losses, norms, generated = [], [], []
    micro_batches = iter(batches(recipe.steps * recipe.accumulation))
    model.train()
    for _ in range(recipe.steps):
        for _ in range(recipe.accumulation):
            rows = rank_rows(next(micro_batches), rank, world_size).to(device)
            loss = model(input_ids=rows, labels=rows).loss / recipe.accumulation
            loss.backward() if plain else optimizer.backward(loss)
            losses.append(loss.item())
        if plain:
            limit = recipe.max_grad_norm or float("inf")
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
        if not plain:
            norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
        scheduler.step()
        if recipe.generates:
            model.eval()
            prompt = batches(1, rows=2, length=4, seed=5)[0].to(device)
            generated.append(model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist())
            model.train()
    if plain:
        return Outcome(initial, weights_of(model), losses, norms, generated)
    with engine.gathered(model):
        return Outcome(initial, weights_of(model), losses, norms, generated)
