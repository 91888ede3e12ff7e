"""Gradients of the public functions on a `Problem`, held to autograd through the reference."""

import torch
from strategies import Problem, assert_gradients_accurate, autograd

from flash_attn import determinism, flash_attn_func, flash_attn_varlen_func
from flash_attn.reference import attention, attention_varlen


def check_dense(problem: Problem, label=""):
    """dq, dk and dv of flash_attn_func."""
    tensors, options = problem.dense(), problem.options()
    dout = problem.upstream_gradient(tensors[0])
    with determinism.deterministic(problem.deterministic):
        ours = autograd(lambda *x: flash_attn_func(*x, **options), tensors, dout)
    assert_gradients_accurate(
        ours,
        lambda q, k, v, *, dtype: attention(q, k, v, dtype=dtype, **options),
        problem,
        tensors,
        dout,
        label,
    )


def check_dense_under_dropout(problem: Problem, dropout_p: float):
    """dq, dk and dv of flash_attn_func under the mask that it drew.

    Returns out and lse, the tensors, and the options with which the reference repeats the call.
    """
    tensors, options = problem.dense(), problem.options()
    leaves = [x.detach().requires_grad_() for x in tensors]
    torch.manual_seed(problem.seed)
    with determinism.deterministic(problem.deterministic):
        out, lse, s_dmask = flash_attn_func(*leaves, dropout_p, return_attn_probs=True, **options)
    dropped = options | {"dropout_p": dropout_p, "keep": s_dmask >= 0}
    dout = problem.upstream_gradient(out)
    assert_gradients_accurate(
        torch.autograd.grad(out, leaves, dout),
        lambda *x, dtype: attention(*x, dtype=dtype, **dropped),
        problem,
        tensors,
        dout,
    )
    return (out, lse), tensors, dropped


def check_pack(problem: Problem, label=""):
    """dq, dk and dv of flash_attn_varlen_func."""
    tensors, options = problem.packed(), problem.options()
    cu_q, cu_k = problem.cu_seqlens()
    extents = (cu_q, cu_k, max(problem.seqlens_q), max(problem.seqlens_k))
    dout = problem.upstream_gradient(tensors[0])
    with determinism.deterministic(problem.deterministic):
        ours = autograd(lambda *x: flash_attn_varlen_func(*x, *extents, **options), tensors, dout)
    assert_gradients_accurate(
        ours,
        lambda q, k, v, *, dtype: attention_varlen(q, k, v, cu_q, cu_k, dtype=dtype, **options),
        problem,
        tensors,
        dout,
        label,
    )
