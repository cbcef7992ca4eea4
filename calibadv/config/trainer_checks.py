"""Checks of the trainer's settings, and values that all ranks share before the process group exists."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Timer

from calibadv.config.help import FIXED_TRAINER_OPTIONS
from calibadv.errors import UserError
from calibadv.policy.precision import check_precision

# Set in the environment, of which Lightning gives further processes a copy.
_TIMESTAMP = "CALIBADV_RUN_TIMESTAMP"
_JOB_IDS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
# Ranks in the environment by several launchers; the first process has 0 in all of them that are set.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK")


def run_timestamp() -> str:
    """Return the last part of a run's default name, the same in all its processes: its job, or the time."""
    return job_name() or os.environ.setdefault(_TIMESTAMP, datetime.now().strftime("%Y%m%d-%H%M%S"))


def job_name() -> str | None:
    """Return the name of the launcher's job, which stays the same if it is requeued, or None."""
    ids = (os.environ.get(name, "none") for name in _JOB_IDS)  # "none" is torchrun's default id
    return next((f"job{number}" for number in ids if number != "none"), None)


def is_first_process() -> bool:
    """Return True in the process that writes the run's files."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def check_trainer(trainer: Any) -> None:
    """Check the settings of the trainer; ``UserError`` names the first that is not supported."""
    for name, (value, reason) in FIXED_TRAINER_OPTIONS.items():
        if trainer[name] not in (value, str(value)):
            raise UserError(f"trainer.{name} is {trainer[name]}; it must stay {json.dumps(value)}: {reason}")
    check_precision(trainer.precision)
    _check_length(trainer)
    interval = trainer.val_check_interval
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise UserError(
            f"trainer.val_check_interval is {interval}; it counts rollout steps, and must be a whole number from 1 on"
        )
    _check_strategy(trainer.strategy)
    if _name(trainer.strategy) == "ModelParallelStrategy":
        shards, processes = trainer.strategy.init_args.data_parallel_size, number_of_processes(trainer)
        if shards != processes:
            raise UserError(
                f"trainer.strategy.data_parallel_size is {shards} and there are {processes} processes (devices x "
                f"num_nodes); give --trainer.strategy.data_parallel_size {processes}"
            )


def _check_length(trainer: Any) -> None:
    """Check that the run is not ended before it begins."""
    limit, time = trainer.limit_train_batches, trainer.max_time
    if limit is not None and (limit < 1 or limit % 1):  # the parser makes floats of whole numbers
        raise UserError(
            f"trainer.limit_train_batches is {limit}; the training questions have no end, so it must be a whole number "
            "from 1 on, or null: set model.rollout_steps to train less"
        )
    if time is not None and not Timer(time).time_remaining():
        raise UserError(f"trainer.max_time is {time}; it must be longer, or null: nothing would be trained")


def number_of_processes(trainer: Any) -> int:
    """Return the number of processes of a run, by Lightning's rules; ``auto`` counts the devices of this machine."""
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        here = max(1, torch.cuda.device_count())
    elif isinstance(devices, str) and "," in devices:
        here = len([number for number in devices.split(",") if number.strip()])
    else:
        here = len(devices) if isinstance(devices, list) else int(devices)
    return here * int(trainer.num_nodes)


def check_checkpoint(checkpoint: Path | None, trainer: Any) -> None:
    """Check that a sharded checkpoint is loaded with sharded parameters."""
    if checkpoint is not None and checkpoint.is_dir() and _name(trainer.strategy) != "ModelParallelStrategy":
        raise UserError(
            f"checkpoint {checkpoint} is sharded, and trainer.strategy is {_name(trainer.strategy)}; add --config "
            "cluster/fsdp, with trainer.devices and trainer.strategy.data_parallel_size of any number, 1 included"
        )


def _name(strategy: Any) -> str:
    return strategy if isinstance(strategy, str) else str(strategy.class_path.rpartition(".")[2])


def _check_strategy(strategy: Any) -> None:
    """Check that the strategy is data parallel: one that averages gradients and changes nothing else."""
    if strategy in ("auto", "ddp"):
        return
    name = _name(strategy)
    if isinstance(strategy, str) or name not in ("DDPStrategy", "SingleDeviceStrategy", "ModelParallelStrategy"):
        raise UserError(f"trainer.strategy is {name}; give auto, ddp, or --config cluster/fsdp (FSDP2)")
    if name == "ModelParallelStrategy" and strategy.init_args.tensor_parallel_size != 1:
        raise UserError(
            f"trainer.strategy.tensor_parallel_size is {strategy.init_args.tensor_parallel_size}; it must be 1, and "
            "data_parallel_size the number of processes: parameters are sharded, layers are not split"
        )
