"""PTX: pretraining or fine-tuning text that is learned beside PPO, so that the policy keeps what it knew."""

import torch
import torch.distributed as dist

from .batches import collate, windows
from .logprobs import token_logprobs
from .losses import IGNORE


class PtxStream:
    """Windows of samples without end, one an optimizer step, each epoch in an order of its own.

    samples: `templates.Sample`s; batch_size: rows a rank in one window.
    """

    def __init__(self, samples, batch_size, pad_id, seed, ranks):
        self._samples = samples
        self._batch_size = batch_size
        self._pad_id = pad_id
        self._seed = seed
        self._ranks = ranks
        self.loss = float("nan")
        """Nats a label in the last window, over all ranks."""
        self.seek((0, 0))

    def seek(self, cursor):
        """Go on from (epoch, row)."""
        self.cursor = cursor
        ranks = self._ranks
        self._windows = windows(self._samples, ranks.rank, ranks.world_size, self._batch_size, 1, self._seed, cursor)

    def backward(self, trained, weight):
        """Add the gradient of `weight` times the next window's mean loss per label to those of a model."""
        window = next(self._windows)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for rows in window.micro_batches:
            input_ids, labels = collate(rows, self._pad_id, self._ranks.device)
            labels[:, 0] = IGNORE  # nothing comes before the first token
            loss = -token_logprobs(trained.model, input_ids, labels != IGNORE)[0].sum()
            trained.optimizer.backward(loss * (weight * self._ranks.world_size / window.loss_tokens))
            loss_sum += loss.detach()
        if self._ranks.world_size > 1:
            dist.all_reduce(loss_sum)
        self.loss = loss_sum.item() / window.loss_tokens
        self.cursor = window.cursor
