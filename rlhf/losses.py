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
