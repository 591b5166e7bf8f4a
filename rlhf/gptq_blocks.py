"""One block of a model quantised: its weights streamed in, its linears quantised in the order in which they run."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..engine.parameter_names import parameter_aliases
from ..engine.pretrained import PretrainedFolder
from ..engine.safetensors_io import SafetensorsFile
from ..kernels import gptq_dequantize, prepare_gptq_weight, unpack_zeros
from .errors import InputError
from .gptq_algorithm import GptqOptions, QuantizationError, quantize_matrix
from .gptq_calibration import calibration_passes, input_hessians, linears_by_input
from .gptq_writer import disk_tensors, write_file


class StreamedWeights:
    """Gives parameters of a model on meta their values from a folder, and takes them away again."""

    def __init__(self, model: nn.Module, folder: PretrainedFolder, device: torch.device, dtype: torch.dtype):
        self.model, self.folder, self.device, self.dtype = model, folder, device, dtype
        self.aliases = parameter_aliases(model)

    def load(self, names: list[str]) -> None:
        values = {n: self.model.get_parameter(n) for n in names}
        values = {n: torch.empty(p.shape, dtype=self.dtype, device=self.device) for n, p in values.items()}
        self.folder.fill(values)
        self._set(values)

    def free(self, names: list[str]) -> None:
        self._set({name: torch.empty_like(self.model.get_parameter(name), device="meta") for name in names})

    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            parameter = nn.Parameter(value, requires_grad=False)
            for alias in self.aliases[name]:
                path, _, leaf = alias.rpartition(".")
                self.model.get_submodule(path)._parameters[leaf] = parameter


def quantize_block(
    path: Path,
    name: str,
    block: nn.Module,
    run,
    hidden: list[Tensor],
    options: GptqOptions,
    checkpoint_format: str,
    true_sequential: bool,
) -> None:
    """Quantise the linears of `block` against what they see in `run(batch)` of the `hidden` batches; the block keeps
    the quantised values. Packed tensors and the report on them go to the file `path`.

    With `true_sequential`, a linear's inputs come from linears quantised before it, at the cost of one more pass for
    each. Raises InputError naming the linears that cannot be quantised.
    """
    stages = linears_by_input(block, lambda: run(hidden[0]))
    passes = calibration_passes(stages, true_sequential, lambda linear: len(_by_input(block.get_submodule(linear))))
    quantize_linears(path, name, block, passes, run, hidden, options, checkpoint_format)


def quantize_linears(
    path: Path,
    name: str,
    block: nn.Module,
    passes: list[list[list[str]]],
    run,
    hidden: list[Tensor],
    options: GptqOptions,
    checkpoint_format: str,
) -> None:
    """The same for linears that are known: stages of those with the same input, and which stages share a pass.

    Linears with the same input share Hessian, factor and act-order, so that they can be joined later. An expert that
    few tokens reach has a Hessian of low rank, which damping makes good for; one that none reach is rounded to the
    nearest.
    """
    tensors, report = {}, []
    for together in passes:
        hessians = input_hessians(block, [stage[0] for stage in together], run, hidden)
        for stage in together:
            hessian, inputs = hessians.pop(stage[0])
            linears = [block.get_submodule(linear) for linear in stage]
            rows = [_by_input(linear) for linear in linears]
            try:
                matrix = quantize_matrix(torch.cat(rows, dim=1), hessian, options)
            except QuantizationError as error:
                raise InputError(f"{name}.{', '.join(stage)}: {error}".lstrip(".")) from None
            start = 0
            for linear_name, linear, row in zip(stage, linears, rows, strict=True):
                part = matrix.columns(start, start + row.shape[1])
                start += row.shape[1]
                _by_input(linear).copy_(part.dequantize())
                fqn = f"{name}.{linear_name}".lstrip(".")
                disk = disk_tensors(part, options.bits, checkpoint_format)
                tensors |= {f"{fqn}.{kind}": tensor for kind, tensor in disk.items()}
                report.append(_report_row(fqn, part, inputs))
    write_file(path, tensors, {"report": json.dumps(report)})


def read_block(path: Path, name: str, block: nn.Module, options: GptqOptions, checkpoint_format: str) -> None:
    """Give `block` the values that `quantize_block` gave it when it wrote `path`, to the bit."""
    file = SafetensorsFile(path)
    for fqn in (key.removesuffix(".qweight") for key in file.tensors if key.endswith(".qweight")):
        flat = _by_input(block.get_submodule(fqn.removeprefix(f"{name}.")))
        parts = {}
        for kind in ("qweight", "qzeros", "scales", "g_idx"):
            stored = file.tensors[f"{fqn}.{kind}"]
            parts[kind] = torch.empty(stored.shape, dtype=stored.dtype)
            file.read_into(f"{fqn}.{kind}", parts[kind])
        zeros = unpack_zeros(parts.pop("qzeros"), options.bits, flat.shape[1], checkpoint_format)
        weight = prepare_gptq_weight(
            **parts, zeros=zeros, bits=options.bits, group_size=options.group_size, in_features=len(flat)
        )
        flat.copy_(gptq_dequantize(weight, torch.float32))


def block_report(path: Path) -> list[dict]:
    return json.loads(SafetensorsFile(path).metadata["report"])


def _by_input(linear: nn.Module) -> Tensor:
    """The weight as a view [K, N]."""
    return linear.weight.detach() if isinstance(linear, Conv1D) else linear.weight.detach().T


def _report_row(fqn: str, matrix, inputs: int) -> dict:
    objective, nearest = matrix.objective.sum().item(), matrix.rounded_objective.sum().item()
    return {
        "linear": fqn,
        "inputs": inputs,
        "in_features": len(matrix.codes),
        "objective": objective,
        "nearest_objective": nearest,
        "ratio": objective / nearest if nearest else 1.0,
        "damp_percent": matrix.damp_percent,
    }
