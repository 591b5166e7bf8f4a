"""Real data, from scratch, on a CPU in minutes: does fine-tuning lower held-out loss, does a reward model beat chance?

    python -m megalith.bench.real_data gsm8k train.jsonl --output real_data_out
    python -m megalith.bench.real_data hh harmless-base-test.jsonl.gz --output real_data_out

Every stage is the public command, printed as it starts, on two ranks with ZeRO-3. Only numbers are printed and kept in
results.json: HH-RLHF's text is offensive by design (the samples that the stages write stay in their folders).
"""

import argparse
import json
import math
import random
import resource
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from .. import engine
from ..rlhf.arguments import DataArguments, ModelArguments
from ..rlhf.batches import collate, deal
from ..rlhf.data import read_rows, write_rows
from ..rlhf.demo_data import write_base_model
from ..rlhf.eval import mean_and_error
from ..rlhf.losses import IGNORE, completion_loss_sum
from ..rlhf.models import load_source
from ..rlhf.preferences import collate_comparisons, read_preferences
from ..rlhf.reward_model import build_reward_model, last_token_scores
from ..rlhf.run_stage import run_stage
from ..rlhf.tokenizer import load_tokenizer, pad_id
from ..rlhf.train_rm import load_comparisons
from ..rlhf.train_sft import load_samples

MODEL = {"vocab_size": 2048, "hidden_size": 128, "layers": 2, "rope_theta": 10_000.0}  # 0.7 million parameters
ENGINE = {"strategy": "zero3", "precision": "fp32", "device": "cpu", "tensorboard": "false"}
COMMON = {"accumulation_steps": 1, "weight_decay": 0.1, "log_interval": 20}


# GSM8K


def gsm8k(path, folder, ranks, held_out=500, epochs=1):
    """Loss in nats a token on held-out answers, before and after fine-tuning a model of random weights, and that of the
    best prediction which ignores the context (the training answers' token frequencies)."""
    rows = [row.values for row in read_rows(path)]
    random.Random(0).shuffle(rows)
    train = write_rows(folder / "train.jsonl", rows[held_out:])
    test = write_rows(folder / "held_out.jsonl", rows[:held_out])
    write_base_model(folder / "base", (f"{row['question']}\n{row['answer']}" for row in rows[held_out:]), **MODEL)
    options = {"pretrain": folder / "base", "dataset": train, "eval_dataset": test, "save_path": folder / "sft"}
    options |= {"max_len": 384, "batch_size": 32 // ranks, "max_epochs": epochs, "lr": 3e-3}
    run_stage("train_sft", ranks, **options, **COMMON, **ENGINE)
    losses, tokens = {}, []
    for name in ("base", "sft"):
        losses[name], tokens = answer_losses(folder / name, test)
    total = sum(tokens)
    before, after = (sum(losses[name]) / total for name in ("base", "sft"))
    # Rows are what was sampled: the error of a ratio of sums over rows, of the difference before - after.
    gain = before - after
    residuals = [b - a - gain * n for b, a, n in zip(losses["base"], losses["sft"], tokens, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals)) / total
    return {
        "held_out_rows": held_out,
        "held_out_tokens": total,
        "loss_before": before,
        "loss_after": after,
        "loss_of_token_frequencies": frequency_loss(folder / "base", train, test),
        "lower_by": gain,
        "standard_error": error,
    }


def answers(folder, path):
    return load_samples(path, load_tokenizer(folder), DataArguments(dataset=str(path), max_len=384))[1].samples


@torch.no_grad()
def answer_losses(folder, path):
    """(summed loss, labels) of every row of a file, two lists."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    losses, tokens = [], []
    for sample in tqdm(answers(folder, path), desc=f"loss of {Path(folder).name}", unit="row", disable=None):
        input_ids, labels = collate([sample], 0, "cpu")
        losses.append(completion_loss_sum(model(input_ids=input_ids, use_cache=False).logits, labels).item())
        tokens.append(int((labels[:, 1:] != IGNORE).sum()))
    return losses, tokens


def frequency_loss(folder, train, test):
    def labels(path):
        return Counter(token for sample in answers(folder, path) for token in sample.ids[sample.trained].tolist())

    seen, asked = labels(train), labels(test)
    total = seen.total() + len(load_tokenizer(folder))  # one more of each, so that none has probability 0
    return sum(count * math.log(total / (seen[token] + 1)) for token, count in asked.items()) / asked.total()


# HH-RLHF


def hh(path, folder, ranks, folds=3):
    """Held-out accuracy of reward models from scratch, every pair being held out once.

    Dialogues that begin alike are in one fold. A fold's tokenizer, language model and reward model see the other folds
    alone: first next-token loss on both dialogues of every pair, then the pairs.
    """
    _, preferences = read_preferences(path)
    rows = [row.values for row in read_rows(path)]
    openings = defaultdict(list)
    for index, preference in enumerate(preferences):
        openings[preference.conversations[0].messages[0]["content"]].append(index)
    order = sorted(openings)
    random.Random(0).shuffle(order)
    held_out = [[i for opening in order[fold::folds] for i in openings[opening]] for fold in range(folds)]
    margins, lengths, by_fold = [], [], []
    for fold, test in enumerate(held_out):
        train = sorted(set(range(len(rows))) - set(test))
        place = folder / f"fold{fold}"
        place.mkdir()
        write_rows(place / "pairs.jsonl", (rows[i] for i in train))
        write_rows(place / "held_out.jsonl", (rows[i] for i in test))
        train_reward_model(place, [preferences[i] for i in train], ranks, seed=fold)
        found = score_pairs(place / "rm", place / "held_out.jsonl")
        margins += found[0]
        lengths += found[1]
        by_fold.append(mean_and_error(right(found[0])))
        print(f"fold {fold}: {by_fold[-1][0]:.1%} ± {by_fold[-1][1]:.1%} of {len(found[0])} pairs in the right order")
    return accuracies(margins, lengths) | {"by_fold": by_fold, "all_pairs": len(rows)}


def train_reward_model(folder, preferences, ranks, seed):
    dialogues = [c.messages for preference in preferences for c in preference.conversations]
    write_base_model(folder / "base", (turn["content"] for turns in dialogues for turn in turns), **MODEL)
    tokenizer = load_tokenizer(folder / "base")
    texts = (tokenizer.apply_chat_template(list(turns), tokenize=False) for turns in dialogues)
    # The end of a text is added in training.
    write_rows(folder / "text.jsonl", ({"text": text.removesuffix(tokenizer.eos_token)} for text in texts))
    options = {"pretrain": folder / "base", "dataset": folder / "text.jsonl", "save_path": folder / "pretrained"}
    options |= {"max_len": 256, "batch_size": 16 // ranks, "max_epochs": 2, "lr": 3e-3, "seed": seed}
    run_stage("train_pretrain", ranks, **options, **COMMON, **ENGINE)
    options = {"pretrain": folder / "pretrained", "dataset": folder / "pairs.jsonl", "save_path": folder / "rm"}
    options |= {"max_len": 256, "batch_size": 32 // ranks, "max_epochs": 2, "lr": 1e-4, "warmup_ratio": 0.1}
    run_stage("train_rm", ranks, **options, seed=seed, **COMMON, **ENGINE)


@torch.no_grad()
def score_pairs(folder, path):
    """([score of the chosen - score of the rejected answer], [the same of their lengths in tokens]) of every pair."""
    source = load_source(ModelArguments(pretrain=str(folder)))
    comparisons = load_comparisons(path, source.tokenizer, DataArguments(dataset=str(path), max_len=256))[1].samples
    model = build_reward_model(source).requires_grad_(False)
    model, _ = engine.initialize(model, None, pretrained=folder, device="cpu")
    margins, lengths = [], []
    for batch in tqdm(deal(comparisons, 0, 1, 32), desc="held-out pairs", unit="batch", disable=None):
        input_ids, _, mask, pairs = collate_comparisons(batch, pad_id(source.tokenizer), "cpu")
        scores = last_token_scores(model(input_ids), mask)
        margins += (scores[pairs.better] - scores[pairs.worse]).tolist()
        lengths += (mask.sum(1)[pairs.better] - mask.sum(1)[pairs.worse]).tolist()
    return margins, lengths


def right(margins):
    return [(margin > 0) + 0.5 * (margin == 0) for margin in margins]


def accuracies(margins, lengths):
    """(value, standard error) of the accuracy; of preferring the shorter answer, for comparison; and of the accuracy
    balanced over pairs whose chosen answer is the longer and whose is the shorter: length alone gets half of those."""
    longer, shorter = (
        mean_and_error(right([m for m, length in zip(margins, lengths, strict=True) if length * sign > 0]))
        for sign in (1, -1)
    )
    return {
        "pairs": len(margins),
        "accuracy": mean_and_error(right(margins)),
        "of_preferring_the_shorter": mean_and_error(right([-length for length in lengths])),
        "balanced_over_length": ((longer[0] + shorter[0]) / 2, math.hypot(longer[1], shorter[1]) / 2),
        "loss": mean_and_error([math.log1p(math.exp(-margin)) for margin in margins]),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["gsm8k", "hh"])
    parser.add_argument("file", type=Path, help="GSM8K's train.jsonl, or pairs as HH-RLHF has them")
    parser.add_argument(
        "--output", type=Path, default=Path("real_data_out"), help="its subfolder TASK is emptied first"
    )
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args(argv)
    folder = options.output / options.task
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = {"gsm8k": gsm8k, "hh": hh}[options.task](options.file, folder, options.ranks)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result["cpu_s"] = round(sum(used.ru_utime + used.ru_stime for used in usage))
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2), f"\nwritten to {folder}/results.json", sep="")


if __name__ == "__main__":
    main()
