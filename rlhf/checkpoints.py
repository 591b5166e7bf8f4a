"""Where checkpoints of a run lie: `SAVE_PATH/checkpoints/step-00000010`, newest last."""

import re
import shutil
import tempfile
from pathlib import Path

from .. import engine
from .errors import InputError

_NAME = re.compile(r"step-(\d{8})")


def open_folder(save_path):
    """Make the folder of a run, as a Path. Raises InputError where nothing can be written into it."""
    folder = Path(save_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--save_path {save_path}: cannot be written: {error.strerror}") from None
    return folder


def check_kind(folder, is_adapter):
    """Raise InputError where `folder` holds a whole model and an adapter is to be saved there, or the other way round:
    a folder with both would be read as one of them."""
    held, saved = ("a whole model", "an adapter") if is_adapter else ("an adapter", "a whole model")
    if (Path(folder) / ("config.json" if is_adapter else "adapter_config.json")).is_file():
        raise InputError(f"--save_path: {folder} holds {held}, and this run saves {saved}: name another folder")


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


def check_steps(checkpoint, done, total):
    """Raise InputError for a run that is to end before its checkpoint."""
    if done > total:
        raise InputError(f"--resume: {checkpoint} has {done} steps behind it, and the options ask for {total} in all")


def load(checkpoint, model, optimizer):
    """`engine.load_checkpoint`, except that the optimizer keeps the hyperparameters that it was made with: those of the
    options that are given now. Returns the state saved with the checkpoint. A collective."""
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    state = engine.load_checkpoint(checkpoint, model, optimizer)
    for group, values in zip(optimizer.param_groups, given, strict=True):
        group.update(values)
    return state


def restore_scheduler(scheduler, optimizer, state):
    """Put a new LambdaLR where the saved one stood. Its peak rates and its length are those of the options that are
    given now, so that a run goes on at the rate that they give this step."""
    scales = [scale(state["last_epoch"]) for scale in scheduler.lr_lambdas]
    rates = [base * scale for base, scale in zip(scheduler.base_lrs, scales, strict=True)]
    scheduler.load_state_dict({**state, "base_lrs": scheduler.base_lrs, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
