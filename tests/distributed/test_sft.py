"""Supervised fine-tuning end to end, through the commands that users type, on rows of GSM8K."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from megalith.rlhf import train_sft
from safetensors.torch import load_file
from stages import torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
STEPS = 6


def options(dataset, save_path, strategy, accumulation_steps):
    given = f"--pretrain llama-tiny --model llama --strategy {strategy} --dataset {dataset} --save_path {save_path} "
    given += f"--batch_size 4 --accumulation_steps {accumulation_steps} --lr 3e-3 --max_steps {STEPS} --log_interval 1 "
    given += "--prompt_format plain --max_len 256 --precision fp32 --device cpu --save_interval 3 --tensorboard false"
    return given.split()


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    if not GSM8K.is_file():
        pytest.skip("the GSM8K rows are not beside this checkout")
    path = tmp_path_factory.mktemp("data") / "gsm8k.jsonl"
    with GSM8K.open() as rows:
        path.write_text("".join(next(rows) for _ in range(64)))
    return path


@pytest.fixture(scope="module")
def zero3_run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    status, output = torchrun("train_sft", *options(dataset, folder, "colossalai_zero3", accumulation_steps=2))
    assert status == 0, output
    return folder, output


def test_two_ranks_learn_and_say_what_they_found(zero3_run):
    folder, output = zero3_run
    losses = [loss for _, loss, _, _ in metrics(folder)]
    assert losses[-1] < losses[0] - 0.5
    assert "schema question/answer, " in output
    assert "not trained: '" in output and "  trained: '" in output


def test_the_output_loads_in_transformers(zero3_run):
    folder, _ = zero3_run
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer("2+2=").input_ids])
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_a_restart_in_the_middle_gives_the_same_bits(zero3_run, dataset, tmp_path):
    folder, _ = zero3_run
    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed, ignore=shutil.ignore_patterns("step-00000006", "model.safetensors"))
    status, output = torchrun("train_sft", *options(dataset, resumed, "zero3", accumulation_steps=2), "--resume")
    assert status == 0, output
    assert metrics(resumed) == metrics(folder)
    whole, again = load_file(folder / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_one_rank_and_another_stage_have_the_same_curve(zero3_run, dataset, tmp_path):
    folder, _ = zero3_run
    train_sft.main(options(dataset, tmp_path / "out", "zero2", accumulation_steps=4))
    for (step, loss, norm, rate), expected in zip(metrics(tmp_path / "out"), metrics(folder), strict=True):
        assert (step, rate) == (expected[0], expected[3])
        assert loss == pytest.approx(expected[1], rel=1e-5)
        assert norm == pytest.approx(expected[2], rel=1e-4)


def test_a_wrong_row_ends_both_ranks_with_its_line(dataset, tmp_path):
    path = tmp_path / "wrong.jsonl"
    path.write_text(dataset.read_text() + '{"question": "2+2?"}\n')
    status, output = torchrun("train_sft", *options(path, tmp_path / "out", "zero3", 1), timeout_s=60)
    assert status != 0
    assert f"error: {path}, line 65: field 'answer' is missing" in output
    assert not (tmp_path / "out").exists()
