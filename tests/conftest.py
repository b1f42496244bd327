"""One thread for torch: tests share two cores with their own child processes. And no test of a property
may depend on how busy these are."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("lte", deadline=None)
hypothesis.settings.load_profile("lte")
# Shells start what goes on in the background with Ctrl-C ignored, and commands that find it so keep it so.
signal.signal(signal.SIGINT, signal.default_int_handler)
