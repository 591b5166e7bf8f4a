"""`samples.jsonl`: a few answers of every iteration or evaluation, to read what the numbers mean."""

import json
from pathlib import Path

from .metrics import reopened


class SamplesLog:
    """Written by the first rank; rows of a former run beyond `first_step` are dropped, as in `metrics.jsonl`."""

    def __init__(self, folder, enabled, first_step):
        self._file = None
        if not enabled:
            return
        self._file = reopened(Path(folder) / "samples.jsonl", first_step)

    def write(self, step, experience, decode, count):
        """The first `count` episodes: prompt, response, raw score, KL summed over the answer, length, truncated."""
        if self._file is None:
            return
        rollout = experience.rollout
        kl = (experience.logprobs - experience.ref_logprobs).sum(1).tolist()
        for row in range(min(count, len(rollout))):
            answer = rollout.answers[row]
            sample = {
                "step": step,
                "prompt": decode(rollout.prompts[row].ids),
                "response": decode(answer.ids[:-1] if answer.stopped else answer.ids),
                "score": experience.scores[row].item(),
                "kl": kl[row],
                "length": len(answer.ids),
                "truncated": not answer.stopped,
            }
            self.write_row(sample)

    def write_row(self, row):
        """One row: a dict with a `step`."""
        if self._file is not None:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self):
        if self._file is not None:
            self._file.close()
