"""The engine: parameters in chunks, ZeRO 0 to 3 over torch.distributed, placement over tiers."""

from .average import WeightAverage
from .checkpoint import CheckpointError
from .config import EngineConfig, Precision, StatePrecision, parse_bytes
from .manager import Manager
from .nvme import NvmeError
from .optimizer import ZeroOptimizer
from .persistence import load_checkpoint, save_checkpoint, save_pretrained, whole_weights
from .planner import Plan, plan
from .rates import Rates, measure_rates
from .rehearsal import Forecast
from .shard import can_gather, gathered, initialize, is_gathered, memory_report
from .tiers import OutOfBudgetError, Tier, Work

__all__ = [
    "CheckpointError",
    "EngineConfig",
    "Forecast",
    "Manager",
    "NvmeError",
    "OutOfBudgetError",
    "Plan",
    "Precision",
    "Rates",
    "StatePrecision",
    "Tier",
    "WeightAverage",
    "Work",
    "ZeroOptimizer",
    "can_gather",
    "gathered",
    "initialize",
    "is_gathered",
    "load_checkpoint",
    "measure_rates",
    "memory_report",
    "parse_bytes",
    "plan",
    "save_checkpoint",
    "save_pretrained",
    "whole_weights",
]
