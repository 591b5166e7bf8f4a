"""What a user can get wrong ends the command at once, before anything is allocated or written."""

import json

import pytest
import torch
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
    path.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(4)))
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
