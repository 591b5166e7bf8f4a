"""The engine: parameters in chunks, ZeRO 0 to 3 over torch.distributed, placement over tiers."""

from .config import EngineConfig, Precision
from .optimizer import ZeroOptimizer
from .shard import gathered, initialize, memory_report
from .tiers import OutOfBudgetError

__all__ = [
    "EngineConfig",
    "OutOfBudgetError",
    "Precision",
    "ZeroOptimizer",
    "gathered",
    "initialize",
    "memory_report",
]
