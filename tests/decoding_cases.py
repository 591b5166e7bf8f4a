"""Models, prompts and the plain model's own word, which the tests of decoding share."""

import torch
from tiny import VOCAB, make_model


def lively_model(family: str, **changes):
    """Weights large enough that positions and context decide, and not the last token alone."""
    model = make_model(family, **changes).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return model


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def plain_logits(model, prompt, tokens) -> torch.Tensor:
    """Those [len(tokens), V] that predict `tokens` after `prompt`: one pass, no cache, no padding."""
    logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def check_greedy(model, prompts, answers):
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = plain_logits(model, prompt, answer.tokens)
        assert answer.tokens == logits.argmax(dim=-1).tolist()
        check_logprobs(logits.log_softmax(dim=-1), answer)


def check_logprobs(expected, answer):
    expected = expected.gather(1, torch.tensor(answer.tokens).unsqueeze(1)).squeeze(1)
    assert (torch.tensor(answer.logprobs) - expected).abs().max() <= 1e-5
