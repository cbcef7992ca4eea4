"""The tables of ``calibadv plan``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table

from calibadv.planning.job import GIB, Job
from calibadv.planning.memory import PHASES, fits, memory_items, remedies, rows_at_once
from calibadv.planning.time import step_times, validation_seconds

# Larger models have tables in GiB, others in MiB.
_SMALL = 10**8
_PHASE_NAMES = {"rollout": "rollout", "logprobs": "log-probs", "update": "update", "optimizer": "optimizer step"}


def print_report(job: Job, gpu: str, precision: str, notes: Iterable[str]) -> None:
    """Print memory and time of a run."""
    console = Console()
    console.print(_headline(job, gpu, precision), highlight=False, soft_wrap=True)
    console.print(_memory_table(job))
    console.print(_verdict(job), highlight=False, soft_wrap=True)
    if rows_at_once(job, job.max_rollout_tokens) or job.sampler.kind == "elsewhere":
        console.print(_time_table(job))
    for line in [*notes, *_assumed(job)]:
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)


def _headline(job: Job, gpu: str, precision: str) -> str:
    processes = "1 process" if job.processes == 1 else f"{job.processes} processes"
    machines = f" on {job.nodes} machines" if job.nodes > 1 else ""
    kind = "" if job.processes == 1 else ", FSDP2" if job.sharded else ", DDP"
    trained = f", {job.trained:,} of adapters are trained" if job.lora else ""
    return (
        f"{job.shape.parameters:,} parameters{trained}; {processes}{machines}{kind}, {precision}, "
        f"{gpu} with {job.gpu.memory / GIB:.0f} GiB each\n"
        f"{job.questions} questions x {job.group_size} rollouts a step, {job.mean_rollout_tokens} tokens each "
        f"({job.mean_policy_tokens} by the policy), {job.mini_batches} updates a step, {job.rollout_steps} steps"
    )


def _memory_table(job: Job) -> Table:
    items = memory_items(job)
    name, unit = ("GiB", GIB) if job.shape.parameters > _SMALL else ("MiB", GIB / 1024)
    table = Table(f"{name} of one device", title="Memory", title_justify="left")
    for phase in PHASES:
        table.add_column(_PHASE_NAMES[phase], justify="right")
    for item in items:
        table.add_row(item.name, *(f"{size / unit:.1f}" if size else "-" for size in item.phases))
    table.add_section()
    sums = map(sum, zip(*(item.phases for item in items), strict=True))
    table.add_row("sum", *(f"{size / unit:.1f}" for size in sums))
    return table


def _verdict(job: Job) -> str:
    if fits(job):
        return f"[bold green]fits[/] {job.gpu.memory / GIB:.0f} GiB"
    words, changed = remedies(job)
    lacking = f"[bold red]does not fit[/] {job.gpu.memory / GIB:.0f} GiB"
    if fits(changed):
        return f"{lacking}; it would with {' '.join(words)}"
    more = "take more devices with --config cluster/fsdp, larger ones, or train adapters (model.lora)"
    return f"{lacking}, nor would it with {' '.join(words) or 'other settings'}; {more}"


def _time_table(job: Job) -> Table:
    items = step_times(job)
    total = sum(item.seconds for item in items)
    table = Table("stage", "what", title="Time of a rollout step", title_justify="left")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for item in items:
        table.add_row(item.stage, item.name, f"{item.seconds:.3g}", f"{item.seconds / total:.1%}")
    table.add_section()
    table.add_row("step", "", f"{total:.3g}", "100.0%")
    validations = job.validations * validation_seconds(job)
    table.add_row("run", f"{job.rollout_steps} steps", _hours(total * job.rollout_steps))
    if validations:
        table.add_row("", f"{job.validations} validations of {job.validation_questions} questions", _hours(validations))
    return table


def _hours(spent: float) -> str:
    return f"{spent / 3600:.1f} h" if spent >= 360 else f"{spent:.0f} s"


def _assumed(job: Job) -> Iterator[str]:
    assumed = job.assumed
    yield "An estimate by arithmetic: nothing was loaded or run. The time of searches is not included."
    if job.mean_rollout_tokens == job.max_rollout_tokens:
        yield "All rollouts have the maximum length; --rollout_tokens and --policy_tokens take means."
    rate = job.peak_flops / 1e12
    yield f"Passes reach {assumed.mfu:.0%} of {rate:g} TFLOPS (--mfu); all parameters count as active."
    if job.sampler.kind != "elsewhere":
        rows = rows_at_once(job, job.mean_rollout_tokens)
        launch = f", and {1e3 * assumed.launch_seconds:g} ms per layer to start kernels"
        yield (
            f"Decoding {rows} rollouts at once reaches {assumed.bandwidth_share:.0%} of {job.gpu.bandwidth / 1e9:g} "
            f"GB/s{launch if job.sampler.kind == 'transformers' else ''}."
        )
    if job.processes > 1:
        yield (
            f"Processes send {job.link / 1e9:g} GB/s at {assumed.link_share:.0%}, and none of it is "
            "overlapped with computation."
        )
    yield (
        f"{assumed.reserve / GIB:g} GiB are for CUDA, NCCL and fragments; a logit takes {assumed.logit_bytes} bytes, a "
        f"token of a rollout {assumed.tensor_bytes}; layers are of the Llama kind, without stored score matrices."
    )
