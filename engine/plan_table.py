"""A forecast as lines of text."""

from .rehearsal import Forecast
from .tiers import Work

LARGEST = 3
"""Moments that are listed."""


def forecast_lines(forecast: Forecast) -> list[str]:
    lines = [
        f"{'device':8}{'activations':14}{forecast.activation_peak_bytes / 1e6:14,.1f}  at most, with all else",
        f"{'device':8}{'everything':14}{forecast.device_peak_bytes / 1e6:14,.1f}  at most at once",
        "most on the device:",
        *_moment_lines(forecast),
        f"A step: {forecast.flops / 1e12:,.3g} TFLOP a rank",
    ]
    for work, amount in sorted(forecast.work.items(), key=lambda each: each[0].value):
        unit = "M parameters" if work in (Work.HOST_ADAM, Work.DEVICE_ADAM) else "MB"
        lines.append(f"  {work.value:14}{amount / 1e6:14,.1f} {unit}")
    if forecast.promotion is not None:
        moved = forecast.promotion
        lines.append(
            f"after the second step, spare device memory takes weights and state of {moved.chunks} of the "
            f"{moved.of_chunks} chunks that are off it: {moved.device_bytes / 1e6:,.1f} MB, "
            f"at least {moved.saved_bytes / 1e6:,.1f} MB less moved a step"
        )
    if forecast.step_s is None:
        return lines
    lines.append(f"predicted: {forecast.step_s:,.3f} s a step, bound by {forecast.bound}; busy:")
    for lane, seconds in sorted(forecast.busy_s.items(), key=lambda each: -each[1]):
        lines.append(f"  {lane:14}{seconds:14,.3f} s  {100 * seconds / forecast.step_s:4.0f} %")
    if forecast.written_bytes_a_day:
        written = forecast.work[Work.DISK_WRITE]
        lines.append(
            f"drive wear: {written / 1e9:,.2f} GB written a step, {forecast.written_bytes_a_day / 1e12:,.2f} TB a day"
        )
    return lines


def _moment_lines(forecast: Forecast) -> list[str]:
    by_bytes = sorted(forecast.moments, key=lambda each: each.stored_bytes + each.activation_bytes, reverse=True)
    return [
        f"  {each.name:30}{each.stored_bytes / 1e6:14,.1f} MB stored, {each.activation_bytes / 1e6:,.1f} MB activations"
        for each in by_bytes[:LARGEST]
    ]
