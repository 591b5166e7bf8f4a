"""What a user can get wrong ends the command at once, before anything is allocated or written."""

import json
import os

import pytest
import torch
from megalith import engine
from megalith.rlhf import checkpoints, train_sft
from megalith.rlhf.arguments import ModelArguments, StrategyArguments
from megalith.rlhf.errors import InputError
from megalith.rlhf.models import PRESETS, build_on_meta, load_source
from megalith.rlhf.strategy import STRATEGIES, engine_options
from stages import metrics

CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "data.jsonl"
    completions = ["1", "2", "3", "4" * 2000]
    rows = [{"prompt": f"{n}+1=", "completion": completion} for n, completion in enumerate(completions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, dataset, *argv):
    given = ["--pretrain", "llama-tiny", "--dataset", str(dataset), "--save_path", str(tmp_path / "out")]
    train_sft.main([*given, "--device", "cpu", *argv])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pretrain", "absent"], "no such folder, and no preset of that name"),
        (["--pretrain", "llama-tyni"], "did you mean 'llama-tiny'?"),
        (["--model", "opt"], "--model opt, but llama-tiny is a llama model"),
        (["--strategy", "zero4"], "--strategy zero4: unknown; did you mean 'zero"),
        (["--strategy", "colossalai_zero4"], "unknown; did you mean 'zero"),
        (["--dataset", "absent.jsonl"], "absent.jsonl: no such dataset file"),
        (["--eval_dataset", "absent.jsonl"], "absent.jsonl: no such dataset file"),
        (["--device_budget", "lots"], "device_budget='lots'"),
        (["--tokenizer", "absent"], "absent: no such tokenizer folder"),
        (["--prompt_format", "chat"], "the tokenizer has no chat template"),
        (["--max_len", "3", "--prompt_format", "plain"], "nothing is left to learn"),
        (["--eval_fraction", "0.9"], "leaves none of 4 rows"),
        (["--strategy", "gemini_nvme"], "placement='nvme' needs a folder on a local drive"),
        (["--resume"], "has no checkpoint"),
        (["--offload_activations"], "--offload_activations moves the inputs of checkpointed blocks"),
        (["--lr", "inf"], "--lr is inf; it has to be > 0 and finite"),
        (["--lora_alpha", "16"], "--lora_alpha is 16.0; it has to be None without --lora_rank"),
        (["--lora_rank", "4", "--lora_target_modules", "q_proj,q_porj"], "the model has no layer called q_porj"),
        (["--pretrain", "gpt2-tiny", "--max_len", "4096", "--eval_fraction", "0.25"], "has 1024 positions: lower"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(tmp_path, dataset, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, dataset, *argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_activations_on_the_host_and_moments_in_8_bits_are_options(tmp_path, dataset):
    rows = {}
    variants = {
        "exact": [],
        "8bit": ["--state_precision", "8bit"],
        "offloaded": ["--state_precision", "8bit", "--offload_activations"],
    }
    for name, flags in variants.items():
        common = "--max_epochs 3 --batch_size 2 --accumulation_steps 1 --log_interval 1 --tensorboard false --lr 1e-2"
        path = tmp_path / name
        run(tmp_path, dataset, *common.split(), "--gradient_checkpointing", "--save_path", str(path), *flags)
        rows[name] = [(row["loss"], row["grad_norm"]) for row in metrics(path)]
    assert rows["offloaded"] == rows["8bit"] != rows["exact"]
    assert len(rows["exact"]) == 6


def test_folders_without_config_or_safetensors_are_refused(tmp_path):
    cases = [("config.json", "{}", "has no \\*.safetensors"), ("other", "", "has no config.json")]
    for name, content, message in cases:
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=message):
            load_source(ModelArguments(pretrain=str(folder)))


def test_a_folder_whose_config_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="config.json cannot be used"):
        load_source(ModelArguments(pretrain=str(tmp_path)))


def test_what_the_engine_says_of_folders_and_budgets_is_one_line_too(tmp_path, dataset, capsys):
    run(tmp_path, dataset, "--max_steps", "1")
    os.truncate(tmp_path / "out" / "model.safetensors", 1000)
    for argv, message in (
        (["--device_budget", "10KB"], "device_budget is 10000 bytes"),
        (["--pretrain", str(tmp_path / "out")], "model.safetensors is truncated or corrupt"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(tmp_path, dataset, *argv, "--save_path", str(tmp_path / "other"))
        error = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == 2 and error.startswith("error: ") and message in error


def test_a_folder_that_cannot_be_written_is_named_before_the_run(tmp_path, dataset, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        run(tmp_path, dataset, "--save_path", str(tmp_path / "file"))
    assert "file: cannot be written: File exists" in capsys.readouterr().err


def test_an_adapter_and_a_whole_model_are_not_saved_in_one_folder(tmp_path, dataset, capsys):
    adapter = ["--max_steps", "1", "--lora_rank", "2"]
    run(tmp_path, dataset, *adapter)
    assert "warning: the adapters' base is a preset's random weights" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path, dataset, "--max_steps", "1")
    assert "holds an adapter, and this run saves a whole model" in capsys.readouterr().err
    (tmp_path / "out" / "adapter_config.json").unlink()
    run(tmp_path, dataset, *adapter, "--lora_merge")
    with pytest.raises(SystemExit):
        run(tmp_path, dataset, *adapter)
    assert "holds a whole model, and this run saves an adapter" in capsys.readouterr().err


def test_a_resumed_run_takes_the_rates_and_the_length_that_it_is_given(tmp_path, dataset, capsys):
    run(tmp_path, dataset, "--max_steps", "2", "--save_interval", "1", "--log_interval", "1", "--lr", "1e-3")
    (tmp_path / "out" / "metrics.jsonl").open("a").write('{"step": 1, "los')  # killed while it wrote
    given = ["--resume", "--max_steps", "4", "--log_interval", "1"]
    given += ["--lr", "1e-2", "--lr_scheduler_type", "linear", "--warmup_ratio", "0"]
    run(tmp_path, dataset, *given, "--weight_decay", "0.5")
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3, 4]
    assert [row["lr"] for row in metrics(tmp_path / "out")][2:] == pytest.approx([5e-3, 2.5e-3])
    with pytest.raises(SystemExit):
        run(tmp_path, dataset, "--resume", "--max_steps", "1")
    assert "has 2 steps behind it, and the options ask for 1 in all" in capsys.readouterr().err


def test_an_optimizer_keeps_its_options_when_it_is_loaded(tmp_path):
    def made(**options):
        model = torch.nn.Linear(2, 2)
        return engine.initialize(model, torch.optim.AdamW(model.parameters(), **options), device="cpu")

    engine.save_checkpoint(tmp_path / "saved", *made(lr=1.0, weight_decay=0.1, betas=(0.5, 0.6)), state="kept")
    model, optimizer = made(lr=2.0, weight_decay=0.2, betas=(0.7, 0.8))
    assert checkpoints.load(tmp_path / "saved", model, optimizer) == "kept"
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (2.0, 0.2, (0.7, 0.8))


def test_a_new_run_does_not_go_into_the_folder_of_another(tmp_path):
    checkpoints.path_for(tmp_path, 7).mkdir(parents=True)
    with pytest.raises(InputError, match="has checkpoints of an earlier run: pass --resume"):
        checkpoints.choose(tmp_path, resume=False)


def test_the_newest_checkpoint_is_resumed_and_old_ones_are_removed(tmp_path):
    for step in (5, 10, 100):
        checkpoints.path_for(tmp_path, step).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000200.saving").mkdir()
    assert checkpoints.choose(tmp_path, resume=True) == checkpoints.path_for(tmp_path, 100)
    checkpoints.prune(tmp_path, keep=2)
    assert not checkpoints.path_for(tmp_path, 5).exists() and checkpoints.path_for(tmp_path, 10).exists()


def test_strategies_stand_for_stage_and_placement():
    def options(strategy):
        return engine_options(StrategyArguments(strategy=strategy), CPU, max_grad_norm=1.0, seed=0)

    assert (options("ddp")["zero_stage"], options("ddp")["placement"]) == (0, "device")
    assert (options("zero2_cpu")["zero_stage"], options("zero2_cpu")["placement"]) == (2, "host")
    assert options("colossalai_gemini_cpu") == options("gemini_cpu") == options("zero3_cpu")
    assert options("zero3")["precision"] == "fp32"
    assert set(STRATEGIES) >= {"naive", "ddp", "zero1", "zero2", "zero3", "gemini_cpu", "gemini_auto", "gemini_nvme"}


def test_naive_is_refused_on_several_ranks(tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run(tmp_path, dataset, "--strategy", "naive")
    assert "--strategy naive is for one process and there are 2: use ddp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("gpt2", 124e6), ("opt-6.7b", 6.66e9), ("bloom-7b1", 7.07e9), ("llama-7b", 6.74e9), ("llama-3-8b", 8.03e9)],
)
def test_presets_have_the_published_sizes_and_take_no_memory(preset, parameters):
    model = build_on_meta(load_source(ModelArguments(pretrain=preset)))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_every_preset_has_room_for_the_byte_tokenizer():
    for preset in PRESETS:
        source = load_source(ModelArguments(pretrain=preset))
        assert source.config.vocab_size >= len(source.tokenizer)
        assert source.config.eos_token_id == source.tokenizer.eos_token_id
