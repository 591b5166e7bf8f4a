"""The plan benchmark: predicted and run in processes of its own, and a bar that can be missed."""

import pytest
from megalith.bench import plan, report

TINY = "llama-34m,hidden_size=64,intermediate_size=128,num_hidden_layers=2,vocab_size=128"


def test_a_reading_has_both_times_and_a_record_says_which_are_within():
    args = plan.parse_args(["--model", TINY, "--seq_len", "16", "--warmup", "1", "--turns", "2", "--steps", "2"])
    plan.read("zero1-two-ranks", args)  # whose ranks measure together, twice
    reading = plan.read("host", args)
    assert reading["step_s"] > 0 and reading["predicted_s"] > 0
    assert reading["predicted_to_run"] == reading["predicted_s"] / reading["step_s"]
    readings = {"host": [reading | {"predicted_to_run": 0.85}], "device": [reading | {"predicted_to_run": 1.3}]}
    text = report.render(plan.make_record(readings, args))
    of_host, of_device = (next(line for line in text.splitlines() if f"{name}: |" in line) for name in readings)
    assert "pass" in of_host and "MISS" in of_device


@pytest.mark.parametrize("flags", [["--model", "llama-2m"], ["--steps", "0"], ["--only", "hosts"]])
def test_bad_options_are_refused(flags):
    with pytest.raises(SystemExit):
        plan.parse_args(flags)
