"""A device that is not the CPU, for machines that have none: tensors that say they are on `meta`, and keep
their numbers. As on a GPU, they do not mix with those of the CPU; as on an Apple GPU, there is no float64."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
aten = torch.ops.aten
MOVING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # by numbers here


class Elsewhere(torch.Tensor):
    "A tensor of the device."
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=ELSEWHERE)

    def __init__(self, inner): self.inner = inner

    def __repr__(self, **how): return f"Elsewhere({self.inner!r})"

    def tolist(self): return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


def numbers(t):
    "What a tensor holds, wherever it is."
    t = t.detach()
    return t.inner if isinstance(t, Elsewhere) else t


def _is_here(t): return isinstance(t, torch.Tensor) and not isinstance(t, Elsewhere)


def _goes(func, args, kwargs):
    "Whether the result is on the device. Raises `RuntimeError` for tensors that do not mix."
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = any(isinstance(t, Elsewhere) for t in tensors)
    if there and func not in MOVING | INDEXING and any(_is_here(t) and t.dim() for t in tensors):
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, and one is on the CPU")
    if func is aten.copy_.default: there = isinstance(args[0], Elsewhere)
    asked = kwargs.get("device")
    return there if asked is None else torch.device(asked) == ELSEWHERE


def _wrapped(t):
    if not _is_here(t): return t
    if t.dtype in (torch.float64, torch.complex128): raise TypeError("this device has no float64")
    return Elsewhere(t.resolve_conj().resolve_neg())


def dispatch(func, args, kwargs):
    "An operation, as the device would do it."
    goes = _goes(func, args, kwargs)
    if goes and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: Expected a generator of this device, and it is the CPU's")
    inner_args, inner = tree_map(lambda t: t.inner if isinstance(t, Elsewhere) else t, (args, kwargs))
    if goes and func is aten.copy_.default: _wrapped(inner_args[1])
    if inner.get("device") is not None: inner["device"] = torch.device("cpu")
    out = func(*inner_args, **inner)
    if func._schema.name.endswith("_"): return args[0] if func._schema.returns else None  # in place
    return tree_map(_wrapped, out) if goes else out


class Device(TorchDispatchMode):
    "While this is on, `meta` is that device."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})
