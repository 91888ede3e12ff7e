"""Names, parameters and defaults: what other packages import and inspect."""

import inspect

import pytest
import torch
from device import DEVICE, FINEST
from packaging.version import Version

import flash_attn
import flash_attn_2_cuda
from flash_attn import flash_attn_interface
from flash_attn.testing import assert_bitwise_equal, cumulative_lengths, random_normal

TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
NO_DEFAULT = inspect.Parameter.empty
PUBLIC = {
    "flash_attn_func": (["q", "k", "v"], TAIL),
    "flash_attn_kvpacked_func": (["q", "kv"], TAIL),
    "flash_attn_qkvpacked_func": (["qkv"], TAIL),
    "flash_attn_varlen_func": (
        ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
        TAIL | {"block_table": None},
    ),
    "flash_attn_varlen_kvpacked_func": (
        ["q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
        TAIL,
    ),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], TAIL),
    "flash_attn_with_kvcache": (
        ["q", "k_cache", "v_cache"],
        {
            "k": None,
            "v": None,
            "rotary_cos": None,
            "rotary_sin": None,
            "cache_seqlens": None,
            "cache_batch_idx": None,
            "cache_leftpad": None,
            "block_table": None,
            "softmax_scale": None,
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "rotary_interleaved": True,
            "alibi_slopes": None,
            "num_splits": 0,
            "return_softmax_lse": False,
        },
    ),
}
SCORE = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
BACKWARD = "dout q k v out softmax_lse dq dk dv"
LOW_LEVEL = {
    "_flash_attn_forward": (f"q k v {SCORE} return_softmax", {}),
    "_flash_attn_varlen_forward": (
        f"q k v {LENGTHS} dropout_p softmax_scale causal",
        {
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
            "return_softmax": False,
            "block_table": None,
            "leftpad_k": None,
            "seqused_k": None,
            "zero_tensors": False,
        },
    ),
    "_flash_attn_backward": (f"{BACKWARD} {SCORE} deterministic", {"rng_state": None}),
    "_flash_attn_varlen_backward": (
        f"{BACKWARD} {LENGTHS} {SCORE} deterministic",
        {"rng_state": None, "zero_tensors": False},
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signature(name):
    """Names, order and defaults of the parameters: Transformers inspects them."""
    required, defaults = PUBLIC[name]
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert list(parameters) == [*required, *defaults]
    for parameter in parameters.values():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default == defaults.get(parameter.name, NO_DEFAULT)
    assert getattr(flash_attn_interface, name) is getattr(flash_attn, name)


@pytest.mark.parametrize("name", LOW_LEVEL)
def test_low_level_signature(name):
    """The four custom ops: names, order and defaults, as ring-style libraries introspect them."""
    required, defaults = LOW_LEVEL[name]
    op = getattr(flash_attn_interface, name)
    assert isinstance(op, torch._library.custom_ops.CustomOpDef)
    schema = getattr(torch.ops.flash_attn, name).default._schema
    spec = inspect.getfullargspec(op._init_fn)
    expected = [*required.split(), *defaults]
    extra = spec.args[len(expected) :]
    assert spec.args[: len(expected)] == expected and extra in ([], ["num_splits"])
    assert [argument.name for argument in schema.arguments] == spec.args
    assert list(spec.defaults or ()) == [*defaults.values(), *[0] * len(extra)]


def test_names_that_other_libraries_import():
    """Everything listed in API 1.1 to 1.4 can be imported from where upstream has it."""
    interface = (
        "FlashAttnQKVPackedFunc FlashAttnVarlenQKVPackedFunc FlashAttnKVPackedFunc "
        "FlashAttnVarlenKVPackedFunc FlashAttnFunc FlashAttnVarlenFunc maybe_contiguous "
        "round_multiple _get_block_size_n flash_attn_gpu _wrapped_flash_attn_forward "
        "_wrapped_flash_attn_backward _wrapped_flash_attn_varlen_forward "
        "_wrapped_flash_attn_varlen_backward"
    )
    assert [name for name in interface.split() if not hasattr(flash_attn_interface, name)] == []
    for name in ("fwd", "varlen_fwd", "bwd", "varlen_bwd", "fwd_kvcache"):
        assert callable(getattr(flash_attn_2_cuda, name))
        assert callable(getattr(flash_attn_interface.flash_attn_gpu, name))


TENSORS = {
    "q": (6, 4, 16),
    "k": (6, 2, 16),
    "v": (6, 2, 16),
    "kv": (6, 2, 2, 16),
    "qkv": (6, 3, 2, 16),
}
CLASSES = {
    "FlashAttnFunc": "flash_attn_func",
    "FlashAttnKVPackedFunc": "flash_attn_kvpacked_func",
    "FlashAttnQKVPackedFunc": "flash_attn_qkvpacked_func",
    "FlashAttnVarlenFunc": "flash_attn_varlen_func",
    "FlashAttnVarlenKVPackedFunc": "flash_attn_varlen_kvpacked_func",
    "FlashAttnVarlenQKVPackedFunc": "flash_attn_varlen_qkvpacked_func",
}


def arguments_of(function_name: str) -> list[object]:
    """Every argument by position; causal, so that a dropped or shifted option shows."""
    required, defaults = PUBLIC[function_name]
    arguments: list[object] = []
    for name in required:
        if name in TENSORS:
            shape = TENSORS[name] if "varlen" in function_name else (2, *TENSORS[name])
            x = random_normal(shape, seed=len(arguments), dtype=FINEST, device=DEVICE)
            arguments.append(x.requires_grad_())
        elif name.startswith("cu_seqlens"):
            arguments.append(cumulative_lengths([2, 4], DEVICE))
        else:
            arguments.append(4)
    return [*arguments, *(defaults | {"softmax_scale": 0.5, "causal": True}).values()]


@pytest.mark.parametrize("name", CLASSES)
def test_autograd_classes(name):
    """`apply` takes all of the function's arguments in order, then is_grad_enabled."""
    function = getattr(flash_attn, CLASSES[name])
    apply = getattr(flash_attn_interface, name).apply
    given = arguments_of(CLASSES[name])
    expected, out = function(*given), apply(*given, torch.is_grad_enabled())
    assert_bitwise_equal(out, expected)
    leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients = (torch.autograd.grad(x.sum(), leaves) for x in (out, expected))
    for gradient, wanted in zip(*gradients, strict=True):
        assert_bitwise_equal(gradient, wanted)
    causal = list(PUBLIC[CLASSES[name]][1]).index("causal") + len(PUBLIC[CLASSES[name]][0])
    given[causal] = False
    assert not torch.equal(apply(*given, True), expected)

    without = apply(*given, False)
    assert not without.requires_grad
    with torch.no_grad():
        assert not apply(*given, True).requires_grad


@pytest.mark.parametrize("name", CLASSES)
def test_autograd_classes_take_every_argument(name):
    """A call with some left out was answered with its last argument dropped: not causal."""
    apply = getattr(flash_attn_interface, name).apply
    given = arguments_of(CLASSES[name])
    for count in range(len(given) + 1):
        with pytest.raises(TypeError, match=r"received .* without .*is_grad_enabled; rule: "):
            apply(*given[:count])
    with pytest.raises(TypeError, match=rf"^flash_attn: {name}\.apply takes .*; rule: .*"):
        apply(*given, True, True)
    parameters = [*inspect.signature(getattr(flash_attn, CLASSES[name])).parameters]
    parameters[parameters.index("return_attn_probs")] = "return_softmax"
    with pytest.raises(TypeError, match=", ".join(parameters) + ", is_grad_enabled$"):
        apply()


def test_version():
    """A 2.8.3 family version, below 2.8.4: libraries gate on both."""
    version = Version(flash_attn.__version__)
    assert version.release == (2, 8, 3) and version < Version("2.8.4")
