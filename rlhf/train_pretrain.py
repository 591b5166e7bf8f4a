"""Pretraining: next-token loss on every token of plain text.

    torchrun --standalone --nproc_per_node 2 -m megalith.rlhf.train_pretrain --pretrain llama-tiny --dataset text.jsonl
    --max_len 512 --save_path OUT

or `megalith pretrain …` with the same options. Rows are `{"text": …}`; `megalith cut-text` makes them of plain text.
Documents longer than --max_len go on in the next row; shorter ones share rows, unless --packing is false.
"""

import sys
from dataclasses import dataclass

import numpy as np
from transformers.hf_argparser import HfArg

from .arguments import (
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    OutputArguments,
    PackingArguments,
    StrategyArguments,
    TextArguments,
    parse,
)
from .batches import SampleSet, split
from .data import read_texts
from .errors import InputError, exit_on_input_error
from .lora import add_adapters
from .models import build_on_meta, load_source
from .packing import check_packable, pack
from .strategy import process_group
from .templates import Sample, Segment, encode
from .train_sft import train_on
from .training import RunOptions, TrainingRows, prepare


@dataclass(frozen=True)
class PretrainPackingArguments(PackingArguments):
    packing: bool = HfArg(
        default=True, help="fill rows of --max_len tokens with whole documents, each of which sees itself alone"
    )


GROUPS = (
    ModelArguments,
    LoraArguments,
    StrategyArguments,
    TextArguments,
    PretrainPackingArguments,
    OptimizationArguments,
    OutputArguments,
)


def load_texts(path, tokenizer, max_len, limit=None):
    """The documents of a file as a SampleSet, all tokens trained, each ending with the end-of-sequence token. A longer
    document than `max_len` becomes several samples (counted as cut)."""
    texts = read_texts(path, limit)
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no eos token: set eos_token in its tokenizer_config.json")
    samples, cut = [], 0
    for document in encode([[Segment(text, trained=True, eos=True)] for text in texts], tokenizer):
        pieces = [document.ids[start : start + max_len] for start in range(0, len(document), max_len)]
        samples += [Sample(piece, np.ones(len(piece), dtype=bool)) for piece in pieces if len(piece) > 1]
        cut += len(pieces) > 1
    if not samples:
        raise InputError(f"{path}: all {len(texts)} texts are empty")
    return SampleSet(tuple(samples), cut, len(texts) - sum(bool(text) for text in texts))


def train(model_args, lora_args, strategy_args, text_args, packing_args, optim_args, output_args):
    groups = (model_args, lora_args, strategy_args, text_args, packing_args, optim_args, output_args)
    options = RunOptions(optim_args, output_args, groups)
    preparation = prepare(model_args, lora_args, strategy_args, optim_args, output_args)
    source = load_source(model_args)

    def build():
        return build_on_meta(source, model_args.gradient_checkpointing)

    model = add_adapters(build(), lora_args, optim_args.seed)
    found = load_texts(text_args.dataset, source.tokenizer, text_args.max_len, text_args.max_datasets_size)
    samples, held_out = split(found.samples, text_args.eval_fraction, optim_args.seed)
    if text_args.eval_dataset:
        held_out = load_texts(text_args.eval_dataset, source.tokenizer, text_args.max_len).samples
    if packing_args.packing:
        check_packable(source.config)
        samples = pack(samples, text_args.max_len)

    with process_group(preparation.device) as ranks:
        if ranks.is_first:
            tokens = sum(map(len, samples))
            filled = tokens / (len(samples) * text_args.max_len)
            print(
                f"{text_args.dataset}: {len(found.samples)} pieces of text, {tokens} tokens in {len(samples)} rows, "
                f"{filled:.1%} of {text_args.max_len} tokens filled; {found.truncated} documents cut, "
                f"{found.dropped} empty"
            )
        rows = TrainingRows(samples, found.fingerprint())
        run = train_on(rows, held_out, model, source, ranks, preparation, options)
        run.finish(source, lora_args, build)


def main(argv=None):
    exit_on_input_error(lambda: train(*parse(GROUPS, sys.argv[1:] if argv is None else argv, prog="megalith pretrain")))


if __name__ == "__main__":
    main()
