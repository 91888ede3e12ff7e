"""Transformers with attn_implementation="flash_attention_2" runs on this package, in both senses:
its results are those of its own eager attention, and its attention no longer depends on the batch.

Matrix products around attention may change bits with the batch, so attention is compared on the
very inputs that the model handed it.
"""

import pytest
import torch
from device import DEVICE, SEGMENT
from torch.nn.functional import scaled_dot_product_attention as sdpa

from flash_attn import determinism, flash_attn_func, reference
from flash_attn.testing import assert_bitwise_equal

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

from transformers.integrations import flash_attention as integration  # noqa: E402
from transformers.utils import is_flash_attn_2_available  # noqa: E402

pytestmark = pytest.mark.gpu

LAYERS, VOCABULARY, PAD = 2, 128, 0
LENGTHS = (SEGMENT + 188, 130, SEGMENT + 1, 64)  # of the prompts; they cross blocks and segments
NEW_TOKENS = 5


@pytest.fixture(autouse=True)
def flash_attention_2():
    if not is_flash_attn_2_available():
        pytest.skip(
            "transformers sees no distribution flash-attn 2: it reads the metadata of installed "
            "packages, and a folder on sys.path has none; `pip install .` or `make build`"
        )


def llama(attention, dtype=torch.bfloat16):
    """The same random weights for every attention, rounded to bf16; buffers stay in fp32."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,  # scores of a few units: a softmax that is far from uniform
        pad_token_id=PAD,
        eos_token_id=None,  # no sequence ends early
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    return model.to(DEVICE)


def prompts():
    """ids and mask (b, the longest), padded on the left."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
    for row, length in zip(ids, LENGTHS, strict=True):
        row[-length:] = torch.randint(1, VOCABULARY, (length,))
    return ids.to(DEVICE), (ids != PAD).long().to(DEVICE)


def greedy(model, ids, mask, new_tokens):
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def test_forward_and_gradients_are_those_of_eager_attention():
    ids, mask = prompts()
    weights = torch.randn(VOCABULARY, device=DEVICE)

    def run(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        loss = (logits.float() @ weights).mean()
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        return {"logits": logits, **dict(zip(names, gradients, strict=True))}

    truth = run(llama("eager", torch.float32))
    plain = run(llama("eager"))
    for name, actual in run(llama("flash_attention_2")).items():
        reference.assert_accurate(actual, truth[name], plain[name], label=name)


def test_generate_with_a_cache_is_eager_attention_without():
    """Each step's logits are those of the whole text so far; the token is their maximum."""
    ids, mask = prompts()
    found = greedy(llama("flash_attention_2"), ids, mask, NEW_TOKENS)
    logits = torch.stack(found.logits, dim=1).bfloat16()  # b, steps, vocabulary
    assert torch.equal(found.sequences[:, -NEW_TOKENS:], logits.argmax(-1))

    text = found.sequences[:, :-1]
    text_mask = torch.nn.functional.pad(mask, (0, NEW_TOKENS - 1), value=1)
    position_ids = (text_mask.cumsum(-1) - 1).clamp(min=0)

    @torch.no_grad()
    def steps(model):
        whole = model(input_ids=text, attention_mask=text_mask, position_ids=position_ids).logits
        return whole[:, -NEW_TOKENS:]

    truth, plain = steps(llama("eager", torch.float32)), steps(llama("eager"))
    reference.assert_accurate(logits, truth, plain, label="logits of the new tokens")


@pytest.fixture
def attention_calls(monkeypatch):
    """What a model hands to flash attention while it generates, and gets back."""
    original, calls = integration._flash_attention_forward, []

    def record(q, k, v, attention_mask, **options):
        out = original(q, k, v, attention_mask, **options)
        calls.append((q, k, v, options, out))
        return out

    def run():
        monkeypatch.setattr(integration, "_flash_attention_forward", record)
        greedy(llama("flash_attention_2"), *prompts(), new_tokens=2)
        monkeypatch.setattr(integration, "_flash_attention_forward", original)
        assert len(calls) == 2 * LAYERS  # the prompts, then one token against the cache
        return calls

    return run


def alone(x, sequence):
    """One sequence of a padded batch (b, s, ...) without its padding."""
    if x.shape[1] == 1:
        return x[sequence : sequence + 1]
    return x[sequence : sequence + 1, max(LENGTHS) - LENGTHS[sequence] :]


@pytest.mark.parametrize("switch", ["set_deterministic", "environment variable"])
def test_a_prompt_alone_and_in_a_padded_batch(attention_calls, switch, monkeypatch):
    """Every layer's attention gives the same bytes, for the prompts and for the next token."""
    if switch == "set_deterministic":
        determinism.set_deterministic(True)
    else:
        monkeypatch.setenv(determinism.ENVIRONMENT_VARIABLE, "1")
    assert determinism.is_deterministic()
    for q, k, v, options, out in attention_calls():
        for sequence in range(len(LENGTHS)):
            inputs = [alone(x, sequence) for x in (q, k, v)]
            # Positions belong to the batch; attention looks at them for packed sequences alone.
            own = options | {"query_length": inputs[0].shape[1], "position_ids": None}
            found = integration._flash_attention_forward(*inputs, None, **own)
            assert_bitwise_equal(found, alone(out, sequence))
            assert_bitwise_equal(found, flash_attn_func(*inputs, causal=True))


def test_control_another_attention_depends_on_the_batch(attention_calls):
    """The same comparison tells PyTorch's attention of a padded batch from that of one prompt."""
    q, k, v, _, _ = attention_calls()[0]
    longest = max(LENGTHS)
    begin = torch.tensor([longest - length for length in LENGTHS], device=DEVICE)
    at = torch.arange(longest, device=DEVICE)
    visible = (at[:, None] >= at) & (at >= begin[:, None])[:, None]  # b, query, key
    visible |= at[:, None] == at  # a row of padding sees itself, not nothing

    def run(q, k, v, **options):
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return sdpa(*heads_first, enable_gqa=True, **options).transpose(1, 2)

    together = run(q, k, v, attn_mask=visible[:, None])
    differs = [
        not torch.equal(
            run(*(alone(x, sequence) for x in (q, k, v)), is_causal=True),
            alone(together, sequence),
        )
        for sequence in range(len(LENGTHS))
    ]
    assert any(differs)
