"""`megalith ppo` and `megalith grpo` as users type them: outputs, resuming to the bit, judges, bad input."""

import http.server
import json
import re
import shutil
import threading

import pytest
import torch
from megalith.rlhf import train_grpo, train_ppo, train_rm
from megalith.rlhf.errors import InputError
from megalith.rlhf.prompts import next_prompts, read_prompts
from megalith.rlhf.rewards import call_reward, http_reward, load_function
from megalith.rlhf.tokenizer import byte_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

REWARD = """
def reward(prompts, completions, goal, **others):
    return [len(set(completion)) / int(steps) for completion, steps in zip(completions, goal)]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts.csv").write_text('prompt,goal\nhello,2\n"a, b",3\nwhat?,2\ncount,1\nagain,5\n')
    rows = [{"instruction": f"say {word}", "output": word} for word in ("yes", "no", "maybe", "never", "often")]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    (tmp_path / "judge.py").write_text(REWARD)
    return tmp_path


def command(folder, save_path, *others):
    given = (
        f"{folder}/prompts.csv --pretrain llama-tiny --model llama --strategy colossalai_zero2 --save_path {save_path} "
    )
    given += "--prompt_format plain --max_new_tokens 8 --experience_batch_size 4 --train_batch_size 2 --ppo_epochs 2 "
    given += "--num_episodes 2 --max_timesteps 2 --lr 1e-3 --critic_lr 1e-3 --device cpu --precision fp32 "
    return [*(given + "--tensorboard false").split(), *others]


def metrics(save_path):
    rows = [json.loads(line) for line in (save_path / "metrics.jsonl").read_text().splitlines()]
    changing = ("timing/", "eps", "tokens_per_s", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if not k.startswith(changing)} for row in rows]


def test_the_announcements_command_and_its_output(folder, capsys):
    out = folder / "out"
    train_ppo.main(command(folder, out, "--pretrain_dataset", str(folder / "text.json"), "--ema_decay", "0.5"))
    printed = capsys.readouterr().out
    assert "5 prompts, 0 dropped" in printed and "first prompt: 'hello'" in printed
    assert "warning: no --rm_path" in printed and "reference: " in printed and "all 4 models" in printed
    assert printed.count("predicted: ") == 4 and "not rehearsed" not in printed
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["episode"] == 16
    assert rows[0]["objective/kl"] == 0 and rows[-1]["loss/ptx"] < rows[0]["loss/ptx"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples[0].keys() == {"step", "prompt", "response", "score", "kl", "length", "truncated"}
    assert {sample["step"] for sample in samples} == {1, 2, 3, 4}
    for name in ("actor", "actor_ema"):
        AutoModelForCausalLM.from_pretrained(out / name, local_files_only=True)
        assert AutoTokenizer.from_pretrained(out / name, local_files_only=True).eos_token
    critic = AutoModelForSequenceClassification.from_pretrained(out / "critic", local_files_only=True)
    assert critic.config.num_labels == 1 and critic.score.weight.any()
    averaged, last = (load_file(out / name / "model.safetensors") for name in ("actor_ema", "actor"))
    assert any(not torch.equal(averaged[name], last[name]) for name in last)


def test_plain_text_is_learned_whole_beside(folder):
    (folder / "rows.jsonl").write_text('{"text": "a corpus of its own"}\n{"text": "and more"}\n')
    train_ppo.main(command(folder, folder / "out", "--pretrain_dataset", str(folder / "rows.jsonl")))
    rows = metrics(folder / "out")
    assert rows[-1]["loss/ptx"] < rows[0]["loss/ptx"]


def test_going_on_in_the_middle_gives_the_same_bits(folder):
    options = ["--pretrain_dataset", str(folder / "text.json"), "--ema_decay", "0.9", "--kl_target", "0.5"]
    options += ["--kl_horizon", "40", "--normalize_scores", "true", "--save_interval", "2"]
    options += ["--reward_function", f"{folder}/judge.py:reward", "--ptx_batch_size", "3"]
    train_ppo.main(command(folder, folder / "whole", *options))
    shutil.copytree(
        folder / "whole", folder / "resumed", ignore=shutil.ignore_patterns("step-00000004", "actor*", "critic")
    )
    for part in ("actor", "critic"):
        source = folder / "whole" / "checkpoints" / "step-00000002" / part
        shutil.copytree(source, folder / "resumed" / "checkpoints" / "step-00000002" / part)
    train_ppo.main(command(folder, folder / "resumed", *options, "--resume"))
    assert metrics(folder / "resumed") == metrics(folder / "whole")
    assert (folder / "resumed" / "samples.jsonl").read_text() == (folder / "whole" / "samples.jsonl").read_text()
    for part in ("actor", "critic", "actor_ema"):
        whole, again = (load_file(folder / run / part / "model.safetensors") for run in ("whole", "resumed"))
        assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    with pytest.raises(SystemExit):
        train_ppo.main(command(folder, folder / "resumed", *options[:-2], "--resume", "--seed", "3"))


def test_metrics_are_json_where_a_number_cannot_be_said(folder):
    """Returns that do not vary leave a critic nothing to explain."""
    (folder / "judge.py").write_text("def reward(completions):\n    return [0.0] * len(completions)\n")
    argv = ["--reward_function", f"{folder}/judge.py:reward", "--kl_coef", "0", "--missing_eos_penalty", "0"]
    train_ppo.main(command(folder, folder / "out", *argv))
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=pytest.fail)  # called for NaN, which JSON does not have
    assert first["val/explained_variance"] is None and first["objective/kl"] == 0


def test_trained_models_judge_and_are_trained_on(folder, capsys):
    """The critic and the reward model come from a folder; the policy has adapters, and is its own reference."""
    train_ppo.main(command(folder, folder / "first"))
    before = load_file(folder / "first" / "actor" / "model.safetensors")
    judge = folder / "first" / "critic"
    others = ["--rm_path", str(judge), "--lora_rank", "2", "--strategy", "zero3", "--seed", "9"]
    argv = command(folder, folder / "second", *others, "--missing_eos_penalty", "0")
    argv[argv.index("--pretrain") + 1] = str(folder / "first" / "actor")
    with pytest.raises(SystemExit):
        train_ppo.main(argv)
    output = capsys.readouterr()
    assert "has no 'mean' and 'std'" in output.err
    for option, folder_given, missing in (("--rm_path", "actor", "score.weight"), ("--pretrain", "critic", "lm_head")):
        with pytest.raises(SystemExit):  # a language model is no judge, and a critic no policy
            train_ppo.main([*argv, option, str(folder / "first" / folder_given), "--normalize_reward", "false"])
        assert re.search(f"error: .*/{folder_given} is not a checkpoint .*missing: {missing}", capsys.readouterr().err)
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps({**config, "mean": 0.5, "std": 2.0}))
    train_ppo.main(argv)
    printed = output.out + capsys.readouterr().out
    assert printed.count("warning: no --rm_path") == 1 and printed.count("reference: ") == 1
    rows = metrics(folder / "second")
    assert rows[0]["objective/kl"] == 0 and rows[1]["objective/kl"] != 0
    assert rows[0]["objective/rlhf_reward"] == pytest.approx((rows[0]["objective/scores"] - 0.5) / 2, abs=1e-6)
    train_ppo.main([*argv, "--normalize_reward", "false", "--max_timesteps", "1", "--save_path", str(folder / "raw")])
    rows = metrics(folder / "raw")
    assert rows[0]["objective/rlhf_reward"] == pytest.approx(rows[0]["objective/scores"], abs=1e-6)
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(folder / "first" / "actor", local_files_only=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items() if name in before)
    adapted = PeftModel.from_pretrained(base, folder / "second" / "actor")
    assert any(parameter.any() for name, parameter in adapted.named_parameters() if "lora_B" in name)


def test_adapters_are_merged_into_what_is_saved(folder):
    train_ppo.main(command(folder, folder / "base", "--num_episodes", "1", "--max_timesteps", "1"))
    base_folder, out = folder / "base" / "actor", folder / "out"
    argv = command(folder, out, "--lora_rank", "2", "--lora_merge", "--lr", "0.01")
    argv[argv.index("--pretrain") + 1] = str(base_folder)
    train_ppo.main(argv)
    from peft import PeftModel

    for part, family in (("actor", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)):
        merged = family.from_pretrained(out / part, local_files_only=True).state_dict()
        base = family.from_pretrained(
            base_folder, local_files_only=True, **({"num_labels": 1} if part == "critic" else {})
        )
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        adapted = PeftModel.from_pretrained(base, out / part / "adapter").merge_and_unload().state_dict()
        for name, tensor in adapted.items():
            torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)
        assert (
            sum(not torch.equal(tensor, before[name]) for name, tensor in adapted.items()) >= 14
        )  # two blocks' linears


def test_adapters_have_no_moving_average(folder, capsys):
    with pytest.raises(SystemExit):
        train_ppo.main(command(folder, folder / "out", "--lora_rank", "2", "--ema_decay", "0.9"))
    assert "--ema_decay" in capsys.readouterr().err and not (folder / "out").exists()


def test_grpo_learns_saves_and_goes_on(tmp_path, capsys):
    (tmp_path / "prompts.csv").write_text("prompt\nhello\nwhat?\nagain\n")
    (tmp_path / "judge.py").write_text("def reward(completions):\n    return [len(set(c)) / 8 for c in completions]\n")
    given = f"{tmp_path}/prompts.csv --pretrain llama-tiny --prompt_format plain --max_new_tokens 8 --device cpu "
    given += "--experience_batch_size 8 --train_batch_size 4 --num_generations 4 --num_episodes 2 --max_timesteps 1 "
    given += f"--reward_function {tmp_path}/judge.py:reward --tensorboard false --save_interval 1 --lr 1e-3 "
    argv = [*given.split(), "--save_path", str(tmp_path / "out")]
    train_grpo.main(argv)
    printed = capsys.readouterr().out
    assert "critic" not in printed and "val/equal_groups" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "actor", local_files_only=True)
    assert not (tmp_path / "out" / "critic").exists()
    train_grpo.main([*argv[:-1], str(tmp_path / "out"), "--num_episodes", "3", "--resume"])
    assert "step 3" in capsys.readouterr().out
    for others, message in (
        (["--num_generations", "3"], "8 answers a rollout are no multiple of --num_generations 3"),
        (["--num_generations", "1"], "--num_generations is 1; it has to be at least 2"),
        (["--kl_target", "1"], "unknown flag '--kl_target'"),
    ):
        with pytest.raises(SystemExit):
            train_grpo.main([*argv[:-1], str(tmp_path / "other"), *others])
        assert message in capsys.readouterr().err


# Judges


class _RewardServer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["query"] == [p + c for p, c in zip(body["prompts"], body["completions"], strict=True)]
        answer = {"rewards": [len(text) for text in body["query"]]} if self.path == "/get_reward" else {"error": 1}
        self.send_response(200)
        if self.path == "/broken_off":
            self.send_header("Content-Length", "99")
        self.end_headers()
        self.wfile.write(b"\xff\xfe{" if self.path == "/no_text" else json.dumps(answer).encode())

    def log_message(self, *args):
        pass


def test_a_server_judges():
    server = http.server.HTTPServer(("127.0.0.1", 0), _RewardServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    given = {"prompts": ["a", "bc"], "completions": ["d", ""], "goal": [1, 2]}
    try:
        assert call_reward(http_reward(f"{url}/get_reward"), given, 2) == [2.0, 2.0]
        with pytest.raises(RuntimeError, match="answered without 'rewards'"):
            call_reward(http_reward(f"{url}/other"), given, 2)
        for path in ("broken_off", "no_text"):
            with pytest.raises(RuntimeError, match=f"the reward server {url}/{path} failed"):
                call_reward(http_reward(f"{url}/{path}"), given, 2)
        with pytest.raises(RuntimeError, match=f"reward function {url}/get_reward returned 2 rewards for 3 answers"):
            call_reward(http_reward(f"{url}/get_reward"), given, 3)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(RuntimeError, match="the reward server .* failed"):
        call_reward(http_reward(f"{url}/get_reward"), given, 2)


def test_functions_are_found_or_named(folder):
    (folder / "broken.py").write_text("\ndef reward(:\n")
    given = {"prompts": ["x"], "completions": ["aab"], "goal": ["2"]}
    assert call_reward(load_function(f"{folder}/judge.py:reward"), given, 1) == [1.0]
    for name, message in (
        (f"{folder}/judge.py:other", "has no function 'other'"),
        (f"{folder}/none.py:reward", "is no file"),
        ("reward", "has to be FILE.py:FUNCTION"),
        (f"{folder}/broken.py:reward", "broken.py cannot be imported: SyntaxError: .* line 2"),
    ):
        with pytest.raises(InputError, match=message):
            load_function(name)


# Prompts


def test_prompts_of_every_schema(tmp_path):
    tokenizer = byte_tokenizer()
    rows = {
        "csv": 'prompt,goal\n"two\nlines",1\n',
        "jsonl": '{"prompt": [{"role": "user", "content": "two\\nlines"}], "goal": "1"}\n',
        "json": '[{"instruction": "two", "input": "\\nlines", "goal": "1"}]',
    }
    for suffix, text in rows.items():
        path = tmp_path / f"rows.{suffix}"
        path.write_text(text)
        [prompt], dropped = read_prompts(path, tokenizer, "plain")
        assert (tokenizer.decode(prompt.ids), prompt.columns, dropped) == ("two\nlines", {"goal": "1"}, 0)
    (tmp_path / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'
    )
    assert tokenizer.decode(read_prompts(tmp_path / "chat.jsonl", tokenizer, "plain")[0][0].ids) == "hi"


def test_wrong_prompts_are_named(tmp_path):
    path, tokenizer = tmp_path / "rows.csv", byte_tokenizer()
    for text, message in (
        ("prompt,goal\na,1\nb\n", "line 3: has not as many fields"),
        ("question_text\na\n", "no field holds a prompt"),
        ("prompt\n" + "a" * 20 + "\n", "all 1 prompts are longer than 10"),
        ("prompt\n", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_prompts(path, tokenizer, "plain", max_prompt_len=10)


def test_an_epoch_visits_every_prompt_once():
    cursor, seen = (0, 0), []
    for _ in range(7):
        chosen, cursor = next_prompts(7, 3, 1, cursor)
        seen += chosen
    assert [sorted(seen[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert seen[:7] != seen[7:14]
    assert cursor == (3, 0)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--kl_coef", "-1"], "--kl_coef is -1.0; it has to be at least 0"),
        (["--update_timesteps", "9"], "--update_timesteps 9 is more than there are timesteps"),
        (["--rm_path", "x", "--reward_url", "y"], "one judge alone"),
        (["--temperatur", "1"], "did you mean '--temperature'"),
        (["--eval_interval", "1"], "unknown flag '--eval_interval'"),
        (["--max_new_tokens", "5000"], "do not fit the model's 1024 positions"),
        (["--max_length", "4"], "--max_length is 4; it has to be more than a prompt's 5 tokens"),
        (["--reward_url", "localhost:5000"], "--reward_url is localhost:5000; it has to be an http:// or https://"),
        (["--lora_rank", "2", "--lora_dropout", "0.1"], "--lora_dropout 0.1: the policy that learns has to be the one"),
        (["--lr", "inf"], "--lr is inf; it has to be finite"),
        (["--rm_path", "nowhere"], "--rm_path nowhere: no such folder"),
        (["--seed", "-1"], "--seed is -1; it has to be at least 0"),
    ],
)
def test_bad_options_end_with_a_line(folder, others, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train_ppo.main(command(folder, folder / "out", *others))
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_critic_and_reward_model_share_the_actors_base(folder, capsys, monkeypatch):
    """The reward model is an adapter that `megalith rm` trained; its scores, and the critic's, are those that a model
    of its own would give."""
    train_ppo.main(command(folder, folder / "base", "--num_episodes", "1", "--max_timesteps", "1"))
    base = str(folder / "base" / "actor")
    pairs = [{"prompt": f"say {n}", "chosen": "yes " * n, "rejected": "no " * n} for n in range(1, 7)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    given = (
        f"--pretrain {base} --dataset {folder}/pairs.jsonl --prompt_format plain --lora_rank 3 --lr 1e-2 --device cpu "
    )
    given += f"--batch_size 2 --accumulation_steps 1 --precision fp32 --tensorboard false --save_path {folder}/rm"
    train_rm.main(given.split())
    capsys.readouterr()
    given = ["--lora_rank", "2", "--share_base", "--rm_path", str(folder / "rm"), "--missing_eos_penalty", "0"]
    argv = command(folder, folder / "out", *given, "--save_interval", "2", "--lr", "0.01")
    argv[argv.index("--pretrain") + 1] = base
    genuine, seen = train_ppo.collect, []
    monkeypatch.setattr(train_ppo, "collect", lambda *given: seen.append(genuine(*given)) or seen[-1])
    train_ppo.main(argv)
    printed = capsys.readouterr().out
    assert "reference: " not in printed and "critic: " not in printed
    rows = metrics(folder / "out")
    assert rows[0]["objective/kl"] == 0 and rows[-1]["objective/kl"] != 0
    from peft import PeftModel

    statistics = json.loads((folder / "rm" / "score_statistics.json").read_text())
    scorer = AutoModelForSequenceClassification.from_pretrained(base, local_files_only=True, num_labels=1)
    scorer = PeftModel.from_pretrained(scorer, folder / "rm").eval().base_model.model
    prompt, answer = seen[0].rollout.prompts[0].ids, seen[0].rollout.answers[0].ids
    with torch.no_grad():
        hidden = scorer.model(input_ids=torch.tensor([[*prompt, *answer]])).last_hidden_state
        scores = scorer.score(hidden)[0, :, 0]
    assert seen[0].scores[0].item() == pytest.approx(scores[-1].item(), abs=1e-4)
    expected = (scores[len(prompt) - 1 : -1] - statistics["mean"]) / statistics["std"]
    torch.testing.assert_close(seen[0].values[0, : len(answer)], expected, atol=1e-3, rtol=1e-3)
    mean = rows[0]["objective/scores"]
    assert rows[0]["objective/rlhf_reward"] == pytest.approx((mean - statistics["mean"]) / statistics["std"], abs=1e-5)
    assert (folder / "out" / "critic" / "adapter_model.safetensors").is_file()
    for part, family in (("actor", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)):
        others = {} if part == "actor" else {"num_labels": 1}
        plain = family.from_pretrained(base, local_files_only=True, **others)
        adapted = PeftModel.from_pretrained(plain, folder / "out" / part)
        assert any(parameter.any() for name, parameter in adapted.named_parameters() if "lora_B" in name)

    shutil.copytree(folder / "out", folder / "again", ignore=shutil.ignore_patterns("step-00000004", "actor", "critic"))
    source = folder / "out" / "checkpoints" / "step-00000002" / "actor"
    shutil.copytree(source, folder / "again" / "checkpoints" / "step-00000002" / "actor", dirs_exist_ok=True)
    argv[argv.index("--save_path") + 1] = str(folder / "again")
    train_ppo.main([*argv, "--resume"])
    assert metrics(folder / "again") == rows

    for others, message in (
        (["--lora_merge"], "--share_base with --lora_merge"),
        (["--rm_path", base], "is no adapter"),
        (["--pretrain", "llama-tiny"], "is of the base"),
    ):
        with pytest.raises(SystemExit):
            train_ppo.main([*argv, *others, "--save_path", str(folder / "other")])
        assert message in capsys.readouterr().err


def test_csv_fields_of_any_length_and_a_quote_that_is_not_closed(tmp_path):
    path, tokenizer = tmp_path / "rows.csv", byte_tokenizer()
    path.write_text(f"prompt\n{'a' * 200_000}\nb\n")
    assert [len(prompt.ids) for prompt in read_prompts(path, tokenizer, "plain", 10**6)[0]] == [200_000, 1]
    path.write_text('prompt\n"a\nb\nc\n')
    with pytest.raises(InputError, match="rows.csv, line 4: is no csv: unexpected end of data"):
        read_prompts(path, tokenizer, "plain")


def test_a_template_that_refuses_a_prompt_names_its_row(tmp_path):
    path, tokenizer = tmp_path / "rows.jsonl", byte_tokenizer()
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    tokenizer.chat_template = "{% if messages[0].content == 'b' %}{{ raise_exception('no') }}{% endif %}x"
    with pytest.raises(InputError, match="rows.jsonl, line 2: the prompt cannot be rendered: no"):
        read_prompts(path, tokenizer, "chat")
