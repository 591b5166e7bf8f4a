"""The bars of the quantiser on a small model that was trained: every linear's objective, and the perplexity.

It reads Python's own manual, byte by byte, for a few seconds. That is enough for its activations to have strong
directions, which is what GPTQ lives on; those of random weights, or of the demo's model, have few.
"""

import math
from pydoc_data.topics import topics

import pytest
import torch
from megalith.rlhf import load_quantized
from megalith.rlhf.arguments import parse
from megalith.rlhf.quantize import GROUPS, quantize
from megalith.rlhf.tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

STEPS, BATCH, LENGTH = 60, 16, 64
HELD_OUT = 40_000  # bytes at the end of the text
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the model, file of the text it was trained on, and ids [B, T] of the text it was not."""
    root = tmp_path_factory.mktemp("trained")
    text, tokenizer = "\n\n".join(topics.values()), byte_tokenizer()
    (root / "text.txt").write_text(text[:-HELD_OUT], encoding="utf-8")
    ids = {}
    for name, part in (("train", text[:-HELD_OUT]), ("held_out", text[-HELD_OUT:])):
        flat = torch.tensor(tokenizer(part).input_ids)
        ids[name] = flat[: len(flat) // LENGTH * LENGTH].view(-1, LENGTH)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=2 * LENGTH,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SIZES,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step + 1, 20) / 20 * (1 - step / STEPS))
    for _ in range(STEPS):
        batch = ids["train"][torch.randint(len(ids["train"]), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.half().float().save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model", root / "text.txt", ids["held_out"]


@torch.no_grad()
def nats(model, ids):
    return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize(("argv", "bar"), [([], 0.15), (["--no_desc_act"], 0.25)], ids=["act-order", "in order"])
def test_every_linear_stays_below_its_bar(tmp_path, trained, argv, bar):
    folder, text, held_out = trained
    given = ["--pretrain", str(folder), "--save_path", str(tmp_path / "out"), "--dataset", str(text), "--samples", "64"]
    report = quantize(*parse(GROUPS, [*given, *argv], prog="megalith quantize"))
    ratios = {row["linear"]: row["ratio"] for row in report}
    assert len(ratios) == 14 and max(ratios.values()) <= bar, ratios

    own = nats(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), held_out)
    frequencies = held_out.unique(return_counts=True)[1] / held_out.numel()
    assert own < 0.8 * -(frequencies * frequencies.log()).sum().item()  # it has learnt more than which bytes are common
    assert math.exp(nats(load_quantized(tmp_path / "out"), held_out) - own) <= 1.01
