"""The demo, next to nothing of everything, and the data that it makes."""

import random

import pytest
from megalith.rlhf import demo
from megalith.rlhf.demo_data import CATEGORIES, TASKS, make_pairs, make_rows, make_texts, solve, spoil
from megalith.rlhf.demo_report import STAGES, read_jsonl


def test_it_runs_from_random_weights_to_the_table_and_starts_clean(tmp_path, capsys):
    folder = tmp_path / "out"
    (folder / "ppo").mkdir(parents=True)
    (folder / "ppo" / "left_over").touch()
    demo.main(["--tiny", "--ranks", "1", "--output", str(folder)])
    printed = capsys.readouterr().out
    assert f"Everything is written to {folder}" in printed and "all 4 models, per rank" in printed
    for stage in ("train_pretrain", "train_sft", "train_rm", "train_ppo", "eval"):
        assert f"$ python -m megalith.rlhf.{stage} " in printed
    table = printed[printed.index("exact, sampled") :].splitlines()
    assert [line.split()[0] for line in table[1:5]] == list(STAGES)
    assert table[3].endswith("0.000 ± 0.000") and table[4].split()[-1] != "0.000"  # KL of SFT, and of PPO, from SFT
    assert printed.count("  user: ") == 3 and printed.count("    PPO: ") == 3
    assert not (folder / "ppo" / "left_over").exists()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {row["step"] for row in read_jsonl(folder / "ppo" / "metrics.jsonl")} == {1, 2}
    held_out = read_jsonl(folder / "held_out.jsonl")
    trained = {row["instruction"] for name in ("sft", "prompts", "pairs") for row in prompts_of(folder, name)}
    assert not trained & {row["instruction"] for row in held_out}


def prompts_of(folder, name):
    return [{"instruction": row.get("instruction", row.get("prompt"))} for row in read_jsonl(folder / f"{name}.jsonl")]


def test_every_problem_has_its_one_answer_and_is_on_one_side():
    train, held_out = make_rows(600, 100)
    assert (len(train), len(held_out)) == (600, 100) and (train, held_out) == make_rows(600, 100)
    assert not {(r["task"], *r["operands"]) for r in train} & {(r["task"], *r["operands"]) for r in held_out}
    assert {row["task"] for row in train} == set(TASKS)
    assert solve("sort", ["10", "9", "2"]) == "2 9 10" and solve("arithmetic", ["7", "-", "9"]) == "-2"
    assert solve("reverse", ["a", "b", "c"]) == "c b a" and solve("classify", ["梨"]) == "水果"
    for row, text in zip(train, make_texts(train), strict=True):
        assert row["output"] in text["text"] and " ".join(row["operands"]) in text["text"]
        assert "{" not in text["text"]


@pytest.mark.parametrize("seed", range(3))
def test_the_worse_of_a_pair_is_wrong_and_the_models_own_mistake_where_it_made_one(seed):
    rows, _ = make_rows(300, 0, seed)
    rng = random.Random(seed)
    assert all(spoil(row, rng) != row["output"] for row in rows)
    answers = [row["output"] if index % 2 else "nonsense" for index, row in enumerate(rows)]
    for index, (row, pair) in enumerate(zip(rows, make_pairs(rows, answers, seed), strict=True)):
        assert (pair["prompt"], pair["chosen"]) == (row["instruction"], row["output"])
        assert pair["rejected"] != pair["chosen"] and (pair["rejected"] == "nonsense") == (index % 2 == 0)
        if row["task"] == "classify" and index % 2:
            assert pair["rejected"] in CATEGORIES
