"""`megalith plan`: what it prints for a planned machine, for one that is too small, and for bad input."""

import re

import pytest
from megalith.rlhf import plan

PLANNED = ["--machine", "a100", "--strategy", "gemini_cpu", "--max_length", "32", "--batch_size", "2"]


def test_a_table_for_a_planned_machine(capsys):
    plan.main(["llama-tiny", *PLANNED, "--world_size", "4", "--device_budget", "80GB", "--host_budget", "100GB"])
    printed = capsys.readouterr().out
    for expected in ("ZeRO-3, bf16, placement host, 4 ranks", "link in", "host Adam", "bound by", "\nit fits\n"):
        assert expected in printed, expected
    assert "256 tokens a step" in printed


def test_what_does_not_fit_is_told_with_what_does(capsys):
    plan.main(["llama-tiny", *PLANNED, "--max_length", "512", "--device_memory", "9MB"])
    printed = capsys.readouterr().out
    assert "it does not fit" in printed and "activations" in printed
    assert "it fits with --gradient_checkpointing true" in printed
    plan.main(["llama-tiny", *PLANNED, "--device_memory", "10KB"])
    assert "nothing that was tried fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rates", "link_bytes=3"], "unknown.*known: .*link_in_bytes"),
        (["--rates", "call_s=soon"], "'soon' is not a number"),
        (["--world_size", "0"], "world_size is 0"),
        (["--strategy", "zero4"], "zero4: unknown"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        plan.main(["llama-tiny", *PLANNED, *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1

    assert re.search(message, error)
