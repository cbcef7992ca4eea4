"""Texts of --help: of the commands that take a config of a run, and of options without a fitting text of their own."""

from __future__ import annotations

import re
from argparse import Action

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from typing_extensions import override

VERBS = {
    "fit": "Train a search agent, validating as it goes.",
    "sft": "Fit a model to demonstrations, as the start of a search agent.",
    "validate": "Answer the validation questions greedily and print the figures.",
    "test": "Answer the test questions greedily and print the figures.",
    "predict": "Answer the test questions greedily and write the rollouts.",
}
PROMPT = "Print what the model is given for the first question; options as for fit."
STUDY = "Train several methods over seeds with everything else equal, and report how they compare."
PLAN = "Estimate the memory and the time that a run will take, before it is started."
# Names of values in the help of typed commands, shown instead of the type.
_METAVARS = {
    "arm": "NAME[=OVERLAY[+OVERLAY...]]",
    "backend": "{bm25,faiss}",
    "config": "NAME_OR_FILE",
    "corpus": "FILE",
    "from_": "RUN_OR_FILE",
    "index": "DIR",
    "names": "FILE",
    "out": "PATH",
    "policy": "DIR",
    "query": "TEXT",
    "questions": "FILE",
    "retriever": "NAME_OR_FILE",
    "model": "FOLDER_RUN_OR_CHECKPOINT",
    "question": "TEXT",
    "rollouts": "FILE",
    "run": "RUN_OR_CHECKPOINT",
    "runs": "RUN",
    "stopwords": "WORD",
    "top": "N",
    "top_k": "N",
    "verify": "DIR",
}
# Settings of the trainer that must keep their value, and why.
FIXED_TRAINER_OPTIONS: dict[str, tuple[float | None, str]] = {
    "max_epochs": (-1, "model.rollout_steps says how long to train"),
    "max_steps": (-1, "model.rollout_steps says how long to train"),
    "min_epochs": (None, "the run would go on beyond model.rollout_steps, and no signal would stop it"),
    "min_steps": (None, "the run would go on beyond model.rollout_steps, and no signal would stop it"),
    "fast_dev_run": (False, "it would drop checkpoints and curves; for a short run set model.rollout_steps"),
    "barebones": (False, "it would drop validations and curves; set data.validation null and trainer.logger false"),
    "overfit_batches": (0, "it would repeat the first questions and validate on them; give a small data.train file"),
    "num_sanity_val_steps": (0, "the policy is validated before training anyway"),
    "check_val_every_n_epoch": (None, "trainer.val_check_interval counts rollout steps"),
    "accumulate_grad_batches": (1, "model.micro_batch_tokens bounds memory, and model.mini_batches counts updates"),
    "gradient_clip_val": (None, "model.clip_norm clips"),
    "gradient_clip_algorithm": (None, "model.clip_norm clips, and by the norm"),
    "default_root_dir": (None, "--run.root and --run.name place the run folder"),
}
OPTION_HELP = {
    **{f"trainer.{name}": f"Must stay as it is: {reason}." for name, (_, reason) in FIXED_TRAINER_OPTIONS.items()},
    "config": "Packaged config such as quickstart or calibrators/calibadv, or a YAML file; several apply in order.",
    "seed_everything": "Seed of drawn questions, sampling and mini-batches; the initial policy does not depend on it.",
    "samples": "Rollouts per question.",
    "temperature": "Of sampling; 0 is greedy.",
    "ckpt_path": "Checkpoint to start from, or last: the newest one of the run that --run.name names.",
    "weights_only": "Load tensors and numbers only from a checkpoint, and no other Python objects.",
    "trainer.logger": "Logger or loggers instead of TensorBoard's in the run folder; false for none.",
    "trainer.limit_train_batches": "Rollout steps of what Lightning calls an epoch; no question is repeated.",
    "trainer.log_every_n_steps": "Interval of other parts' curves; calibadv's have a point at every rollout step.",
    "trainer.max_time": "Stop with a checkpoint after DD:HH:MM:SS of training; a resumed run has all of it again.",
    "trainer.precision": "32-true, bf16-mixed, bf16-true (with adapters or a high learning rate) or 64-true.",
    "trainer.val_check_interval": "Validate after every so many rollout steps, before the first and after the last.",
    "trainer.enable_progress_bar": "Lightning's own progress bar, in addition to calibadv's.",
    "trainer.enable_checkpointing": "Lightning's own checkpoints, in addition to calibadv's (--checkpoint).",
}


def set_option_help(parser: ArgumentParser) -> None:
    """Set the help texts of ``OPTION_HELP`` in a parser."""
    for action in parser._actions:
        if action.dest in OPTION_HELP:
            action.help = OPTION_HELP[action.dest]
    for group in parser._action_groups:
        if any(action.dest == "ckpt_path" for action in group._group_actions):
            group.title = "Checkpoint to start from"


class CommandHelpFormatter(DefaultHelpFormatter):
    """Help of a typed command: metavars instead of types, one spelling of lists, no null."""

    @override
    def _get_type_str(self, action: Action) -> str | None:
        return None if action.dest in _METAVARS else super()._get_type_str(action)

    @override
    def _expand_help(self, action: Action) -> str:
        takes_no_value = action.nargs == 0 and action.const is True
        text: str = (action.help or "") if takes_no_value else super()._expand_help(action)
        return re.sub(r" \(default: null\)|, default: null| \| null", "", text)

    @override
    def _format_action_invocation(self, action: Action) -> str:
        return re.sub(r", --\S+\+ .*", "", super()._format_action_invocation(action))


def set_metavars(parser: ArgumentParser) -> None:
    """Set the metavars of ``_METAVARS`` in a parser."""
    for action in parser._actions:
        if action.dest in _METAVARS:
            several = f"--{action.dest}+" in action.option_strings
            action.metavar = _METAVARS[action.dest] + (" ..." if several else "")
