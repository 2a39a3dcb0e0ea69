"""For all tests: one thread a process, no model hub."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the tensors are tiny and the tests run side by side: more threads only wait for each other
torch.set_num_threads(1)
