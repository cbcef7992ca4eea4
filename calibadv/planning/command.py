"""``calibadv plan``: read the config of a run as ``fit`` does, and estimate its memory and time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from transformers import AutoConfig
from typing_extensions import override

from calibadv.config.files import read_words
from calibadv.config.help import PLAN
from calibadv.config.lightning_cli import ReadingCLI
from calibadv.config.logging import quiet_libraries
from calibadv.config.trainer_checks import number_of_processes
from calibadv.errors import UserError
from calibadv.planning.job import GIB, GPUS, PRECISIONS, Assumptions, Gpu, Job, Precision, Sampler
from calibadv.planning.model_shape import empty_model, read_shape
from calibadv.planning.report import print_report
from calibadv.policy.loading import check_model_folder
from calibadv.policy.lora import Lora, with_adapters
from calibadv.policy.precision import check_precision
from calibadv.retrieval.index.manifest import read_manifest

_ASSUMED = Assumptions()
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class PlanOptions:
    """The device to plan for, and sizes that no config holds."""

    gpu: Literal["a100", "h100", "h200", "l40s"] = "h100"
    """The accelerator of each process, with 80, 80, 141 and 48 GB."""
    gpu_memory: float | None = None
    """Its memory in GiB, in place of the named one's."""
    gpu_tflops: float | None = None
    """Its peak rate in 10^12 operations per second, in the precision of the run."""
    gpu_bandwidth: float | None = None
    """The bandwidth of its memory in GB/s."""
    gpu_link: float | None = None
    """The bandwidth of its link to its neighbours in GB/s; between machines at most 50 are assumed."""
    mfu: float = _ASSUMED.mfu
    """Share of the peak rate that passes through the model reach."""
    rollout_tokens: int | None = None
    """Mean tokens of a rollout; by default as many as there may be."""
    policy_tokens: int | None = None
    """Mean tokens of a rollout that the policy writes; by default as many as there may be."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise UserError(f"--{name} is {value}; it must be above 0")
        if self.mfu > 1:
            raise UserError(f"--mfu is {self.mfu}; it is a share of the peak rate, at most 1")

    def device(self) -> Gpu:
        """The accelerator."""
        named = GPUS[self.gpu]
        return Gpu(
            memory=named.memory if self.gpu_memory is None else self.gpu_memory * GIB,
            tflops=self.gpu_tflops or named.tflops,
            tflops32=self.gpu_tflops or named.tflops32,
            bandwidth=named.bandwidth if self.gpu_bandwidth is None else self.gpu_bandwidth * 1e9,
            link=named.link if self.gpu_link is None else self.gpu_link * 1e9,
        )


class PlanCLI(ReadingCLI):
    """Reads the settings of a run and the options of ``plan``, from the command line behind it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(read_words(arguments))

    @property
    def options(self) -> PlanOptions:
        """The options of ``plan`` itself."""
        return PlanOptions(**{field.name: self.config["fit"][field.name] for field in fields(PlanOptions)})

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PlanOptions)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        own = self._parser(self.verb)
        own.usage = "calibadv plan [--config NAME_OR_FILE ...] [--option VALUE ...]"
        own.description = PLAN
        super().parse_arguments(parser, args)


def plan(arguments: Sequence[str]) -> int:
    """Print the memory of a device by phase and the seconds of a rollout step.

    No weights are loaded, nothing is run and nothing is written.
    """
    quiet_libraries()
    cli = PlanCLI(arguments)
    settings, options = cli.settings_of_fit, cli.options
    job = read_job(settings, options)
    print_report(job, options.gpu, settings.trainer.precision or "32-true", _notes(settings, job))
    return 0


def read_job(settings: Namespace, own: PlanOptions) -> Job:
    """Read the description of a run from its settings."""
    model, trainer, data = settings.model, settings.trainer, settings.data
    policy = empty_model(AutoConfig.from_pretrained(check_model_folder(model.policy), local_files_only=True))
    shape = read_shape(policy)
    processes = number_of_processes(trainer)
    strategy, strategy_options = _strategy(trainer.strategy)
    sampler = _sampler(model.engine)
    protocol = model.protocol.init_args
    turns = protocol.max_searches + 1
    limit = protocol.max_rollout_tokens
    longest = getattr(model.engine.init_args, "max_model_len", None)
    if longest is not None and longest < limit:
        raise UserError(
            f"model.engine.max_model_len is {longest} and protocol.max_rollout_tokens is {limit}; raise the first"
        )
    _check_job(processes, data.questions_per_step, sampler, own, limit)
    tokens = own.rollout_tokens or limit
    validations = model.rollout_steps // trainer.val_check_interval + 1 if data.validation else 0
    return Job(
        shape=shape,
        trained=_adapter_parameters(policy, model.lora) if model.lora else shape.parameters,
        gpu=own.device(),
        precision=_precision(trainer.precision),
        sampler=sampler,
        questions=data.questions_per_step,
        group_size=model.group_size,
        max_rollout_tokens=limit,
        mean_rollout_tokens=tokens,
        mean_policy_tokens=min(own.policy_tokens or turns * protocol.max_turn_tokens, tokens),
        max_turns=turns,
        lora=model.lora is not None,
        holds_reference=bool(model.kl_coef) and model.lora is None,
        runs_reference=bool(model.kl_coef),
        processes=processes,
        nodes=int(trainer.num_nodes),
        sharded=strategy == "ModelParallelStrategy",
        bucket_view=bool(strategy_options.get("gradient_as_bucket_view")),
        checkpointing=model.gradient_checkpointing,
        mini_batches=model.mini_batches,
        micro_batch_tokens=model.micro_batch_tokens,
        rollout_steps=model.rollout_steps,
        validations=validations,
        validation_questions=data.validation_questions or 0,
        assumed=replace(_ASSUMED, mfu=own.mfu),
    )


def _strategy(strategy: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(strategy, str):
        return strategy, {}
    options = dict(strategy.get("init_args") or {})
    return strategy.class_path.rpartition(".")[2], {**options, **(strategy.get("dict_kwargs") or {})}


def _check_job(processes: int, questions: int, sampler: Sampler, options: PlanOptions, limit: int) -> None:
    """Check what ``fit`` checks once it has built everything, and that mean lengths do not exceed the maximum."""
    if questions % processes:
        raise UserError(
            f"data.questions_per_step is {questions} and there are {processes} processes, which must share the "
            "questions evenly; give a multiple"
        )
    if processes > 1 and sampler.tensor_parallel > 1:
        raise UserError(
            f"model.engine.tensor_parallel_size is {sampler.tensor_parallel} and {processes} processes train; give 1"
        )
    if (options.rollout_tokens or 0) > limit:
        raise UserError(
            f"--rollout_tokens is {options.rollout_tokens} and protocol.max_rollout_tokens is {limit}; lower the first "
            "or raise the second"
        )
    if (options.policy_tokens or 0) > (options.rollout_tokens or limit):
        raise UserError(
            f"--policy_tokens is {options.policy_tokens} and a rollout has {options.rollout_tokens or limit}; lower it"
        )


def _precision(name: Any) -> Precision:
    chosen = check_precision(name)
    if chosen not in PRECISIONS:
        raise UserError(f"trainer.precision is {name}; plan knows {', '.join(PRECISIONS)}")
    return PRECISIONS[chosen]


def _sampler(engine: Namespace) -> Sampler:
    kind, options = engine.class_path.rpartition(".")[2], engine.init_args
    if kind == "TransformersEngine":
        return Sampler("transformers", batch_size=options.batch_size)
    if kind != "VLLMEngine":
        return Sampler("elsewhere")
    return Sampler(
        "vllm",
        dtype_bytes=_DTYPE_BYTES[options.dtype],
        memory_share=options.gpu_memory_utilization,
        kv_cache=options.kv_cache_gib and options.kv_cache_gib * GIB,
        sleeps=options.sleep,
        tensor_parallel=options.tensor_parallel_size,
    )


def _adapter_parameters(model: nn.Module, lora: Lora) -> int:
    with torch.device("meta"):
        adapted = with_adapters(model, lora)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _notes(settings: Namespace, job: Job) -> Iterator[str]:
    """Remarks that the tables do not show."""
    for index in _indexes(settings.model.retriever):
        path = Path(index)
        size = sum(read_manifest(path).files.values()) if path.is_dir() else path.stat().st_size
        yield (
            f"Index '{index}': {size / GIB:.1f} GiB on disk; each process of a machine opens it, with its own copy "
            "of what is not memory-mapped."
        )
    if settings.trainer.precision == "bf16-true" and not job.lora:
        yield "bf16-true has no float32 weights: updates below 1/256 of a weight are lost to rounding."
    if job.sampler.kind == "elsewhere":
        yield f"{settings.model.engine.class_path} samples elsewhere: its memory and the time of rollouts are left out."
    if settings.data.validation and settings.data.validation_questions is None:
        yield "data.validation_questions is null: all are asked, and their time is not included."


def _indexes(part: Any) -> Iterator[str]:
    """The ``index`` settings of a retriever and of those that it wraps."""
    if isinstance(part, Namespace | dict):
        for name, value in part.items():
            if name == "index" and isinstance(value, str):
                yield value
            else:
                yield from _indexes(value)
