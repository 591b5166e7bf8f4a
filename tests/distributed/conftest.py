"""These tests are of the CPU path: where there is a GPU, tests/gpu runs on it, in a process of its own."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
