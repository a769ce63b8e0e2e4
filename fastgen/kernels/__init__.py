"""Triton kernels, one file each. Importing one imports Triton; nothing else in the package does.

Each file has the formula on top, the kernel, a launcher that writes into tensors it is given, and custom operators
that `torch.compile`, autocast, DDP and CUDA graphs take as they are. The plain references are in `losses.py`,
`augment.py` and `models/norm_act.py`; that a kernel equals its reference is proved by the tests in Triton's
interpreter and by `benchmarks.gpu_check` on a GPU.
"""
