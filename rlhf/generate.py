"""Greedy generation in batches."""

import torch


@torch.no_grad()
def generate_greedy(model, prompts, max_new_tokens, eos_id, pad_id, batch_size=64, device="cpu"):
    """Continue lists of token ids greedily; returns lists of the new ids, without the end-of-sequence token and what
    follows.

    Prompts are padded on the left with an attention mask, and batched by length. Under a sharded model, call it inside
    `engine.gathered(model)`.
    """
    was_training = model.training
    model.eval()
    answers = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        length = max(len(prompts[index]) for index in chosen)
        input_ids = torch.full((len(chosen), length), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(chosen):
            input_ids[row, length - len(prompts[index]) :] = torch.tensor(prompts[index])
            attention_mask[row, length - len(prompts[index]) :] = 1
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
        )
        for index, new in zip(chosen, output[:, length:].tolist(), strict=True):
            answers[index] = new[: new.index(eos_id)] if eos_id in new else new
    model.train(was_training)
    return answers
