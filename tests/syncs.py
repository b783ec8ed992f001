"""Counting the calls that would make a host wait for its GPU, on a CPU."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or whose shape of result, the host must read off the device.
READS = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.equal.default",
    "aten._unique2.default",
    "aten.repeat_interleave.Tensor",
}
# Methods that copy a tensor to the host. On a CPU they reach no operator.
COPIES = ("cpu", "numpy", "tolist")


class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = name in ("aten.index.Tensor", "aten.index_put_.default") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def counted():
    """-> list of the names of such calls, which grows. .cpu().numpy() counts once."""
    with Reads() as reads:
        copied = {}
        for name in COPIES:
            method = getattr(torch.Tensor, name)

            def copy(tensor, *args, name=name, method=method, **kwargs):
                if name == "cpu" or not getattr(tensor, "on_host", False):
                    reads.names.append(name)
                result = method(tensor, *args, **kwargs)
                if name == "cpu":
                    result = result.view_as(result)
                    result.on_host = True
                return result

            copied[name] = copy
        with patch.multiple(torch.Tensor, **copied):
            yield reads.names
