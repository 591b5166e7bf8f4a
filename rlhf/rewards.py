"""Rewards that are no model of ours: a Python function, or an HTTP server.

A reward function has the shape that TRL gave it: `reward(prompts, completions, **columns) -> list[float]`, where every
argument is a list with one entry an answer. It takes what it names: `prompts` and `completions` (texts), `prompt_ids`
and `completion_ids` (token ids, stop token included), `stopped`, and the other fields of the prompts' rows.
"""

import http.client
import importlib.util
import inspect
import json
import math
import urllib.request
from pathlib import Path

from .errors import InputError

HTTP_TIMEOUT_S = 60


def load_function(name):
    """The function that "path/to/file.py:function" names. The file is executed: it is the user's own program."""
    path, separator, function_name = name.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise InputError(f"--reward_function {name}: has to be FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise InputError(f"--reward_function {name}: {path} is no file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's program raises
        raise InputError(
            f"--reward_function {name}: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"--reward_function {name}: {path} has no function '{function_name}'")
    return function


def http_reward(url, timeout_s=HTTP_TIMEOUT_S):
    """A reward function that asks a server: POST {"query": [prompt + completion], "prompts": […], "completions": […]},
    answered by {"rewards": [number]}. RuntimeError where it fails, or says nothing for `timeout_s`."""

    def reward(prompts, completions):
        query = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        body = json.dumps({"query": query, "prompts": prompts, "completions": completions}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                answer = json.load(response)
        except (OSError, http.client.HTTPException, ValueError) as error:  # refused, broken off, no JSON
            raise RuntimeError(f"the reward server {url} failed: {error}") from None
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise RuntimeError(f"the reward server {url} answered without 'rewards'")
        return answer["rewards"]

    reward.__name__ = url  # what is wrong with its numbers is said of it
    return reward


def call_reward(function, arguments, count):
    """`function` with those of `arguments` (lists of `count` entries, by name) that it takes; returns `count` floats.

    Raises RuntimeError that names the function for any other result.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        wanted = arguments
    else:
        wanted = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
        missing = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.name not in arguments]
        if missing:
            raise RuntimeError(
                f"reward function {_name(function)} takes '{missing[0]}', which the prompts' rows do not have "
                f"(they have {', '.join(arguments)})"
            )
    rewards = function(**wanted)
    try:
        rewards = [float(value) for value in rewards]
    except (TypeError, ValueError):
        raise RuntimeError(f"reward function {_name(function)} did not return a list of numbers") from None
    if len(rewards) != count:
        raise RuntimeError(f"reward function {_name(function)} returned {len(rewards)} rewards for {count} answers")
    for index, value in enumerate(rewards):
        if not math.isfinite(value):
            raise RuntimeError(f"reward function {_name(function)} returned {value} for answer {index}")
    return rewards


def _name(function):
    return getattr(function, "__name__", type(function).__name__)
