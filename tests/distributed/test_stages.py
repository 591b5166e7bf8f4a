"""Pretraining, reward model and DPO end to end: they learn, two ranks are one rank, and a restart changes no bit."""

import json
import random
import shutil

import pytest
import torch
from megalith.rlhf import train_dpo, train_pretrain, train_reward_model, train_rm, train_sft
from megalith.rlhf.eval import main as eval_main
from megalith.rlhf.eval import summary, win_rate
from megalith.rlhf.reward_model import normalization, normalized
from peft import PeftModel
from safetensors.torch import load_file
from stages import metrics, torchrun
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

COMMON = "--pretrain llama-tiny --device cpu --precision fp32 --log_interval 1 --tensorboard false --lr 3e-3"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(rng):
    return "".join(rng.choice("abcd") for _ in range(rng.randint(3, 6)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    asked = [words(rng) for _ in range(48)]
    return {
        "pairs": write(folder / "pairs.jsonl", [{"prompt": q, "chosen": q, "rejected": q[::-1] + "x"} for q in asked]),
        "texts": write(folder / "texts.jsonl", [{"text": q * rng.randint(1, 4)} for q in asked]),
        "answers": write(folder / "answers.jsonl", [{"prompt": q, "completion": q} for q in asked]),
    }


def options(stage, data, save_path, steps=6, **others):
    given = f"{COMMON} --save_path {save_path} --batch_size 4 --accumulation_steps 2 --max_steps {steps} --max_len 48 "
    given += {
        "pretrain": f"--dataset {data['texts']} --eval_fraction 0.25",
        "sft": f"--dataset {data['answers']} --prompt_format plain --packing --lora_rank 4 --eval_fraction 0.1",
        "rm": f"--dataset {data['pairs']} --prompt_format plain --eval_fraction 0.25",
        "dpo": f"--dataset {data['pairs']} --prompt_format plain",
    }[stage]
    return given.split() + [text for name, value in others.items() for text in (f"--{name}", str(value))]


MAINS = {"pretrain": train_pretrain.main, "sft": train_sft.main, "rm": train_rm.main, "dpo": train_dpo.main}


@pytest.mark.parametrize("stage", MAINS)
def test_it_learns_and_a_restart_in_the_middle_gives_the_same_bits(stage, data, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    MAINS[stage](options(stage, data, whole, save_interval=3))
    losses = [row["loss"] for row in metrics(whole) if "loss" in row]
    assert losses[-1] < losses[0] * 0.95
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("step-00000006", "*.safetensors"))
    shutil.copytree(
        whole / "checkpoints" / "step-00000003", resumed / "checkpoints" / "step-00000003", dirs_exist_ok=True
    )
    MAINS[stage]([*options(stage, data, resumed, save_interval=3), "--resume"])
    assert metrics(resumed) == metrics(whole)
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    name = "adapter_model.safetensors" if stage == "sft" else "model.safetensors"
    one, other = load_file(whole / name), load_file(resumed / name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_samples_show_what_the_numbers_mean(data, tmp_path):
    others = {"steps": 2, "eval_interval": 1}
    train_sft.main(options("sft", data, tmp_path / "sft", **others))
    rows = read_samples(tmp_path / "sft")
    assert [row["step"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert rows[0]["reference"] == rows[0]["prompt"] + "<|endoftext|>" and "answer" in rows[0]
    train_pretrain.main(options("pretrain", data, tmp_path / "pretrain", **others))
    texts = {json.loads(line)["text"] + "<|endoftext|>" for line in data["texts"].read_text().splitlines()}
    assert {row["prompt"] + row["reference"] for row in read_samples(tmp_path / "pretrain")} <= texts
    train_rm.main(options("rm", data, tmp_path / "rm", **others))
    rows = read_samples(tmp_path / "rm")
    chosen, rejected = rows[-1]["answers"]
    assert chosen["text"] == rows[-1]["prompt"] + "<|endoftext|>" and (chosen["rank"], rejected["rank"]) == (0, 1)
    margins = [row["answers"][0]["score"] - row["answers"][1]["score"] for row in rows if row["step"] == 2]
    assert len(margins) == 4 and len(set(margins)) > 1
    train_dpo.main([*options("dpo", data, tmp_path / "dpo", **others), "--eval_fraction", "0.25"])
    assert {answer["score"] for row in read_samples(tmp_path / "dpo")[:4] for answer in row["answers"]} == {0.0}


def read_samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_two_ranks_with_adapters_are_one_rank_of_the_same_reward_model(data, tmp_path):
    base = tmp_path / "base"
    train_sft.main(options("sft", data, base, steps=1, lora_rank=0))  # its last flag counts
    others = {"lora_rank": 4, "lora_merge": True, "pretrain": base}
    status, output = torchrun(
        "train_reward_model", *options("rm", data, tmp_path / "two", strategy="colossalai_zero3", **others)
    )
    assert status == 0, output
    assert "schema preference, 48 comparisons of 96 answers" in output
    others["accumulation_steps"] = 4
    train_reward_model.main(options("rm", data, tmp_path / "one", strategy="zero2_cpu", **others))
    for row, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)

    # The merged model, and the adapter on the base, score as they did in training; the statistics are of those scores.
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two", local_files_only=True).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, local_files_only=True)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "two" / "adapter").eval()
    ids = torch.tensor([[97, 98, 99, 97, 98, 99, 256]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
    last = metrics(tmp_path / "two")[-1]
    assert normalized(torch.tensor(last["mean"]), normalization(merged.config)) == pytest.approx(0, abs=1e-5)
    assert merged.config.std == pytest.approx(last["std"])


def test_dpo_starts_at_ln_2_and_the_reference_without_adapters_is_a_copy(data, tmp_path):  # D1
    base = tmp_path / "base"
    train_pretrain.main(options("pretrain", data, base, steps=1))
    # A reward model's margins are not DPO's: with them the rows stay the same to it.
    pairs = [json.loads(line) | {"margin": 3.0} for line in data["pairs"].read_text().splitlines()]
    others = {"pretrain": base, "lora_rank": 4, "steps": 3, "eval_fraction": 0.25}
    train_dpo.main(options("dpo", data, tmp_path / "lora", dataset=write(tmp_path / "margins", pairs), **others))
    rows = metrics(tmp_path / "lora")
    ln2 = pytest.approx(0.693147, abs=1e-6)
    assert rows[0] == {"step": 0, "eval_loss": ln2, "eval_accuracy": 0.5, "eval_margin": 0}
    assert rows[1]["loss"] == ln2
    train_dpo.main(options("dpo", data, tmp_path / "full", pretrain=base, steps=3, eval_fraction=0.25))
    assert metrics(tmp_path / "full")[0] == rows[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full", local_files_only=True)


def test_a_packed_run_of_a_family_that_cannot_is_refused_before_anything_is_written(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_pretrain.main(options("pretrain", data, tmp_path / "out", pretrain="opt-tiny"))
    assert "--packing: opt does not tell" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluation_of_a_model_against_itself_is_a_draw_and_the_page_stands_alone(data, tmp_path):
    base, judge, out = tmp_path / "base", tmp_path / "judge", tmp_path / "out"
    train_sft.main(options("sft", data, base, steps=1, lora_rank=0))
    train_rm.main(options("rm", data, judge, steps=1, pretrain=base))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"<b>{index}"} for index in range(5)])
    given = f"--pretrain {base} --baseline {base} --rm_path {judge} --prompts {prompts} --prompt_format plain "
    given += f"--max_new_tokens 6 --save_path {out} --device cpu --samples 3"
    eval_main(given.split())
    report = json.loads((out / "eval.json").read_text())
    assert report["model"] == report["baseline"]
    assert (report["win_rate"], report["prompts"], report["model"]["kl"]) == (0.5, 5, 0)
    page = (out / "samples.html").read_text()
    assert "&lt;b&gt;2" in page and "<b>2" not in page and "&lt;b&gt;3" not in page
    assert "http" not in page and "<script" not in page
    assert len((out / "samples.jsonl").read_text().splitlines()) == 5


def test_the_summary_is_that_of_the_answers():
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0])[0] == (1 + 0.5 + 0 + 1) / 4
    numbers = summary([1.0, 3.0], [0.5, 1.5], [2, 4], [True, False])
    assert (numbers["reward"], numbers["kl"], numbers["length"], numbers["truncated"]) == (2, 1, 3, 0.5)
    assert numbers["reward_error"] == pytest.approx(1.0)
