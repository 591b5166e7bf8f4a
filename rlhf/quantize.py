"""Quantise a model with GPTQ, one block at a time.

    megalith quantize MODEL OUT --bits 4 --group_size 128 --dataset FILE

The weights are streamed from MODEL's safetensors: no more than a block of them is ever in memory, beside the embeddings
and the calibration batches. Blocks that are done lie in OUT/.quantizing, and the same command goes on after them.
"""

import copy
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean
from typing import Literal

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from ..engine.config import parse_bytes
from ..engine.materialize import rebuild_buffers
from ..engine.parameter_names import parameter_aliases
from ..engine.pretrained import PretrainedFolder
from ..engine.safetensors_io import Entry, SafetensorsFile, SafetensorsFileError, write_text_atomically
from .arguments import ModelArguments, parse
from .errors import InputError, exit_on_input_error
from .gptq_algorithm import GptqOptions
from .gptq_blocks import StreamedWeights, block_report, quantize_block, quantize_linears, read_block
from .gptq_calibration import after_blocks, calibration_windows, decoder_blocks, record_calls
from .gptq_experts import as_linears, fused_experts, fused_parameters
from .gptq_writer import Piece, declaration, write_folder, write_single_file
from .models import build_on_meta, load_source
from .strategy import choose_device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPORT_NAME = "quantize_report.jsonl"
_HEAD = "the head"  # beside the blocks' names


@dataclass(frozen=True)
class QuantizeArguments:
    """What is quantised, and where it goes."""

    pretrain: str = HfArg(help="MODEL: folder in Hugging Face layout with safetensors; the first word may name it")
    save_path: str = HfArg(help="OUT: folder for the quantised model; the second word may name it")
    dataset: str = HfArg(help="text to calibrate with: .txt, rows with a text field, or any dataset of megalith sft")
    tokenizer: str | None = HfArg(default=None, help="folder of the tokenizer, if it is not in MODEL")
    prompt_format: Literal["auto", "chat", "alpaca", "plain"] = HfArg(default="auto", help="of a dataset of rows")
    samples: int = HfArg(default=128, help="calibration windows")
    max_len: int = HfArg(default=2048, help="tokens a window, the model's own limit at most")
    batch_size: int = HfArg(default=1, help="windows that run through a block at a time")
    seed: int = HfArg(default=42, help="of the choice of windows")
    device: Literal["auto", "cpu", "cuda"] = HfArg(default="auto", help="auto: cuda where there is one")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = HfArg(
        default="auto", help="in which blocks run; auto: fp32 on CPU, else the model's own. GPTQ itself is in fp32"
    )
    checkpoint_format: Literal["gptq", "gptq_v2", "pt"] = HfArg(
        default="gptq",
        help="v1 (known to all, but GPTQModel wants asymmetric ones in v2), v2, or one .pt file for --gptq_checkpoint",
    )
    dtype: Literal["auto", "bf16", "fp16"] = HfArg(
        default="auto", help="what is not quantised is stored as; auto: as MODEL has it, fp32 as fp16"
    )
    max_shard_size: str = HfArg(default="4GB", help="of a safetensors file")


@dataclass(frozen=True)
class GptqArguments:
    """How it is quantised."""

    bits: int = HfArg(default=4, help="2, 3, 4 or 8")
    group_size: int = HfArg(
        default=128,
        help="inputs that share a scale; -1: all of an output. GPTQModel reads 16, 32, 64, 128, 256, 512, 1024 and -1",
    )
    sym: bool = HfArg(default=True, help="zero-points in the middle")
    desc_act: bool = HfArg(default=True, help="act-order: inputs of much energy are rounded first")
    static_groups: bool = HfArg(default=True, help="groups of neighbours, so that act-order costs nothing at run time")
    mse: bool = HfArg(default=True, help="search for the scales of least rounding error, instead of full ranges")
    num_beams: int = HfArg(default=8, help="ways to round kept open at a time, at a cost in proportion; 1: plain GPTQ")
    descent_passes: int = HfArg(default=4, help="of coordinate descent over the rounded codes, at most; 0: plain GPTQ")
    damp_percent: float = HfArg(default=0.01, help="of the mean energy, added to all; escalated where it is too little")
    true_sequential: bool = HfArg(default=True, help="linears of a block see those before them quantised")
    lm_head: bool = HfArg(default=False, help="quantise the output head too; a tied one is stored apart from then on")


GROUPS = (QuantizeArguments, GptqArguments)


def quantize(args, gptq_args):
    """Write the quantised model to `args.save_path` and return the report: a dict for each linear, with its objective,
    that of rounding to the nearest, and their ratio. Raises InputError for what cannot be used."""
    # Everything that a user can get wrong is read before anything is computed.
    options = _check_options(args, gptq_args)
    max_shard_bytes = _bytes_of(args.max_shard_size)
    device = choose_device(args.device)
    source = load_source(ModelArguments(pretrain=args.pretrain, tokenizer=args.tokenizer))
    if source.folder is None:
        raise InputError(f"--pretrain {args.pretrain}: is a preset with random weights; name the folder of a model")
    stored_dtype, run_dtype = _choose_dtypes(args, source.config, device)
    length = min(args.max_len, getattr(source.config, "max_position_embeddings", None) or args.max_len)
    windows = calibration_windows(args.dataset, source.tokenizer, args.prompt_format, args.samples, length, args.seed)
    print(f"{args.dataset}: {len(windows)} windows of {windows.shape[1]} tokens", flush=True)
    model = build_on_meta(source).eval()
    try:
        weights = PretrainedFolder(source.folder, model)
    except (ValueError, SafetensorsFileError) as error:
        raise InputError(str(error)) from None
    blocks = decoder_blocks(model)
    names_of = _names_by_block(model, blocks)
    stored_format = "gptq" if args.checkpoint_format == "pt" else args.checkpoint_format
    work = Path(args.save_path) / ".quantizing"
    _claim(work, args, gptq_args, source.folder, windows)

    streamed = StreamedWeights(model, weights, device, run_dtype)
    first = next(iter(blocks))
    streamed.load(names_of[None] + names_of[first])
    rebuild_buffers(model, device)
    calls, hidden = record_calls(model, blocks, windows.split(args.batch_size), device)
    streamed.free(names_of[None])
    report = []
    with torch.no_grad(), tqdm(total=len(blocks), desc="quantizing", unit="block", disable=None) as bar:
        for index, (name, block) in enumerate(blocks.items()):
            if name != first:
                streamed.load(names_of[name])
            file = work / f"{index:05d}.safetensors"

            def run(batch, index=index, block=block):
                return calls.run(index, block, batch.to(device)).cpu()

            with as_linears(block):
                if file.exists():
                    read_block(file, name, block, options, stored_format)
                else:
                    quantize_block(file, name, block, run, hidden, options, stored_format, gptq_args.true_sequential)
                hidden = [run(batch) for batch in hidden]
            rows = block_report(file)
            streamed.free(names_of[name])
            report += rows
            bar.update()
            bar.set_postfix_str(f"objective {max(row['ratio'] for row in rows):.3f} of nearest at worst")

    if gptq_args.lm_head:
        file = work / f"{len(blocks):05d}.safetensors"
        if not file.exists():
            streamed.load(names_of[None] + names_of[_HEAD])
            with torch.no_grad(), after_blocks(model, blocks, calls, device) as run:
                _quantize_head(file, model, run, hidden, options, stored_format)
            streamed.free(names_of[None] + names_of[_HEAD])
        report += block_report(file)

    pieces = _pieces(model, weights, work, stored_dtype)
    declared = declaration(options, stored_format, gptq_args.true_sequential, gptq_args.lm_head, version("megalith"))
    _write(args, source, model, pieces, declared, stored_dtype, max_shard_bytes)
    lines = "".join(json.dumps(row) + "\n" for row in report)
    write_text_atomically(Path(args.save_path) / REPORT_NAME, lines)
    shutil.rmtree(work)
    return report


def _check_options(args, gptq_args):
    if args.samples < 1 or args.max_len < 2 or args.batch_size < 1:
        raise InputError("--samples and --batch_size have to be at least 1, --max_len at least 2")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("megalith quantize runs in one process: leave --nproc_per_node out")
    if args.checkpoint_format == "pt" and gptq_args.desc_act and not gptq_args.static_groups:
        raise InputError("the .pt layout has no place for act-order without --static_groups: use gptq or gptq_v2")
    if args.checkpoint_format == "pt" and gptq_args.lm_head:
        raise InputError("the .pt layout has no place for a quantised head: use gptq or gptq_v2")
    values = asdict(gptq_args)
    del values["true_sequential"], values["lm_head"]
    try:
        return GptqOptions(**values, min_zero=0 if args.checkpoint_format == "gptq_v2" else 1)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def _bytes_of(size):
    try:
        return parse_bytes(size, "max_shard_size")
    except ValueError as error:
        raise InputError(f"--{error}") from None


def _choose_dtypes(args, config, device):
    """(what is not quantised is stored as, blocks run in)."""
    own = config.dtype if config.dtype in _DTYPES.values() else torch.float32
    stored = torch.float16 if own == torch.float32 else own
    if args.dtype != "auto":
        stored = _DTYPES[args.dtype]
    if args.precision != "auto":
        return stored, _DTYPES[args.precision]
    return stored, torch.float32 if device.type == "cpu" else own


def _names_by_block(model, blocks):
    """{block: its parameters' names}, under _HEAD those of the head alone, and under None all others.

    Raises InputError for a model that cannot be quantised or stored linear by linear.
    """
    aliases = parameter_aliases(model)
    names_of = {name: [n for n in aliases if n.startswith(f"{name}.")] for name in blocks}
    within = set(itertools.chain(*names_of.values()))
    fused_experts(model)  # refuses those that cannot be quantised
    names_of[_HEAD] = [n for n in aliases if n not in within and n.rpartition(".")[0] == _head_name(model)]
    names_of[None] = [n for n in aliases if n not in within and n not in names_of[_HEAD]]
    return names_of


def _head_name(model):
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def _quantize_head(file, model, run, hidden, options, checkpoint_format):
    """As a block of one linear. Raises InputError for a model whose head is none."""
    name = _head_name(model)
    if name is None or not isinstance(model.get_submodule(name), torch.nn.Linear):
        raise InputError(f"--lm_head: {type(model).__name__} has no linear head")
    block = torch.nn.ModuleDict({name: model.get_submodule(name)})
    quantize_linears(file, "", block, [[[name]]], run, hidden, options, checkpoint_format)


def _claim(work, args, gptq_args, folder, windows):
    """Begin in `work`, or go on in it where the same command began. Raises InputError where another did."""
    what = {**asdict(args), **asdict(gptq_args)}
    for name in ("save_path", "device", "max_shard_size", "dataset"):
        del what[name]
    what["dataset"] = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    what["weights"] = {file.name: list(file.stat()[6:9:2]) for file in sorted(Path(folder).glob("*.safetensors"))}
    claim = work / "command.json"
    if claim.is_file():
        before = json.loads(claim.read_text(encoding="utf-8"))
        differing = [name for name in what if before.get(name) != what[name]]
        if differing:
            raise InputError(
                f"{work}: holds an unfinished quantisation of other {', '.join(differing)}: repeat that command, or "
                f"delete the folder"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_text_atomically(claim, json.dumps(what))


def _pieces(model, weights, work, dtype):
    """Every tensor of the checkpoint: of the blocks' files, and of the source what is not quantised."""
    files = [SafetensorsFile(path) for path in sorted(work.glob("*.safetensors"))]
    packed = {name: file for file in files for name in file.tensors}

    def read_packed(name):
        out = torch.empty(packed[name].tensors[name].shape, dtype=packed[name].tensors[name].dtype)
        packed[name].read_into(name, out)
        return out

    def read_plain(name):
        value = torch.empty(model.get_parameter(name).shape, dtype=torch.float32)
        weights.fill({name: value})
        stored = value.to(dtype)
        if value.isfinite().all() and not stored.isfinite().all():
            raise InputError(f"{name} holds {value.abs().max():.3g}, too large for {dtype}: use --dtype bf16")
        return stored

    pieces = []
    # Experts' linears have the names that GPTQModel gives them, and all else those in the model.
    experts = fused_parameters(model)
    for name in parameter_aliases(model):
        if name not in experts and f"{name.removesuffix('.weight')}.qweight" not in packed:
            entry = Entry(name, dtype, tuple(model.get_parameter(name).shape))
            pieces.append(Piece(entry, functools.partial(read_plain, name)))
    for name, file in packed.items():
        stored = file.tensors[name]
        pieces.append(Piece(Entry(name, stored.dtype, stored.shape), functools.partial(read_packed, name)))
    return pieces


def _write(args, source, model, pieces, declared, dtype, max_shard_bytes):
    out = Path(args.save_path)
    config = copy.deepcopy(source.config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    if declared["lm_head"]:
        config.tie_word_embeddings = False
    config = json.loads(config.to_json_string())
    if args.checkpoint_format == "pt":
        if config["model_type"] == "llama":  # readers of its time look for these buffers
            inv_freq = model.model.rotary_emb.inv_freq.float().cpu()
            names = [f"{name}.self_attn.rotary_emb.inv_freq" for name in decoder_blocks(model)]
            pieces += [Piece(Entry(n, torch.float32, tuple(inv_freq.shape)), lambda: inv_freq) for n in names]
        write_single_file(out, pieces, config, declared)
    else:
        write_folder(out, pieces, config, declared, max_shard_bytes)
    source.tokenizer.save_pretrained(out)
    model.generation_config.save_pretrained(out)


def print_report(report):
    """The worst linear of each kind, and the mean over all, as a share of rounding to the nearest."""
    kinds = {}
    for row in report:
        kinds.setdefault(row["linear"].rpartition(".")[2], []).append(row)
    print(f"\n{'objective / nearest':<24}{'mean':>8}{'worst':>8}  at")
    for kind, rows in kinds.items():
        worst = max(rows, key=lambda row: row["ratio"])
        mean = geometric_mean(max(row["ratio"], 1e-9) for row in rows)
        print(f"{kind:<24}{mean:>8.3f}{worst['ratio']:>8.3f}  {worst['linear']}")
    few = [row for row in report if row["inputs"] < row["in_features"]]
    if few:
        none = sum(row["inputs"] == 0 for row in few)
        print(
            f"{len(few)} linears saw fewer tokens than they have inputs, and {none} none: those are rounded to nearest"
        )
    damped = [row for row in report if row["damp_percent"] > min(row["damp_percent"] for row in report)]
    if damped:
        print(f"{len(damped)} linears needed more damping, up to {max(row['damp_percent'] for row in damped):.3g}")


def _with_flags(argv):
    """MODEL and OUT, the words before the first flag, as flags."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))[:2]
    flags = [part for pair in zip(("--pretrain", "--save_path"), words, strict=False) for part in pair]
    return [*flags, *argv[len(words) :]]


def main(argv=None):
    def run():
        args, gptq_args = parse(GROUPS, _with_flags(sys.argv[1:] if argv is None else argv), prog="megalith quantize")
        print_report(quantize(args, gptq_args))
        print(f"saved to {args.save_path}", flush=True)

    exit_on_input_error(run)


if __name__ == "__main__":
    main()
