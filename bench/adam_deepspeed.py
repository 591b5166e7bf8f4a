"""DeepSpeed's CPU Adam for bench/adam.py, run by the Python of an environment that has DeepSpeed and not megalith.

    python adam_deepspeed.py NUMEL THREADS

Says its version once it is ready, then answers each line (peer.py), "step" or "step with casts", with the seconds that
one such update took.
"""

import json
import sys
import time

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam


def main() -> None:
    numel, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    master = torch.nn.Parameter(torch.randn(numel).mul_(0.02))
    weight = master.detach().to(torch.bfloat16)
    grad = torch.randn(numel).to(torch.bfloat16)
    master.grad = grad.float()
    optimizer = DeepSpeedCPUAdam([master], lr=1e-3, weight_decay=0.1, adamw_mode=True)

    def step_with_casts() -> None:
        # What ZeRO-Offload does to a partition: gradients to float32, unscale and clip, step, weight from master.
        master.grad.copy_(grad)
        master.grad.mul_(0.5)
        optimizer.step()
        weight.copy_(master.detach())

    updates = {"step": optimizer.step, "step with casts": step_with_casts}
    for update in updates.values():
        update()
    reply({"deepspeed": deepspeed.__version__})
    for line in sys.stdin:
        update = updates[json.loads(line)]
        start = time.perf_counter()
        update()
        reply(time.perf_counter() - start)


def reply(value) -> None:
    print("\nreply " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
