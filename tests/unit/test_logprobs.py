"""Log-probabilities in chunks against the model's own logits, in every family, and with gradients."""

import pytest
import torch
from megalith.rlhf import logprobs as module
from megalith.rlhf.logprobs import token_logprobs
from tiny import FAMILIES, VOCAB, make_model


def rows(seed=3):
    """input_ids [4, 12] and which tokens are scored; one row has none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (4, 12), generator=generator)
    starts, ends = torch.tensor([[4], [1], [11], [12]]), torch.tensor([[9], [12], [12], [12]])
    places = torch.arange(12)
    return ids, (places >= starts) & (places < ends)


def by_definition(model, ids, scored, temperature=1.0):
    logits = model(input_ids=ids).logits.float() / temperature
    logprobs = logits[:, :-1].log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return [torch.nn.functional.pad(x, (1, 0)) * scored for x in (chosen, entropy)]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMEL", 3 * VOCAB)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, small_chunks):
    model = make_model(family)
    ids, scored = rows()
    model.eval()
    with torch.no_grad():
        expected = by_definition(model, ids, scored)
        actual = token_logprobs(model, ids, scored, with_entropy=True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    assert not actual[0][~scored].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_are_those_of_the_whole_logits(temperature, small_chunks):
    ids, scored = rows()
    weights = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    gradients = []
    for function in (token_logprobs, by_definition):
        model = make_model("llama_tied")
        (function(model, ids, scored, temperature=temperature)[0] * weights).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-5, rtol=1e-4)


def test_logits_of_a_batch_never_exist(small_chunks):
    model = make_model("llama")
    largest = 0

    def watch(head, args, output):
        nonlocal largest
        largest = max(largest, output.numel())

    model.lm_head.register_forward_hook(watch)
    ids, scored = rows()
    token_logprobs(model, ids, scored)[0].sum().backward()
    assert 0 < largest <= 3 * VOCAB < scored.sum() * VOCAB


def test_left_padding_with_a_mask_gives_the_same():
    model = make_model("gpt2").eval()
    ids, scored = rows()
    with torch.no_grad():
        alone = token_logprobs(model, ids[:1, :9], scored[:1, :9])[0]
        padded = torch.nn.functional.pad(ids[:1, :9], (3, 0))
        mask = torch.nn.functional.pad(torch.ones(1, 9, dtype=torch.int64), (3, 0))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ours = token_logprobs(
            model, padded, torch.nn.functional.pad(scored[:1, :9], (3, 0)), attention_mask=mask, position_ids=positions
        )[0]
    torch.testing.assert_close(ours[:, 3:], alone, atol=1e-5, rtol=1e-5)


def test_through_peft():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids, scored = rows()
    with torch.no_grad():
        ours, expected = token_logprobs(model, ids, scored)[0], by_definition(model, ids, scored)[0]
        with model.disable_adapter():
            reference = token_logprobs(model, ids, scored)[0]
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)
    assert (reference - ours).abs().max() > 0.01


def test_what_cannot_be_scored_is_an_error():
    model = make_model("llama")
    ids, scored = rows()
    with pytest.raises(ValueError, match="first token of a row"):
        token_logprobs(model, ids, torch.ones_like(scored))
    with pytest.raises(ValueError, match="most_scored=3, but this rank has 17"):
        token_logprobs(model, ids, scored, most_scored=3)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0"):
        token_logprobs(model, ids, scored)
    with pytest.raises(ValueError, match="no language-model head"):
        token_logprobs(model.model, ids, scored)
