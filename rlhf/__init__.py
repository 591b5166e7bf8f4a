"""Training and serving language models with the engine: one flat loop a stage, and what they share."""

import importlib

# What is public, by the module that holds it: imported when asked for, since transformers takes seconds to load.
_PUBLIC = {
    "load_quantized": "gptq_model",
    "BLOOMActor": "trainer",
    "BLOOMCritic": "trainer",
    "GPTActor": "trainer",
    "GPTCritic": "trainer",
    "LlamaActor": "trainer",
    "LlamaCritic": "trainer",
    "OPTActor": "trainer",
    "OPTCritic": "trainer",
    "PPOTrainer": "trainer",
    "RewardModel": "trainer",
    "Strategy": "trainer",
}


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
