"""One thread for torch: tests share two cores with their own child processes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
