"""The commands of the original announcement, word for word but for the program's path, the files' names, and how long
an episode is."""

import json
import random
import shlex

import pytest
from megalith.bench import ppo as benchmark
from megalith.rlhf import train_reward_model, train_sft
from stages import metrics, torchrun
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

SFT = "--pretrain 'llama-tiny' --model 'llama' --strategy colossalai_zero2 --log_interval 10 --save_path {sft} "
SFT += "--dataset data.json --batch_size 4 --accimulation_steps 8 --lr 2e-5"
REWARD_MODEL = "--pretrain {sft} --model 'llama' --strategy colossalai_zero2 --dataset pairs.json"
PROMPTS = "prompts.csv --strategy colossalai_zero2 --pretrain {sft} --model 'llama' --pretrain_dataset data.json"
BENCHMARK = "--model tiny --strategy colossalai_gemini_cpu --experience_batch_size 1 --train_batch_size 1"
SHORT = "--num_episodes 1 --max_timesteps 2 --max_new_tokens 8 --experience_batch_size 4 --train_batch_size 4"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rng = random.Random(0)
    asked = ["".join(rng.choice("abcd") for _ in range(5)) for _ in range(40)]
    data = [{"instruction": "Reverse the text.", "input": text, "output": text[::-1]} for text in asked]
    pairs = [{"prompt": f"Reverse {text}", "chosen": text[::-1], "rejected": text} for text in asked]
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "prompts.csv").write_text("prompt\n" + "".join(f'"Reverse, please: {text}"\n' for text in asked))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_three_stages_run_one_after_the_other(folder, capsys):
    def argv(command):
        return shlex.split(command.format(sft=folder / "Coati-7B"))

    train_sft.main(argv(SFT))
    AutoModelForCausalLM.from_pretrained("Coati-7B", local_files_only=True)
    assert metrics(folder / "Coati-7B")[-1]["step"] == 2  # 40 rows in windows of 32
    train_reward_model.main(argv(REWARD_MODEL))  # without --save_path
    judge = AutoModelForSequenceClassification.from_pretrained("runs/latest", local_files_only=True)
    assert judge.config.num_labels == 1 and judge.config.std > 0
    assert "saved to runs/latest" in capsys.readouterr().out

    status, output = torchrun("train_ppo", *argv(PROMPTS), *shlex.split(SHORT))
    assert status == 0, output
    assert "warning: no --rm_path" in output and "start from --pretrain, so that the reward's head is random" in output
    rows = metrics(folder / "runs" / "latest")
    assert [row["episode"] for row in rows] == [8, 16] and rows[0]["loss/ptx"] > 0
    AutoModelForCausalLM.from_pretrained("runs/latest/actor", local_files_only=True)


def test_its_benchmark_runs(capsys):
    benchmark.main(shlex.split(f"{BENCHMARK} --prompt_tokens 6 --new_tokens 4 --rounds 1 --device cpu"))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| gemini_cpu"))
    assert all(float(cell.split()[0].replace(",", "")) > 0 for cell in row.split("|")[2:6])
