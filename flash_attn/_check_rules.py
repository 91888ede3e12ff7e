"""The rules for tensors: device, dtype, layout and shape, alone and beside the others of a call.
At the end the derivatives that tensors may be asked for in vain.

One function is one group of rules; ``_checks.py`` says which groups hold for which operation. A
decode call passes through here once per layer and token. So a rule that accepts reads metadata
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from flash_attn import _native
from flash_attn._arguments import Append, Cache, Inputs, Outputs
from flash_attn._refusal import refuse

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# ---- One tensor ----------------------------------------------------------------------------------


def tensors(**given: Tensor) -> None:
    """Dense tensors on the device of the first one.

    Asked where a call comes in. A tensor on another device would otherwise decide who answers: with
    one that has no memory (meta) PyTorch hands out results that nobody has computed.
    """
    first = None
    for name, x in given.items():
        tensor(name, x)
        if first is None:
            first = x
        else:
            same_device(name, x, first)


def options(q: Tensor, **given: Tensor | None) -> None:
    """Tensors that may be absent, on the device of q."""
    for name, x in given.items():
        if x is not None:
            tensor(name, x)
            same_device(name, x, q)


def present(**given: Tensor | None) -> None:
    """Arguments whose absence would make another call of this one."""
    for name, x in given.items():
        if x is None:
            tensor(name, x)


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        rule = "a torch.Tensor; torch.as_tensor makes one of a list or a NumPy array"
        refuse(f"{name} must be a tensor", type(x).__name__, rule)
    if x.layout is not torch.strided or x.is_nested:
        received = "a nested tensor" if x.is_nested else f"{name} of layout {x.layout}"
        rule = "a strided tensor; flash_attn_varlen_func takes sequences of several lengths"
        refuse(f"{name} must be a dense tensor", received, rule)


def device(wanted: torch.device) -> None:
    """The one place that decides whether this installation can compute on a device."""
    if wanted.type == "cuda":
        _gpu(wanted)
    elif wanted.type != "cpu":
        what = f"this installation holds no {wanted.type.upper()} kernels"
        refuse(what, f"a tensor on {wanted}", "all tensors are on the CPU or on a NVIDIA GPU")


@cache  # once accepted, always accepted: a GPU and a library stay what they are
def _gpu(wanted: torch.device) -> None:
    archs = _native.cuda_archs()
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(wanted)
        received = f"{wanted} of capability {capability}"
        if capability < (8, 0):
            what = "FlashAttention only supports Ampere GPUs or newer"
            refuse(what, received, "capability 8.0 or above")
        if archs and _runs_on(capability, archs):
            return
        if archs:
            what = "this installation's CUDA kernels are for other GPUs"
            rule = f'a library built with FLASH_ATTN_CUDA_ARCHS="{capability[0]}{capability[1]}"'
            refuse(what, f"{received}, kernels for {';'.join(archs)}", rule)
    rule = (
        "all tensors are on the CPU, or a library built for GPUs: with a CUDA build of PyTorch "
        "installed, nvcc on PATH or CUDA_HOME set, and FLASH_ATTN_FORCE_CUDA=1, run "
        "`pip install --no-build-isolation .`"
    )
    refuse("this installation holds no CUDA kernels", f"a tensor on {wanted}", rule)


def _runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Code of an architecture runs on GPUs of its major version that are not older; the library
    holds the PTX of the last one too, which newer GPUs compile. A letter ties code to one GPU (90a)
    or to one family (100f), and the PTX is that of the last one without."""
    for arch in archs:
        built = divmod(int(arch.rstrip("af")), 10)
        if arch.endswith("a"):
            fits = built == capability
        else:
            fits = built[0] == capability[0] and built <= capability
        if fits:
            return True
    plain = [arch for arch in archs if arch.isdigit()]
    return bool(plain) and divmod(int(plain[-1]), 10) <= capability


def dtype(wanted: torch.dtype, on: torch.device) -> None:
    if wanted not in DTYPES or (wanted == torch.float32 and on.type != "cpu"):
        what = "FlashAttention only support fp16 and bf16 data type (on the CPU fp32 as well)"
        refuse(what, f"{wanted} on {on}", "float16, bfloat16, on the CPU float32")


def same_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        received = f"q on {q.device}, {name} on {tensor.device}"
        refuse(f"{name} is not on the device of q", received, "one device for all tensors")


def shape(name: str, tensor: Tensor, letters: str, expected: Sequence[int | None]) -> None:
    """``letters`` spell the shape in the message; None stands for any size."""
    got = tensor.shape
    if got == expected or (
        len(got) == len(expected)
        and all(w in (None, g) for g, w in zip(got, expected, strict=True))
    ):
        return
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    received = f"{name} of shape {tuple(tensor.shape)}"
    refuse(f"{name} must have shape ({letters})", received, f"here that is ({sizes})")


def last_stride(what: str, name: str, tensor: Tensor) -> None:
    # With one element or none along a dimension, its stride is never used.
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        what = f"{what} must have contiguous last dimension"
        refuse(what, f"{name} with strides {tensor.stride()}", "stride 1 along the last dimension")


def like_q(
    name: str, tensor: Tensor, q: Tensor, letters: str, expected: Sequence[int | None], pair: str
) -> None:
    """A tensor of the device and dtype of q (``pair`` names the two), with a shape of its own."""
    same_device(name, tensor, q)
    if tensor.dtype != q.dtype:
        received = f"q of {q.dtype}, {name} of {tensor.dtype}"
        refuse(f"{pair} must have the same dtype", received, "the dtype of q")
    shape(name, tensor, letters, expected)


def fp32(what: str, name: str, tensor: Tensor, q: Tensor) -> None:
    same_device(name, tensor, q)
    if tensor.dtype != torch.float32:
        refuse(f"{what} must have dtype fp32", f"{name} of {tensor.dtype}", "torch.float32")


def index(name: str, x: Tensor | None, q: Tensor, letters: str, *expected: int | None) -> Tensor:
    """Metadata of an index tensor, which is returned; its contents have rules of their own."""
    if x is None:
        refuse(f"{name} must be a tensor", "None", "an int32 tensor")
    same_device(name, x, q)
    if x.dtype != torch.int32:
        refuse(f"{name} must have dtype int32", f"{name} of {x.dtype}", "torch.int32")
    shape(name, x, letters, expected)
    return x


# ---- The tensors of a call -----------------------------------------------------------------------


def packed(name: str, x: Tensor, count: int) -> None:
    """``kv`` holds 2 and ``qkv`` holds 3 tensors along dimension -3."""
    tensor(name, x)
    if x.dim() not in (4, 5) or x.shape[-3] != count:
        what = f"{name} must have shape (b, s, {count}, h, d) or (total, {count}, h, d)"
        received = f"{name} of shape {tuple(x.shape)}"
        refuse(what, received, f"4 or 5 dimensions, and size {count} in dimension -3")


def qkv(inputs: Inputs, q_letters: str, k_letters: str, *, suffix: str = "") -> None:
    """Queries, keys and values; ``suffix`` is "_cache" where k and v are the caches."""
    q, k, v = inputs.q, inputs.k, inputs.v
    device(q.device)
    dtype(q.dtype, q.device)
    shape("q", q, q_letters, (None,) * (q_letters.count(",") + 1))
    k_shape = (None,) * k_letters.count(",") + (q.shape[-1],)
    like_q(f"k{suffix}", k, q, k_letters, k_shape, "query and key")
    like_q(f"v{suffix}", v, q, k_letters, k.shape, "query and value")
    if suffix:  # other inputs are copied when their last stride is not 1; a cache is written to
        what = "Input tensor must have contiguous last dimension"
        last_stride(f"{what}: k_cache", "k_cache", k)
        last_stride(f"{what}: v_cache", "v_cache", v)


def sizes(b: int, q: Tensor, k: Tensor, phase: str, low_level: bool) -> None:
    h_q, h_kv, d = q.shape[-2], k.shape[-2], q.shape[-1]
    if b < 1:
        refuse("batch size must be positive", f"{b=}", "b >= 1")
    if d > MAX_HEAD_DIM:
        what = f"FlashAttention {phase} only supports head dimension at most {MAX_HEAD_DIM}"
        refuse(what, f"{d=}", f"1 <= d <= {MAX_HEAD_DIM}")
    if d < 1:
        refuse("head dimension must be positive", f"{d=}", f"1 <= d <= {MAX_HEAD_DIM}")
    if low_level and d % 8 != 0:
        what = "query, key, value, and out_ must have a head_size that is a multiple of 8"
        if phase == "backward":
            what = "head_size should be a multiple of 8"
        refuse(what, f"{d=}", "d % 8 == 0 in the low-level ops; the public functions take any d")
    if h_q < 1 or h_kv < 1 or h_q % h_kv != 0:
        what = "Number of heads in key/value must divide number of heads in query"
        refuse(what, f"{h_q=}, {h_kv=}", "both are at least 1 and h_q % h_kv == 0")


def alibi(alibi_slopes: Tensor | None, q: Tensor, b: int) -> None:
    if alibi_slopes is None:
        return
    h_q = q.shape[-2]
    fp32("ALiBi slopes", "alibi_slopes", alibi_slopes, q)
    if alibi_slopes.shape not in ((h_q,), (b, h_q)):
        received = f"alibi_slopes of shape {tuple(alibi_slopes.shape)}"
        rule = f"here that is {(h_q,)} or {(b, h_q)}"
        refuse("alibi_slopes must have shape (h_q) or (b, h_q)", received, rule)
    last_stride("ALiBi slopes tensor", "alibi_slopes", alibi_slopes)


def block_table(table: Tensor, q: Tensor, b: int, page_size: int, leftpad: Tensor | None) -> int:
    """Metadata of a paged cache; returns the number of keys that one row of the table can hold."""
    if leftpad is not None:
        what = "We don't support Paged KV and leftpad_k running at the same time yet"
        refuse(what, "block_table and left padding", "at most one of the two")
    index("block_table", table, q, "b, max_blocks", b, None)
    page(page_size, q.device)
    return table.shape[1] * page_size


def page(size: int, on: torch.device) -> None:
    # The CPU kernels look each key up in the table, the GPU kernels as many as a copy takes along.
    # flash-attn asks for 256.
    step = 16 if on.type == "cuda" else 1
    if size < 1 or size % step != 0:
        what = "Paged KV cache block size must be divisible by 16 (on the CPU: at least 1)"
        refuse(what, f"page size {size} on {on}", f"a positive multiple of {step} here")


def cache_rows(cache: Cache, b: int) -> None:
    paged = cache.block_table is not None
    if cache.batch_idx is not None and paged:
        what = "Paged KVcache does not support cache_batch_idx"
        refuse(what, "block_table and cache_batch_idx", "at most one of the two")
    if cache.batch_idx is None and not paged and cache.k.shape[0] < b:
        what = "k_cache must have shape (b_cache, s_cache, h_kv, d) with a row for each sequence"
        received = f"k_cache of shape {tuple(cache.k.shape)} and q with {b=}"
        refuse(what, received, "b_cache >= b, or cache_batch_idx")


def new_keys(q: Tensor, cache: Cache, new: Append, capacity: int) -> int:
    """Keys and values to append; returns how many each sequence gets."""
    k, v = new.k, new.v
    if k is None:
        if v is not None:
            what = "If value is supplied, key must also be passed in"
            refuse(what, "v without k", "both or neither")
        return 0
    if v is None:
        refuse("If key is supplied, value must also be passed in", "k without v", "both or neither")
    if cache.seqlens is None:
        what = "If key is supplied, seqlens_k must also be passed in"
        refuse(what, "k without cache_seqlens", "cache_seqlens says where the new keys go")
    # flash-attn has this among its errors, although s_q > capacity would be well defined. Kept, for
    # a program that runs there cannot run into it, and one that expects the refusal finds it.
    if q.shape[1] > capacity:
        what = "If key is supplied, seqlen_q must be <= seqlen_k, the seqlen of the KV cache"
        refuse(what, f"s_q={q.shape[1]}, {capacity=}", "s_q <= capacity in a call that appends")
    k_shape = (q.shape[0], None, cache.k.shape[2], q.shape[3])
    like_q("k", k, q, "b, s_new, h_kv, d", k_shape, "query and key")
    like_q("v", v, q, "b, s_new, h_kv, d", k.shape, "query and value")
    return k.shape[1]


def rotary(q: Tensor, new: Append, capacity: int) -> None:
    cos, sin = new.rotary_cos, new.rotary_sin
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        what = "If rotary cos is provided, rotary sin must also be provided"
        refuse(what, f"rotary_{'sin' if cos is None else 'cos'} alone", "both or neither")
    if new.k is None:
        what = (
            "If rotary cos/sin are provided, new key / value to be appended to KV cache must also"
        )
        refuse(f"{what} be provided", "rotary_cos and rotary_sin without k", "rotary needs k and v")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        expected = (None, None) if table is cos else cos.shape
        like_q(name, table, q, "s_rotary, rotary_dim / 2", expected, f"query and {name}")
        if not table.is_contiguous():
            refuse(f"{name} must be contiguous", f"strides {table.stride()}", "a contiguous table")
    rotary_dim, d = 2 * cos.shape[1], q.shape[3]
    if rotary_dim > d:
        refuse("rotary_dim must be <= headdim", f"{rotary_dim=}, {d=}", "rotary_dim <= d")
    if rotary_dim % 16 != 0:
        what = "Only rotary dimensions divisible by 16 are currently supported"
        refuse(what, f"{rotary_dim=}", "rotary_dim % 16 == 0")
    if cos.shape[0] < capacity:
        what = "cos/sin seqlen must be at least the seqlen of KV cache"
        refuse(what, f"{cos.shape[0]} rows, {capacity=}", "one row for each row of the cache")


def saved_for_backward(q: Tensor, outputs: Outputs, dropout_p: float) -> None:
    """What the forward returned. The dense lse is (b, h_q, s_q), the varlen one (h_q, total_q)."""
    softmax_lse, rng_state = outputs.softmax_lse, outputs.rng_state
    like_q("out", outputs.out, q, "the shape of q", q.shape, "query and out")
    *b, s_q, h_q, _ = q.shape
    fp32("softmax_lse", "softmax_lse", softmax_lse, q)
    letters = "b, h_q, s_q" if b else "h_q, total_q"
    shape("softmax_lse", softmax_lse, letters, (*b, h_q, s_q))
    if rng_state is not None:
        same_device("rng_state", rng_state, q)
        if rng_state.dtype != torch.int64:
            refuse("rng_state must have dtype int64", f"{rng_state.dtype}", "torch.int64")
        shape("rng_state", rng_state, "2", (2,))
    elif dropout_p > 0.0:
        what = "rng_state must be passed to a backward with dropout"
        refuse(what, f"rng_state=None, {dropout_p=}", "the rng_state that the forward returned")


def gradient(name: str, tensor: Tensor, of: Tensor, q: Tensor) -> None:
    """dout, or a buffer for dq, dk or dv where the caller passes one."""
    shape_of = "out" if name == "dout" else name[1:]
    like_q(name, tensor, q, f"the shape of {shape_of}", of.shape, f"query and {name}")


def partials(out: Tensor, max_log2: Tensor, sum: Tensor, reduced: torch.dtype) -> None:
    dtype(reduced, out.device)
    for name, tensor in (("out", out), ("max_log2", max_log2), ("sum", sum)):
        fp32(f"partials.{name}", name, tensor, out)
    if out.dim() not in (4, 5):
        what = "partials.out must have shape (n, b, s_q, h_q, d) or (n, total_q, h_q, d)"
        refuse(what, f"out of shape {tuple(out.shape)}", "segments, then as q")
    *leading, s_q, h_q, _ = out.shape
    letters = "n, b, h_q, s_q" if len(leading) == 2 else "n, h_q, total_q"
    shape("partials.max_log2", max_log2, letters, (*leading, h_q, s_q))
    shape("partials.sum", sum, letters, (*leading, h_q, s_q))


def packed_only(**options: Tensor | None) -> None:
    for name, tensor in options.items():
        if tensor is not None:
            received = f"{name} of shape {tuple(tensor.shape)}"
            refuse(
                f"{name} needs a packed batch", received, "cu_seqlens_q and cu_seqlens_k as well"
            )


# ---- Derivatives that do not exist ---------------------------------------------------------------


def gradient_refused(option: str) -> NoReturn:
    refuse(
        "the backward pass does not support this forward pass",
        f"{option} in the forward pass",
        "gradients need dense or packed keys: no block_table, leftpad_k or seqused_k",
    )


def forward_mode_refused(name: str) -> NoReturn:
    what = "forward-mode derivatives (jvp, jacfwd, linearize, dual tensors) are not supported"
    refuse(what, f"a tangent of {name}", "reverse mode: backward, autograd.grad, func.grad, jacrev")


def second_derivative_refused() -> NoReturn:
    what = "second derivatives (double backward, hessian) are not supported"
    refuse(what, "a backward pass through the gradients of attention", "differentiate it once")


def cache_gradient_refused() -> NoReturn:
    what = "flash_attn_with_kvcache has no gradient"
    rule = "gradients need flash_attn_func or flash_attn_varlen_func"
    refuse(what, "a backward pass through its result", rule)


def transform_refused(function: str) -> NoReturn:
    rule = "a call outside, or apply_rotary_emb_torch, which is plain PyTorch and rounds otherwise"
    refuse(f"{function} does not run inside torch.func", "a call inside a transform", rule)


def vmap_refused(names: str) -> NoReturn:
    what = "vmap is not supported where a call writes into its arguments"
    refuse(what, f"vmap over {names}", "one call for each, or the batch dimension of the call")
