"""Where checkpoints of a run lie: `SAVE_PATH/checkpoints/step-00000010`, newest last."""

import re
import shutil
from pathlib import Path

from .errors import InputError

_NAME = re.compile(r"step-(\d{8})")


def _all(save_path):
    folder = Path(save_path) / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and _NAME.fullmatch(path.name))


def path_for(save_path, step):
    return Path(save_path) / "checkpoints" / f"step-{step:08d}"


def prune(save_path, keep):
    """Remove all but the newest `keep` checkpoints."""
    for path in _all(save_path)[:-keep]:
        shutil.rmtree(path)


def choose(save_path, resume):
    """The checkpoint to resume from, or None for a new run.

    Raises InputError for `resume` where there is none, and for a new run in a folder that has some: it would mix two
    runs.
    """
    found = _all(save_path)
    if resume and not found:
        raise InputError(f"--resume: {save_path} has no checkpoint; start without --resume")
    if found and not resume:
        raise InputError(
            f"--save_path {save_path} has checkpoints of an earlier run: pass --resume to go on, or name another folder"
        )
    return found[-1] if resume else None


def check_data(checkpoint, saved, current):
    """Raise InputError when the rows, the split or the seed are not those that the checkpoint was trained on."""
    if saved != current:
        raise InputError(
            f"{checkpoint} was trained on other data ({saved}) than is given now ({current}): start a new run"
        )


def restore_scheduler(scheduler, optimizer, state):
    """Load a scheduler's state and give the optimizer the rate that it stands at."""
    scheduler.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
