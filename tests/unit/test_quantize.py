"""`megalith quantize`: what it writes, read again; its report, from the quantised model itself; and going on."""

import json
import re
import shutil

import pytest
import torch
from gptq_files import block_linears
from megalith.kernels import gptq_dequantize
from megalith.rlhf import load_quantized
from megalith.rlhf import quantize as quantize_module
from megalith.rlhf.arguments import parse
from megalith.rlhf.errors import InputError
from megalith.rlhf.gptq_blocks import quantize_block
from megalith.rlhf.gptq_calibration import calibration_windows
from megalith.rlhf.gptq_experts import fused_experts, linear_experts
from megalith.rlhf.models import PRESETS
from megalith.rlhf.quantize import GROUPS, quantize
from megalith.rlhf.tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

TEXT = "".join(f"{n} plus {n * n % 7} is {n + n * n % 7}.\n" for n in range(400))
QUICK = ["--samples", "6", "--max_len", "48", "--batch_size", "4", "--group_size", "32"]


@pytest.fixture(scope="module", params=["llama-tiny", "opt-tiny", "bloom-tiny", "gpt2-tiny"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes (and keeps) the folder of a preset with random weights that float16 can hold."""
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT)

    def folder(name):
        path = root / name
        if not path.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(PRESETS[name]())
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases of 0 would hide that they were lost
                    torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
            model.half().float().save_pretrained(path)
            byte_tokenizer().save_pretrained(path)
        return path

    return folder


def run(model, out, *argv):
    text = model.parent / "text.txt"
    given = ["--pretrain", str(model), "--save_path", str(out), "--dataset", str(text), *QUICK, *argv]
    return quantize(*parse(GROUPS, given, prog="megalith quantize"))


def windows_of(model):
    return calibration_windows(model.parent / "text.txt", byte_tokenizer(), "auto", 6, 48, 42)


def dense(folder, loaded):
    """The model in `folder` with the weights that `loaded` stands for, and {linear: (its own weight, theirs)}."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, fill_from(model, loaded)


def fill_from(model, loaded):
    weights = {}
    for name in block_linears(model):
        linear, quantized = model.get_submodule(name), loaded.get_submodule(name)
        if hasattr(quantized, "owner"):
            values = gptq_dequantize(quantized.owner.joint.gptq_weight, torch.float32)
            values = values.split(quantized.owner.sizes, dim=1)[quantized.part]
        else:
            values = gptq_dequantize(quantized.gptq_weight, torch.float32)
        flat = linear.weight.detach() if isinstance(linear, Conv1D) else linear.weight.detach().T
        weights[name] = flat.clone(), values
        flat.copy_(values)
    return weights


@torch.no_grad()
def objectives(model, weights, windows):
    """tr(D H D^T) of every linear, H over the inputs that it has in the quantised model."""
    inputs = {name: [] for name in weights}
    for name in weights:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    model(input_ids=windows)
    result = {}
    for name, (own, theirs) in weights.items():
        x = torch.cat(inputs[name])
        result[name] = 2 / len(x) * (x @ (own - theirs)).square().sum().item()
    return result


FORMATS = {
    "v1": [],
    "v2 asymmetric": ["--checkpoint_format", "gptq_v2", "--no_sym", "--max_shard_size", "100KB"],
    "act-order": ["--no_static_groups", "--no_sym", "--bits", "3"],
    "pt": ["--checkpoint_format", "pt", "--no_sym"],
    "8 bits": ["--bits", "8", "--mse", "--no_desc_act", "--group_size", "-1"],
}


@pytest.mark.parametrize("argv", FORMATS.values(), ids=FORMATS)
def test_what_is_written_and_reported(tmp_path, folders, family, argv):
    folder = folders(family)
    report = run(folder, tmp_path / "out", *argv)
    loaded = load_quantized(tmp_path / "out")
    model, weights = dense(folder, loaded)
    windows = windows_of(folder)
    with torch.no_grad():
        expected = model(input_ids=windows).logits
        torch.testing.assert_close(loaded(input_ids=windows).logits, expected, rtol=1e-3, atol=1e-3)
    found = objectives(model, weights, windows)
    assert {row["linear"] for row in report} == found.keys() and len(report) == len(found)
    for row in report:
        assert row["objective"] == pytest.approx(found[row["linear"]], rel=1e-2), row
    # Where inputs are few, all directions that were not seen are free.
    assert max(row["ratio"] for row in report) < 0.8
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / ".quantizing").exists()
    assert [json.loads(line) for line in open(tmp_path / "out" / "quantize_report.jsonl")] == report


def test_declared_and_stored(tmp_path, folders):
    folder = folders("llama-tiny")
    run(folder, tmp_path / "v1")
    declared = json.loads((tmp_path / "v1" / "quantize_config.json").read_text())
    assert json.loads((tmp_path / "v1" / "config.json").read_text())["quantization_config"] == declared
    wanted = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    assert {name: declared[name] for name in wanted} == wanted
    run(folder, tmp_path / "pt", "--checkpoint_format", "pt")
    path = tmp_path / "pt" / "model-4bit-32g.pt"
    stored = torch.load(path, weights_only=True)
    prefix = "model.layers.1.mlp.down_proj"
    assert {name.rpartition(".")[2] for name in stored if name.startswith(prefix)} == {
        *("qweight", "qzeros", "scales", "bias")
    }
    assert stored[f"{prefix}.scales"].dtype == torch.float32 and not stored[f"{prefix}.bias"].any()
    assert "model.layers.1.self_attn.rotary_emb.inv_freq" in stored
    for changes in ({}, {"bits": 4, "group_size": 32}):
        loaded, first = load_quantized(path, pretrained=folder, **changes), load_quantized(tmp_path / "v1")
        with torch.no_grad():
            assert torch.equal(loaded(windows_of(folder)).logits, first(windows_of(folder)).logits)


def test_linears_of_one_input_share_their_order(tmp_path, folders):
    """So that they can be joined, also with act-order: one permutation of the input for all."""
    run(folders("llama-tiny"), tmp_path / "out", "--no_static_groups")
    attention = load_quantized(tmp_path / "out").model.layers[1].self_attn
    assert attention.q_proj.owner is attention.v_proj.owner
    assert attention.q_proj.owner.joint.perm is not None


def test_sequential_or_not(tmp_path, folders):
    folder = folders("llama-tiny")
    one = run(folder, tmp_path / "one")
    other = run(folder, tmp_path / "other", "--no_true_sequential")
    assert one[0]["objective"] == other[0]["objective"]  # the first linears see the same
    assert one[6]["objective"] != other[6]["objective"]


def test_an_interrupted_run_goes_on(tmp_path, folders, monkeypatch):
    folder = folders("llama-tiny")
    report = run(folder, tmp_path / "whole")
    quantized = []

    def interrupted(path, name, *rest):
        quantized.append(name)
        if len(quantized) == 2:
            raise KeyboardInterrupt
        quantize_block(path, name, *rest)

    monkeypatch.setattr(quantize_module, "quantize_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("*.safetensors"))
    with pytest.raises(InputError, match=r"unfinished quantisation of other samples, bits, dataset"):
        run(folder, tmp_path / "cut", "--bits", "3", "--samples", "5")
    assert run(folder, tmp_path / "cut") == report
    assert quantized == ["model.layers.0", "model.layers.1", "model.layers.1"]
    for name in ("model.safetensors", "config.json", "quantize_report.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_more_than_a_block_is_in_memory(tmp_path, folders, monkeypatch):
    models, held = [], []
    build, work = quantize_module.build_on_meta, quantize_block
    monkeypatch.setattr(quantize_module, "build_on_meta", lambda source: models.append(build(source)) or models[-1])

    def counted(path, name, *rest):
        held.append({n for n, p in models[0].named_parameters() if not p.is_meta})
        assert all(n.startswith(f"{name}.") for n in held[-1])
        work(path, name, *rest)

    monkeypatch.setattr(quantize_module, "quantize_block", counted)
    run(folders("llama-tiny"), tmp_path / "out")
    assert len(held) == 2 and all(len(names) == 9 for names in held)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bits", "5"], "--bits is 5"),
        (["--damp_percent", "2"], "--damp_percent is 2"),
        (["--samples", "0"], "--samples"),
        (["--max_shard_size", "much"], "--max_shard_size='much'"),
        (["--checkpoint_format", "pt", "--no_static_groups"], "no place for act-order"),
        (["--checkpoint_format", "pt", "--lm_head"], "no place for a quantised head"),
        (["--num_beams", "0"], "--num_beams is 0"),
        (["--pretrain", "llama-tiny"], "preset"),
        (["--pretrain", "absent"], "absent: no such folder"),
        (["--dataset", "absent.txt"], "absent.txt"),
        (["--dataset", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_what_cannot_be_used(tmp_path, folders, argv, message):
    with pytest.raises(InputError) as error:
        run(folders("llama-tiny"), tmp_path / "out", *argv)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named(tmp_path, folders):
    folder = tmp_path / "broken"
    shutil.copytree(folders("llama-tiny"), folder)
    (tmp_path / "text.txt").write_text(TEXT)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate_proj, mlp\.up_proj: .*not finite"):
        run(folder, tmp_path / "out")


def test_calibration_files(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "a.txt").write_text("abcdef" * 10)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": "abcdef"}) for _ in range(10)))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"prompt": "ab", "completion": "cdef"}) for _ in range(9)))
    one = calibration_windows(tmp_path / "a.txt", tokenizer, "auto", 3, 20, seed=0)
    two = calibration_windows(tmp_path / "b.jsonl", tokenizer, "auto", 3, 20, seed=0)
    assert one.shape == (3, 20) and torch.equal(one, two)
    rows = calibration_windows(tmp_path / "c.jsonl", tokenizer, "plain", 100, 7, seed=0)
    assert tokenizer.decode(rows[0]) == "abcdef<|endoftext|>" and len(rows) == 9
    assert calibration_windows(tmp_path / "a.txt", tokenizer, "auto", 3, 2048, seed=0).shape == (1, 60)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="no text"):
        calibration_windows(tmp_path / "empty.txt", tokenizer, "auto", 3, 20, seed=0)


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny"])
def test_a_quantised_head(tmp_path, folders, preset):
    """Tied to the embedding (GPT-2) or not: it has its own codes from then on."""
    folder = folders(preset)
    report = run(folder, tmp_path / "out", "--lm_head")
    loaded = load_quantized(tmp_path / "out")
    assert not hasattr(loaded.lm_head, "weight") and not loaded.config.tie_word_embeddings
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["lm_head"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model, _ = dense(folder, loaded)
    own = model.lm_head.weight.detach().T.clone()
    values = gptq_dequantize(loaded.lm_head.gptq_weight, torch.float32)
    model.lm_head = torch.nn.Linear(*own.shape, bias=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(values.T)
        windows = windows_of(folder)
        torch.testing.assert_close(loaded(windows).logits, model(windows).logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    found = objectives(model, {"lm_head": (own, values)}, windows)
    assert report[-1]["linear"] == "lm_head" and report[-1]["ratio"] < 0.8
    assert report[-1]["objective"] == pytest.approx(found["lm_head"], rel=1e-2)


@pytest.fixture(scope="module")
def mixtral(folders):
    """One expert of four a token; the last is never the best one."""
    model = make_model("mixtral", vocab_size=320, num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[1], layer.mlp.gate.weight[3] = -layer.mlp.gate.weight[0], 0
    path = folders("llama-tiny").parent / "mixtral"
    model.half().float().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@torch.no_grad()
def test_experts_as_linears_are_the_same_model():
    model = make_model("mixtral").eval()  # two experts a token
    ids = torch.randint(0, 97, (2, 9))
    expected = model(ids).logits
    for call_all in (False, True):
        other = make_model("mixtral").eval()
        for name, fused in fused_experts(other).items():
            other.set_submodule(name, linear_experts(fused, call_all))
        torch.testing.assert_close(other(ids).logits, expected, rtol=1e-4, atol=1e-6)


def test_experts(tmp_path, mixtral):
    report = run(mixtral, tmp_path / "out", "--group_size", "16")
    rows = {row["linear"]: row for row in report}
    assert len(rows) == 2 * (4 + 4 * 3)
    for layer in range(2):
        seen = [rows[f"model.layers.{layer}.mlp.experts.{n}.down_proj"]["inputs"] for n in range(4)]
        assert sum(seen) == 6 * 48 and seen[3] == 0 and max(seen) > 48
    # Nothing is known of what no token reached, which is rounded to the nearest.
    assert rows["model.layers.0.mlp.experts.3.up_proj"]["ratio"] == 1
    loaded = load_quantized(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).eval()
    for name, fused in fused_experts(model).items():
        model.set_submodule(name, linear_experts(fused, call_all=True))
    weights = fill_from(model, loaded)
    with torch.no_grad():
        expected = model(windows_of(mixtral)).logits
        torch.testing.assert_close(loaded(windows_of(mixtral)).logits, expected, rtol=1e-3, atol=1e-3)
    found = objectives(model, {name: w for name, w in weights.items() if ".3." not in name}, windows_of(mixtral))
    for name, value in found.items():
        assert rows[name]["objective"] == pytest.approx(value, rel=1e-2), name
    assert max(rows[name]["ratio"] for name in found) < 0.9

    # As GPTQModel calls them, and as save_pretrained does.
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.mlp.experts.2.down_proj.qweight" in tensors
    called = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def renamed(name):
        return re.sub(r"\.(\w+_proj)\.(?=\w+$)", lambda m: f".{called.get(m[1], m[1])}.", name).replace(
            "mlp", "block_sparse_moe"
        )

    save_file({renamed(name): tensor for name, tensor in tensors.items()}, tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(
            load_quantized(tmp_path / "out")(windows_of(mixtral)).logits, loaded(windows_of(mixtral)).logits
        )
