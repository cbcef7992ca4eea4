"""TensorBoard's pages beside the curves: the stability panel as one page, settings beside figures, histograms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer
from typing_extensions import override

from calibadv.batch import StepOutput
from calibadv.callbacks._utils import installed, writers
from calibadv.callbacks.results import Results
from calibadv.runs.settings import as_text
from calibadv.runs.summary import summarize_run

Setting = str | int | float | bool

# Chart by chart, the curves of the page; a pattern stands for all curves that it matches.
PANEL: dict[str, tuple[str, ...]] = {
    "validation": ("val/f1", "val/em", "val/cover_em"),
    "validation F1 by data source": ("val/.+/f1",),
    "reward": ("reward/score", "reward/f1", "reward/em", "reward/answer_f1"),
    "valid format": ("reward/format_valid", "val/format_valid"),
    "how rollouts fail": ("rollout/truncated", "rollout/invalid", "rollout/out_of_turns", "rollout/search_failed"),
    "turns and searches": ("rollout/turns", "rollout/searches", "val/searches"),
    "policy tokens per rollout": ("rollout/policy_tokens",),
    "entropy": ("stability/entropy",),
    "perplexity": ("stability/perplexity", "stability/perplexity_max"),
    "garbled rollouts": ("stability/garbled",),
    "gradient norm": ("stability/grad_norm", "stability/grad_norm_max"),
    "clipped tokens": ("stability/clip_low", "stability/clip_high"),
    "KL to the policy before the step": ("stability/kl_old",),
    "KL to the reference": ("stability/kl_reference",),
    "sampler drift": ("stability/sampler_drift_mean", "stability/sampler_drift_max"),
    "advantage mass of answers": ("advantage/(estimated|calibrated)/answer/(positive|negative)_mass",),
    "advantage mass of searches": ("advantage/(estimated|calibrated)/search/(positive|negative)_mass",),
    "positive to negative mass": ("advantage/(estimated|calibrated)/(answer|search)/ratio",),
    "search turns with evidence": ("credit/step_correctness",),
    "punished and softened searches": ("credit/mispenalised", "credit/true_mispenalised", "credit/softened"),
    "groups without a signal": ("credit/tied_groups", "credit/empty_silver"),
    "silver documents": ("credit/silver_size",),
    "tied updates": ("credit/tied_updates",),
    "skipped updates": ("stability/skipped_updates",),
    "seconds per step": ("rollout/seconds", "update/seconds"),
    "tokens per second": ("rollout/tokens_per_second",),
    "alarms of the guard": ("guard/alarms",),
}
# Figures of a run beside its settings, in the tab HParams.
FIGURES = ("outcome/final_f1", "outcome/best_f1", "outcome/collapsed", "val/em", "val/format_valid")
# Settings that people vary. A class stands for itself and its arguments.
_SWEPT = (
    *("seed_everything", "model.policy", "model.lora", "model.reward", "model.retriever", "model.estimator"),
    *("model.group_filter", "model.loss", "model.regularizers", "model.kl_coef", "model.kl_estimator"),
    *("model.protocol.init_args.prepend_think", "model.protocol.init_args.max_searches"),
    *("model.rollout_steps", "model.group_size", "model.temperature", "model.learning_rate", "model.schedule"),
    *("model.warmup_steps", "model.betas", "model.weight_decay", "model.clip_norm", "model.mini_batches"),
    *("model.old_logprobs", "model.sampler_correction", "model.skip_tied"),
    *("data.train", "data.validation", "data.questions_per_step"),
)  # fmt: skip


class TensorBoardPages(Callback):
    """Add to TensorBoard's curves what belongs beside them; does nothing with any other logger.

    Settings are flat, as ``swept_settings`` gives them. Histograms are drawn at step 1 and at every so many steps.
    """

    def __init__(self, settings: Mapping[str, Setting], every_n_rollout_steps: int) -> None:
        self.settings = dict(settings)
        self.every_n_rollout_steps = every_n_rollout_steps

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        from torch.utils.tensorboard.summary import hparams

        charts = {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in PANEL.items()}
        # The figures are ordinary curves, so that they need no folder or end of their own; their last values count.
        experiment, start, _ = hparams(self.settings, dict.fromkeys(FIGURES, 0.0))  # type: ignore[no-untyped-call]
        for writer in writers(trainer):
            writer.add_custom_scalars({"stability panel": charts})
            writer.file_writer.add_summary(experiment)
            writer.file_writer.add_summary(start)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        output: StepOutput = outputs["output"]
        if output.step == 1 or output.step % self.every_n_rollout_steps == 0:
            for writer in writers(trainer):
                for tag, values in histograms(output).items():
                    writer.add_histogram(tag, values, output.step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        results = installed(trainer, Results)
        if trainer.state.fn != "fit" or results is None:
            return
        found = summarize_run(results.validations)
        for writer in writers(trainer):
            for name in ("best_f1", "final_f1", "collapsed"):
                if name in found:
                    writer.add_scalar(f"outcome/{name}", float(found[name]), pl_module.rollout_step)


def histograms(output: StepOutput) -> dict[str, Any]:
    """Select the tensors of a training step that are shown as histograms."""
    batch = output.batch
    trained = [rollout for rollout, kept in zip(batch.rollouts, batch.included.tolist(), strict=True) if kept]
    found = {
        "histograms/advantage_estimated": output.estimated[batch.loss_mask].numpy(force=True),
        "histograms/advantage_calibrated": output.calibrated[batch.loss_mask].numpy(force=True),
        "histograms/step_correctness": np.array([c for rollout in trained for c in rollout.step_correctness]),
    }
    return {tag: values for tag, values in found.items() if values.size}


def swept_settings(config: Mapping[str, Any]) -> dict[str, Setting]:
    """The settings of a run that people vary, flat."""
    named = {"calibrators": _calibrators(config) or "none"}
    for key in _SWEPT:
        named[key.rpartition(".")[2] if key.startswith("model") else key] = _look_up(config, key)
    return {key: value if isinstance(value, Setting) else as_text(value) for key, value in named.items()}


def _calibrators(config: Mapping[str, Any]) -> list[Any]:
    callbacks = _look_up(config, "trainer.callbacks") or []
    return [calibrator for callback in callbacks for calibrator in _look_up(callback, "init_args.calibrators") or []]


def _look_up(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config
