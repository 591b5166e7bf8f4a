"""The benchmark of the kernels runs, measures every entry, and keeps what it read."""

import json
import sys

import pytest
import torch
from megalith.bench import kernels

PEER = """
import json, sys
print("noise", flush=True)
print('reply {"gptqmodel": "7"}', flush=True)
for line in sys.stdin:
    print("reply " + ('0.5' if len(json.loads(line)) == 2 else '"Kind"'), flush=True)
"""


def test_a_peer_in_another_environment_takes_its_turns(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(PEER)
    monkeypatch.setattr(kernels, "GPTQMODEL_WORKER", worker)
    monkeypatch.setattr(kernels, "CPU_CACHE_BYTES", 1000)
    args = kernels.parse_args(["--rows", "2", "--gptqmodel_python", sys.executable])
    peer = kernels.open_gptqmodel(args)
    layer = kernels.Layer("tiny", "o", 256, 128)
    entry = kernels.product_entries(layer, 2, kernels.make_weights(layer, args, peer), args, peer)[-1]
    assert (entry.name, entry.note, entry.seconds(), peer.facts) == ("gptqmodel", "Kind", 0.5, {"gptqmodel": "7"})
    peer.close()
    worker.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended with 3.* does it have gptqmodel"):
        kernels.open_gptqmodel(args)


def test_a_run_measures_every_entry_and_keeps_the_record(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(kernels.GPTQMODEL_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "CPU_CACHE_BYTES", 1 << 16)
    path = tmp_path / "record.json"
    command = "--models tiny --layers o down --rows 1 65 --rounds 2 --numel 10007 --threads 1 --json".split()
    kernels.main([*command, str(path)])
    record = json.loads(path.read_text())
    rows = {row["name"]: row["metrics"] for row in record["rows"]}
    products = {name for name in rows if not name.startswith("adam: ")}
    assert products == {
        *(f"tiny o 256x256, 1 rows: {name}" for name in ("megalith", "torch dense", "torch int4")),
        *(f"tiny down 384x256, 1 rows: {name}" for name in ("megalith", "torch dense", "torch int4")),
        *(
            f"tiny {shape}, 65 rows: {name}"
            for shape in ("o 256x256", "down 384x256")
            for name in ("megalith", "torch dense")
        ),
    }
    assert "adam: megalith split bf16" in rows
    assert all(len(values) == 2 and min(values) > 0 for metrics in rows.values() for values in metrics.values())
    assert {check["name"] for check in record["checks"]} >= {"tiny o 256x256, 1 rows: megalith / torch dense"}
    assert record["settings"]["gptqmodel"].startswith("absent")
    assert "torch int4" in capsys.readouterr().out


def test_the_bytes_are_those_of_the_entry(monkeypatch):
    args = kernels.parse_args(["--rows", "2", "--dtype", "fp32"])
    monkeypatch.setattr(kernels, "CPU_CACHE_BYTES", 1000)
    layer = kernels.Layer("tiny", "o", 256, 128)
    entries = kernels.product_entries(layer, 2, kernels.make_weights(layer, args), args)
    activations = 2 * (256 + 128) * 4
    packed = 256 * 128 // 2 + 2 * 128 * 2 + activations
    assert [entry.bytes_per_element for entry in entries] == [packed, 256 * 128 * 4 + activations, packed]


def test_weights_are_rotated_past_the_cache():
    args = kernels.parse_args([])
    assert (kernels.copies(8 << 20, 0, args) - 1) * (8 << 20) >= 4 * kernels.CPU_CACHE_BYTES
    assert kernels.copies(8 << 20, 4 * kernels.CPU_CACHE_BYTES, args) == 1


@pytest.mark.parametrize("option", ["--rows", "--rounds", "--threads"])
def test_a_count_of_zero_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        kernels.main([option, "0"])
    assert f"{option} is 0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_cuda_has_to_be_there(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cuda"])
    assert "sees no GPU" in capsys.readouterr().err
