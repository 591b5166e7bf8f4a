"""What the loops of PPO and GRPO share: a learner's way through its iterations, with metrics, samples, checkpoints and
exact resumption."""

import os
import shutil

import torch.distributed as dist

from .. import engine
from . import checkpoints, memory_plan, ppo_models, shared_base
from .arguments import resolved, write_config
from .errors import InputError
from .learner import Learner
from .lora import save_adapter
from .metrics import MetricsLog, memory_table, peak_memory_bytes
from .prompts import next_prompts
from .ptx import PtxStream
from .samples import SamplesLog
from .tokenizer import pad_id
from .training import save_model


class RLRun:
    """A learner at some iteration of a run. Made by every rank, inside the process group.

    `repeats`: how often in a row each prompt is answered.
    """

    def __init__(self, options, preparation, ranks, repeats=1):
        self.ranks, self.iterations = ranks, preparation.iterations
        self._options, self._preparation = options, preparation
        self._save_path = checkpoints.open_folder(options.output.save_path)
        self._repeats = repeats
        self._rows = options.rollout.experience_batch_size * options.rollout.update_timesteps * ranks.world_size
        if self._rows % repeats:
            raise InputError(f"{self._rows} answers a rollout are no multiple of --num_generations {repeats}")
        if ranks.is_first:
            self._describe()
            write_config(self._save_path / "arguments.yaml", options.groups)
        rehearsals = rehearsals_of(options, preparation)
        memory_plan.describe(rehearsals, preparation.device, preparation.options, ranks)
        self.learner = make_learner(options, preparation, ranks)
        self._cursor = (0, 0)
        if preparation.checkpoint is not None:
            self._cursor = load(preparation.checkpoint, self.learner, preparation.data_key)
            checkpoints.check_steps(preparation.checkpoint, self.learner.iteration, self.iterations)
        self._log = MetricsLog(
            self._save_path,
            ranks.is_first,
            self.learner.iteration,
            self.iterations,
            options.output.tensorboard,
            options.output.wandb_project,
            resolved(options.groups),
        )
        self._samples_log = SamplesLog(self._save_path, ranks.is_first, self.learner.iteration)

    def _describe(self):
        prepared, path = self._preparation, self._options.prompts.prompts
        tokenizer = prepared.models["actor"].source.tokenizer
        print(f"{path}: {len(prepared.prompts)} prompts, {prepared.dropped} dropped because they are too long")
        print(f"  first prompt: {tokenizer.decode(prepared.prompts[0].ids)!r}")
        if "reward" in prepared.models and self._options.judge.rm_path is None:
            print(
                "warning: no --rm_path, --reward_function or --reward_url: the reward model (and a critic) start "
                "from --pretrain, so that the reward's head is random and the run shows that it works, no more"
            )

    def next_prompts(self):
        """The prompts of the next rollout, those of all ranks."""
        prompts = self._preparation.prompts
        count = self._rows // self._repeats
        chosen, self._cursor = next_prompts(len(prompts), count, self.learner.seed, self._cursor)
        return [prompts[index] for index in chosen for _ in range(self._repeats)]

    def finish_iteration(self, experience, metrics):
        """Log, and save a checkpoint where one is due."""
        step, output_args = self.learner.iteration, self._options.output
        self._log.advance()
        if step % output_args.log_interval == 0 or step == self.iterations:
            episode = {"step": step, "episode": step * self._rows}
            self._log.write({**episode, **metrics, "peak_memory_bytes": peak_memory_bytes(self.ranks.device)})
            self._samples_log.write(step, experience, self.learner.decode, output_args.sample_rows)
        if output_args.save_interval and step % output_args.save_interval == 0:
            save(checkpoints.path_for(self._save_path, step), self.learner, self._cursor, self._preparation.data_key)
            if self.ranks.is_first:
                checkpoints.prune(self._save_path, output_args.save_total_limit)

    def finish(self):
        """Write the trained models in Hugging Face layout: actor/, critic/ and actor_ema/, as far as there are any."""
        self._log.close()
        self._samples_log.close()
        for name, part in self.learner.engines.items():
            unplaced = self._preparation.models[name]
            save_model(
                self._save_path / name, part.model, unplaced.source, self._options.lora, unplaced.plain, self.ranks
            )
        if self.learner.critic is not None and "critic" not in self.learner.engines:
            unplaced, folder = self._preparation.models["actor"], self._save_path / "critic"
            given = {"adapter": shared_base.CRITIC, "head": shared_base.HEADS[shared_base.CRITIC]}
            save_adapter(folder, self.learner.actor.model, unplaced.folder, self.ranks.is_first, **given)
            if self.ranks.is_first:
                unplaced.source.tokenizer.save_pretrained(folder)
        if self.learner.average is not None:
            folder = self._save_path / "actor_ema"
            weights = self.learner.average.whole_weights()
            engine.save_pretrained(folder, self.learner.actor.model, weights=weights)
            if self.ranks.is_first:
                self._preparation.models["actor"].source.tokenizer.save_pretrained(folder)
        if self.ranks.is_first:
            for name, part in self.learner.engines.items():
                print(f"{name}:\n{memory_table(engine.memory_report(part.model))}")
            print(f"saved to {self._save_path}", flush=True)


def rehearsals_of(options, preparation):
    """{name: Rehearsal} of a minibatch of the longest answers to the longest prompts."""
    update, rollout = options.update, options.rollout
    prompt = max(preparation.prompts, key=lambda each: len(each.ids) + rollout.new_tokens(each))
    answer = rollout.new_tokens(prompt)
    rows, micro_batches = memory_plan.minibatch_on_meta(
        update.train_batch_size, update.micro_batch_size or update.train_batch_size, len(prompt.ids) + answer
    )
    score, policy = memory_plan.score_step(rows), memory_plan.logprob_step(rows, answer)
    learning = [policy] * micro_batches
    if preparation.ptx_samples:
        longest = max(map(len, preparation.ptx_samples))
        learning.append(memory_plan.logprob_step(memory_plan.rows_on_meta(options.prompts.ptx_batch_size, longest)))
    steps = {"actor": memory_plan.in_turn(learning), "critic": score, "reference": policy, "reward": score}
    counts = {"actor": len(learning)}
    return {
        name: memory_plan.Rehearsal(unplaced.model, steps[name], counts.get(name, micro_batches))
        for name, unplaced in preparation.models.items()
    }


def make_learner(options, preparation, ranks):
    """A Learner whose models the engine holds. A collective."""
    optimization = options.optimization
    tokenizer = preparation.models["actor"].source.tokenizer
    learner = Learner(
        **ppo_models.place(
            preparation.models,
            preparation.judge,
            optimization,
            preparation.iterations,
            preparation.device,
            preparation.options,
        ),
        pad_id=pad_id(tokenizer),
        stop_ids=frozenset([tokenizer.eos_token_id]),
        decode=tokenizer.decode,
        ranks=ranks,
        seed=optimization.seed,
        rollout_args=options.rollout,
        reward_args=options.score,
        ppo_args=options.update,
    )
    if preparation.ptx_samples:
        size = options.prompts.ptx_batch_size
        learner.ptx = PtxStream(preparation.ptx_samples, size, learner.pad_id, learner.seed, ranks)
    if optimization.ema_decay:
        learner.average = engine.WeightAverage(learner.actor.model, optimization.ema_decay)
    return learner


def save(folder, learner, cursor, data_key):
    """A checkpoint of the whole iteration. It is complete or not there: the folder gets its name at the end."""
    state = {
        "learner": learner.state(),
        "cursor": list(cursor),
        "data": data_key,
        "schedulers": {name: part.scheduler.state_dict() for name, part in learner.engines.items()},
        "average": None if learner.average is None else learner.average.state(),
    }
    partial = folder.with_name("saving")
    if learner.ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted run
    dist.barrier()
    for name, part in learner.engines.items():
        engine.save_checkpoint(partial / name, part.model, part.optimizer, state=state if name == "actor" else None)
    if learner.ranks.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    dist.barrier()


def load(folder, learner, data_key):
    """Go on from what `save` wrote; returns the cursor into the prompts."""
    state = None
    for name, part in reversed(learner.engines.items()):  # the actor's last: it restores the random generators
        state = checkpoints.load(folder / name, part.model, part.optimizer)
    checkpoints.check_data(folder, state["data"], data_key)
    learner.load_state(state["learner"])
    for name, part in learner.engines.items():
        checkpoints.restore_scheduler(part.scheduler, part.optimizer, state["schedulers"][name])
    if learner.average is not None:
        if state["average"] is None:
            raise InputError(f"{folder} has no moving average: go on without --ema_decay")
        learner.average.load_state(state["average"])
    return tuple(state["cursor"])
