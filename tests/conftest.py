"""One thread a process: the models are tiny, and idle OpenMP workers would spin on the cores that other ranks need."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
