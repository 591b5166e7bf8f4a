"""Losses as pure functions. B: batch, T: tokens, V: vocabulary."""

import torch.nn.functional as F

IGNORE = -100


def completion_loss_sum(logits, labels):
    """Summed cross-entropy, in nats, of the labelled tokens: sum over labels[b, t] != IGNORE, t > 0, of -log
    p(labels[b, t] | before t).

    logits [B, T, V] of any dtype, labels int64 [B, T]; returns a float32 scalar. Position t of the logits predicts
    token t + 1. Only the labelled rows are widened to float32. A batch without labels gives 0 that still reaches the
    logits' graph.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORE
    return F.cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="sum")


def ranking_loss_sum(scores, pairs, loss_fn="log_sig", center_coefficient=0.0):
    """Summed loss of ranked answers (Bradley-Terry; Ouyang et al. 2022, eq. 1, over all K (K - 1) / 2 pairs of a
    prompt): sum over pairs of weight · (-log sigmoid(Δ)), Δ = scores[better] - scores[worse] - margin.

    scores float32 [N] of the answers, `pairs` a Pairs; returns a scalar. log_exp, log(1 + e^-Δ), is the same function
    by another name; both stay finite, with finite gradients, for any Δ. The centre term adds
    coefficient · weight · (scores[better] + scores[worse])², which pulls scores to mean 0 (Eisenstein et al. 2023).
    """
    better, worse = scores[pairs.better], scores[pairs.worse]
    delta = better - worse - pairs.margin
    losses = {"log_sig": lambda: -F.logsigmoid(delta), "log_exp": lambda: F.softplus(-delta)}[loss_fn]()
    if center_coefficient:
        losses = losses + center_coefficient * (better + worse).square()
    return (pairs.weight * losses).sum()


def ranking_metrics(scores, pairs):
    """{"accuracy", "margin"}: weighted sums over pairs of whether the better answer scores higher (a draw is half) and
    of by how much."""
    delta = (scores[pairs.better] - scores[pairs.worse]).detach()
    right = (delta > 0).float() + 0.5 * (delta == 0)
    return {"accuracy": (pairs.weight * right).sum(), "margin": (pairs.weight * delta).sum()}
