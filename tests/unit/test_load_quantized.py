"""`load_quantized` gives the logits of the dense model that a checkpoint stands for, whoever wrote it."""

import copy
import json
import os

import pytest
import torch
from gptq_files import block_linears, quantize_in_place, shared_data, write_folder
from megalith import engine
from megalith.kernels import unpack_zeros
from megalith.rlhf import load_quantized
from megalith.rlhf.errors import InputError
from safetensors.torch import load_file
from tiny import VOCAB, make_model
from transformers import LlamaConfig

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits.float()


def assert_same(loaded, dense, tolerance=1e-5):
    expected = logits(dense)
    assert (logits(loaded) - expected).norm() <= tolerance * expected.norm()


def declared(**changes):
    return {"bits": 4, "group_size": 16, "quant_method": "gptq", "desc_act": False, "sym": True, **changes}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "opt", "bloom", "gpt2", "qwen2"])
@pytest.mark.parametrize("variant", ["v1", "v2_asymmetric", "act_order_bin"])
def test_families_and_formats(tmp_path, family, variant):
    model = make_model(family)
    if variant == "v1":
        tensors = quantize_in_place(model)
        write_folder(tmp_path, model, tensors, declared(), shards=3)
    elif variant == "v2_asymmetric":
        tensors = quantize_in_place(model, sym=False, checkpoint_format="gptq_v2")
        write_folder(tmp_path, model, tensors, declared(sym=False, checkpoint_format="gptq_v2"))
    else:
        tensors = quantize_in_place(model, act_order=True, sym=False)
        model.config.save_pretrained(tmp_path)
        torch.save(tensors, tmp_path / "gptq_model-4bit-16g.bin")
    loaded = load_quantized(tmp_path)
    assert_same(loaded, model)
    quantized = [name for name in block_linears(model) if not hasattr(loaded.get_submodule(name), "weight")]
    assert quantized == block_linears(model)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_and_one_group(tmp_path, bits):
    model = make_model("llama")
    tensors = quantize_in_place(model, bits=bits, group_size=-1)
    assert_same(load_quantized(write_folder(tmp_path, model, tensors, declared(bits=bits, group_size=-1))), model)


def test_a_file_that_declares_nothing(tmp_path):
    """GPTQ-for-LLaMa: .pt without g_idx, float32 scales, a bias of zeros everywhere, `inv_freq`."""
    model = make_model("llama")
    tensors = quantize_in_place(model, sym=False)
    for name in block_linears(model):
        del tensors[f"{name}.g_idx"]
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"].float()
        tensors[f"{name}.bias"] = torch.zeros(tensors[f"{name}.scales"].shape[1])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    model.config.save_pretrained(tmp_path / "config")
    torch.save(tensors, tmp_path / "model.pt")
    for given in ({}, {"bits": 4, "group_size": 16}):
        assert_same(load_quantized(tmp_path / "model.pt", tmp_path / "config", **given), model)
    with pytest.raises(ValueError, match=r"model\.pt.*scales.*3 groups for 48 inputs.*group_size 32"):
        load_quantized(tmp_path / "model.pt", tmp_path / "config", group_size=32)
    with pytest.raises(ValueError, match=r"model\.pt.*qweight.*4 bits, but the caller says 8"):
        load_quantized(tmp_path / "model.pt", tmp_path / "config", bits=8)


def test_the_oldest_layout(tmp_path):
    """GPTQ-for-LLaMa until 19 March 2023: scales and scaled zeros [N, 1], one group."""
    model = make_model("llama")
    tensors = quantize_in_place(model, sym=False, group_size=-1, checkpoint_format="gptq_v2")
    for name in block_linears(model):
        scales = tensors.pop(f"{name}.scales").float()
        zeros = unpack_zeros(tensors.pop(f"{name}.qzeros"), 4, scales.shape[1], "gptq_v2")
        del tensors[f"{name}.g_idx"]
        tensors[f"{name}.scales"], tensors[f"{name}.zeros"] = scales.T.contiguous(), (zeros * scales).T.contiguous()
    model.config.save_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "llama-4bit.pt")
    assert_same(load_quantized(tmp_path), model)


def test_dynamic_overrides_and_negative_groups(tmp_path):
    model = make_model("llama")
    names = [name for name in block_linears(model) if "1.mlp.gate_proj" not in name]
    overrides = {name: {"bits": 8, "group_size": 8} for name in names if name.endswith("down_proj")}
    tensors = quantize_in_place(model, names, overrides)
    g_idx = tensors["model.layers.0.self_attn.q_proj.g_idx"]
    g_idx[g_idx == 1] = -1
    config = declared(dynamic={"-:.*1\\.mlp\\.gate": {}, "+:.*down_proj": {"bits": 8, "group_size": 8}})
    assert_same(load_quantized(write_folder(tmp_path, model, tensors, config)), model)
    config["dynamic"] = {}
    with pytest.raises(ValueError, match=r"down_proj.qweight.*8 bits, but .*quantize_config.json says 4"):
        load_quantized(write_folder(tmp_path, model, tensors, config))


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_quantised_head(tmp_path, family):
    model = make_model(family)
    tensors = quantize_in_place(copy.deepcopy(model), [])
    if family == "llama_tied":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    names = [*block_linears(model), "lm_head"]
    tensors |= quantize_in_place(model, names)
    tensors = {name: t for name, t in tensors.items() if f"{name.removesuffix('.weight')}.qweight" not in tensors}
    model.config.tie_word_embeddings = family == "llama_tied"
    loaded = load_quantized(write_folder(tmp_path, model, tensors, declared(lm_head=True)))
    assert_same(loaded, model)
    assert not hasattr(loaded.lm_head, "weight") and not loaded.config.tie_word_embeddings


def test_bf16_files_and_dtypes(tmp_path):
    model = make_model("qwen2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    tensors = quantize_in_place(model)
    for name in tensors:
        if tensors[name].dtype == torch.float16 and not name.endswith("scales"):
            tensors[name] = tensors[name].bfloat16()
    folder = write_folder(tmp_path, model, tensors, declared())
    assert_same(load_quantized(folder), model)
    half = load_quantized(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_same(half, model, tolerance=3e-2)
    scales = half.model.layers[0].mlp.down_proj.gptq_weight.scales
    half.to(torch.float32)
    assert half.model.layers[0].mlp.down_proj.gptq_weight.scales.dtype == torch.float16
    assert torch.equal(half.model.layers[0].mlp.down_proj.gptq_weight.scales, scales)
    assert_same(half, model, tolerance=1e-5)


def test_a_wrong_label_of_a_symmetric_file(tmp_path):
    model = make_model("llama")
    tensors = quantize_in_place(model, checkpoint_format="gptq_v2")
    folder = write_folder(tmp_path, model, tensors, declared(checkpoint_format="gptq"))
    with pytest.warns(UserWarning, match="symmetric gptq_v2"):
        assert_same(load_quantized(folder), model)


def test_projections_called_in_any_way_stay_right(tmp_path):
    model = make_model("llama")
    loaded = load_quantized(write_folder(tmp_path, model, quantize_in_place(model), declared()))
    ours, dense = loaded.model.layers[0].self_attn, model.model.layers[0].self_attn
    x, other = torch.randn(2, 3, 32), torch.randn(1, 1, 32)
    for name, given in [("v_proj", x), ("q_proj", other), ("k_proj", x), ("q_proj", x), ("q_proj", x), ("k_proj", x)]:
        assert torch.allclose(getattr(ours, name)(given), getattr(dense, name)(given), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"is_marlin_format": True}, "marlin"),
        ({"format": "gptq_p", "bits": 3}, "gptq_p"),
        ({"pack_dtype": "int16"}, "pack_dtype is int16"),
        ({"bits": "four"}, "bits is 'four'"),
        ({"dynamic": {"(": {}}}, "regular expression"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, changes, refused):
    model = make_model("llama")
    folder = write_folder(tmp_path, model, quantize_in_place(model), declared(**changes))
    with pytest.raises(ValueError, match=f"quantize_config.json.*{refused}"):
        load_quantized(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    model = make_model("llama")
    good = quantize_in_place(model)
    q_proj = "model.layers.0.self_attn.q_proj"

    def loading(changes):
        tensors = {name: tensor for name, tensor in {**good, **changes}.items() if tensor is not None}
        return load_quantized(write_folder(tmp_path, model, tensors, declared()))

    g_idx = good[f"{q_proj}.g_idx"].clone()
    g_idx[5] = 2
    cases = [
        ({f"{q_proj}.g_idx": g_idx}, r"q_proj\.g_idx.*from 0 to 2, but there are 2 groups"),
        ({f"{q_proj}.g_idx": torch.zeros_like(g_idx)}, r"q_proj\.g_idx.*32 rows to group 0"),
        ({f"{q_proj}.scales": None}, r"q_proj\.qweight.*scales is missing"),
        ({f"{q_proj}.qzeros": good[f"{q_proj}.qzeros"][:, :0].contiguous()}, r"q_proj\.qzeros.*March 2023 lost"),
        ({f"{q_proj}.qweight": torch.zeros(32, 4, dtype=torch.int32)}, r"q_proj\.qweight.*AWQ"),
        ({f"{q_proj}.qweight": torch.zeros(4, 40, dtype=torch.int32)}, r"q_proj\.qweight.*right model"),
        ({f"{q_proj}.qweight": good[f"{q_proj}.qweight"].short()}, r"q_proj\.qweight.*int16"),
        ({"model.norm.weight": None}, r"missing: model\.norm\.weight \[32\]"),
        ({"model.norm.weight": torch.ones(7)}, r"model\.norm\.weight \[7\].*\[32\]"),
        ({"model.extra": torch.ones(7)}, r"unexpected: model\.extra \[7\]"),
        ({"model.embed_tokens.qweight": torch.ones(7, dtype=torch.int32)}, r"embed_tokens\.qweight.*no linear layer"),
    ]
    loading({})
    for changes, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            loading(changes)
        assert str(tmp_path) in str(error.value)


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_damaged_and_hostile_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model("llama")
    tensors = quantize_in_place(model)
    folder = write_folder(tmp_path / "a", model, tensors, declared())
    torch.save(tensors, tmp_path / "whole.pt")
    torch.save({"model.norm.weight": Attack()}, tmp_path / "hostile.pt")
    for name in ("whole.pt", "a/model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for kept in (0, 3, len(whole) // 2, len(whole) - 1):
            path = (tmp_path / name).with_name(f"cut{os.path.splitext(name)[1]}")
            path.write_bytes(whole[:kept])
            with pytest.raises(ValueError, match=f"{path}.*truncated"):
                load_quantized(path, folder)
            path.unlink()
    with pytest.raises(ValueError, match=r"hostile\.pt"):
        load_quantized(tmp_path / "hostile.pt", folder)
    assert not (tmp_path / "attacked").exists()
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_quantized(tmp_path / "absent.pt", folder)
    with pytest.raises(ValueError, match=r"no tensor is called qweight"):
        make_model("llama").save_pretrained(tmp_path / "plain")
        load_quantized(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_quantized(tmp_path / "whole.pt")


REAL = {
    "gfl_coati_g128": ("gfl_coati_g128-4bit-128g.pt", "pretrained", {"bits": 4, "group_size": 128}),
    "gm_sym_g128_act_v1": ("model", None, {}),
}


@pytest.mark.skipif(shared_data("gptq") is None, reason="needs shared/data/gptq")
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(name):
    """Relative error of the logits at most 1e-3 and KL at most 1e-4 in float32; KL at most 2e-2 in bfloat16."""
    checkpoint, pretrained, given = REAL[name]
    folder = shared_data("gptq") / name
    reference = load_file(folder / "ref.safetensors")
    expected = reference["logits_fp32"]
    for dtype, most_kl in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        model = load_quantized(folder / checkpoint, pretrained and folder / pretrained, **given, dtype=dtype)
        found = logits(model, reference["input_ids"])
        log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
        assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() <= most_kl
        if dtype == torch.float32:
            assert (found - expected).norm() <= 1e-3 * expected.norm()


def sparse_llama_7b(folder, layers):
    """The checkpoint of a LLaMA-7B with `layers` blocks and a vocabulary of 256, 4 bits in groups of 128: a header, and
    zeros that take no room on disk."""
    config = LlamaConfig(vocab_size=256, num_hidden_layers=layers, max_position_embeddings=2048)
    config.save_pretrained(folder)
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = {"model.embed_tokens.weight": ("F16", [256, hidden]), "lm_head.weight": ("F16", [256, hidden])}
    shapes["model.norm.weight"] = ("F16", [hidden])
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {"mlp.gate_proj": (hidden, wide), "mlp.up_proj": (hidden, wide), "mlp.down_proj": (wide, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{n}.weight": ("F16", [hidden]) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, (k, n) in linears.items():
            shapes[f"{block}.{name}.qweight"] = ("I32", [k // 8, n])
            shapes[f"{block}.{name}.qzeros"] = ("I32", [k // 128, n // 8])
            shapes[f"{block}.{name}.scales"] = ("F16", [k // 128, n])
    header, stop = {}, 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: item[1][0] != "I32"):
        start, stop = stop, stop + torch.Size(shape).numel() * (4 if dtype == "I32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)
    return folder


def test_llama_7b_takes_4_gb(tmp_path):
    """Counted over the tensors of models of one and two blocks, asymmetric, the larger case: each block of the 32 takes
    as much, and the vocabulary is of 32000 and not of 256. With the KV cache of 128 new tokens."""

    def held_bytes(layers):
        model = load_quantized(sparse_llama_7b(tmp_path, layers), bits=4, group_size=128, dtype=torch.float16)
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
        assert model.model.layers[0].mlp.down_proj.zeros is not None
        return sum(tensors.values())

    one, two = held_bytes(1), held_bytes(2)
    weights = one + 31 * (two - one) + 2 * (32000 - 256) * 4096 * 2
    kv_cache = 2 * 32 * 128 * 4096 * 2
    assert 3.85e9 < weights + kv_cache <= 4.0e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_that_do_not_fit_are_fetched_and_change_no_bit(tmp_path, dtype):
    """Act-order, joined projections, biases: everything of a block comes and goes, and the ledger counts it."""
    model = make_model("qwen2", hidden_size=64, num_hidden_layers=6)
    tensors = quantize_in_place(model, act_order=True, group_size=32, sym=False)
    folder = write_folder(tmp_path / "q", model, tensors, declared(group_size=32, desc_act=True, sym=False))
    ids = torch.randint(model.config.vocab_size, (2, 9))
    plain = load_quantized(folder, dtype=dtype)
    with torch.no_grad():
        expected = plain(ids).logits
    weight_bytes = sum(parameter.nbytes for parameter in plain.parameters())
    for place in ({}, {"nvme_dir": tmp_path / "drive"}):
        offloaded = load_quantized(folder, dtype=dtype, device_budget=weight_bytes // 2, **place)
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(offloaded(ids).logits, expected)
        report = engine.memory_report(offloaded)
        at_rest = report["nvme" if place else "host"]["weight"]["bytes"]
        assert report["device"]["total"]["peak_bytes"] <= weight_bytes // 2
        assert weight_bytes <= at_rest <= 1.05 * weight_bytes
        assert not any(parameter.is_floating_point() for parameter in offloaded.model.layers[0].mlp.parameters())


def test_a_budget_that_holds_no_three_blocks_is_refused(tmp_path):
    model = make_model("llama")
    folder = write_folder(tmp_path, model, quantize_in_place(model), declared())
    with pytest.raises(InputError, match="--device_budget 999: the weights that are on the device at the same time"):
        load_quantized(folder, device_budget=999)
    with pytest.raises(InputError, match="needs a device_budget"):
        load_quantized(folder, nvme_dir=tmp_path)
