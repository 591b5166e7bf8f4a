"""Options: YAML under flags, aliases, and mistakes answered with the nearest name."""

import importlib.util
import sys

import pytest
import yaml
from megalith.rlhf import cli
from megalith.rlhf.arguments import LoraArguments, OutputArguments, parse, write_config
from megalith.rlhf.errors import InputError
from megalith.rlhf.train_sft import GROUPS

NEEDED = ["--pretrain", "llama-tiny", "--dataset", "data.jsonl"]


def options(*argv):
    return parse(GROUPS, list(argv), prog="megalith sft")


def write_yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_of_the_announcement_parses():
    argv = (
        "--pretrain /models/llama-7B --model llama --strategy colossalai_zero2 --log_interval 10 --save_path out "
        "--dataset data.json --batch_size 4 --accimulation_steps 8 --lr 2e-5"
    )
    model, _, strategy, data, _, optim, output = options(*argv.split())
    assert (model.pretrain, model.model, strategy.strategy) == ("/models/llama-7B", "llama", "colossalai_zero2")
    assert (data.dataset, output.save_path, output.log_interval) == ("data.json", "out", 10)
    assert (optim.batch_size, optim.accumulation_steps, optim.lr) == (4, 8, 2e-5)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = write_yaml(
        tmp_path, "pretrain: llama-tiny\ndataset: a.jsonl\nlr: 1e-3\nbatch_size: 2\nresume: true\nmax_steps: null\n"
    )
    _, _, _, data, _, optim, output = options("--batch_size", "7", "--config", path)
    assert (data.dataset, optim.lr, optim.batch_size, optim.seed) == ("a.jsonl", 1e-3, 7, 42)
    assert output.resume is True
    assert optim.max_steps is None


def test_yaml_may_list_the_layers_to_adapt(tmp_path):
    path = write_yaml(tmp_path, "lora_rank: 4\nlora_target_modules: [q_proj, v_proj]\n")
    [lora] = [group for group in options(*NEEDED, "--config", path) if isinstance(group, LoraArguments)]
    assert lora.lora_target_modules == "q_proj,v_proj"


def test_the_resolved_config_repeats_the_run(tmp_path):
    groups = options(*NEEDED, "--lr", "3e-4", "--gradient_checkpointing", "--max_steps", "5", "--no_tensorboard")
    write_config(tmp_path / "arguments.yaml", groups)
    assert options("--config", str(tmp_path / "arguments.yaml")) == groups


def test_an_unknown_flag_is_an_error_that_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown flag '--acumulation_steps'; did you mean '--accumulation_steps'\?"):
        options(*NEEDED, "--acumulation_steps", "8")


def test_a_prefix_of_a_flag_is_not_that_flag():
    with pytest.raises(InputError, match="unknown flag '--accumulation'"):
        options(*NEEDED, "--accumulation", "8")


def test_an_unknown_yaml_key_names_file_and_nearest(tmp_path):
    path = write_yaml(tmp_path, "batch_sise: 2\n")
    with pytest.raises(InputError, match=r"config\.yaml: unknown option 'batch_sise'; did you mean 'batch_size'\?"):
        options(*NEEDED, "--config", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1]\n", "'lr' is a list"),
        ("- lr\n", "holds list"),
        ("lr: fast\n", "invalid float value"),
        ("a: [\n", "config.yaml"),
    ],
)
def test_a_yaml_file_that_is_no_list_of_options(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        options(*NEEDED, "--config", write_yaml(tmp_path, text))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "x"], "required: --pretrain"),
        ([*NEEDED, "--batch_size", "four"], "invalid int value: 'four'"),
        ([*NEEDED, "--model", "gpt5"], "invalid choice: 'gpt5'"),
        ([*NEEDED, "--batch_size", "0"], "--batch_size is 0; it has to be > 0"),
        ([*NEEDED, "--lr", "-1"], "--lr is -1"),
        ([*NEEDED, "--warmup_ratio", "1"], "--warmup_ratio is 1"),
        ([*NEEDED, "--eval_fraction", "0.5", "--eval_dataset", "x"], "--eval_fraction"),
        ([*NEEDED, "stray"], "unexpected argument 'stray'"),
        ([*NEEDED, "--config", "absent.yaml"], "absent.yaml: no such file"),
    ],
)
def test_wrong_values_are_named(argv, message):
    with pytest.raises(InputError, match=message):
        options(*argv)


def test_the_console_script_names_the_nearest_stage(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["stf"])
    assert caught.value.code == 2
    assert "unknown stage 'stf'; did you mean 'sft'?" in capsys.readouterr().err


def test_the_console_script_passes_options_on(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["sft", *NEEDED, "--lrr", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown flag '--lrr'; did you mean '--lr'?")


def test_ranks_that_refuse_their_input_end_the_launcher_without_a_trace_of_its_own(capfd):
    for count, message in (("0", "has to be a number of processes"), ("1", "absent: no such dataset file")):
        with pytest.raises(SystemExit) as caught:
            cli.main(["sft", "--nproc_per_node", count, "--pretrain", "llama-tiny", "--dataset", "absent"])
        error = capfd.readouterr().err
        assert caught.value.code == 2 and message in error and "Traceback" not in error


def test_yaml_written_by_hand_in_full_is_the_resolved_one(tmp_path):
    groups = options(*NEEDED)
    write_config(tmp_path / "a.yaml", groups)
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["dataset"] == "data.jsonl"


def test_packages_that_only_the_server_needs_are_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("megalith.rlhf.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        cli.main(["serve", "llama-tiny"])
    assert "uvicorn is not installed: pip install 'megalith[serve]'" in capsys.readouterr().err


def test_wandb_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="wandb is not installed: pip install wandb"):
        OutputArguments(wandb_project="x")
    assert OutputArguments().wandb_project is None
