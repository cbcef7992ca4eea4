"""Checks of a run before anything is sampled: settings that cannot work, or not together."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lightning.pytorch import Trainer

from calibadv.agent.episode import Agent
from calibadv.agent.rollout import check_prompt
from calibadv.data.datamodule import QuestionData
from calibadv.errors import UserError
from calibadv.interfaces import AdvantageEstimator, GroupFilter
from calibadv.policy.precision import check_precision
from calibadv.training.importance_sampling import TruncatedImportanceSampling
from calibadv.training.objective import Objective

log = logging.getLogger(__name__)

# Of a larger file only the longest questions are checked before the run: encoding all would take minutes.
_PROMPTS_CHECKED = 5000
_AT_LEAST = {
    **dict.fromkeys(("rollout_steps", "group_size", "mini_batches", "micro_batch_tokens"), 1),
    **dict.fromkeys(("warmup_steps", "kl_coef", "learning_rate", "weight_decay", "clip_norm"), 0),
}


def check_numbers(betas: tuple[float, float], temperature: float = 1.0, **settings: float) -> None:
    """Refuse settings of the model section that are too small."""
    for name, value in settings.items():
        if value < _AT_LEAST[name]:
            raise UserError(f"model.{name} is {value}; it must be at least {_AT_LEAST[name]}")
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"model.betas are {betas}; both must be at least 0 and below 1")
    if temperature <= 0:
        raise UserError(f"model.temperature is {temperature}; it must be above 0 (validation is greedy anyway)")


def check_replaced(name: str, given: object, replaced: Mapping[str, tuple[object, object]]) -> None:
    """Refuse settings that a custom optimizer or scheduler replaces."""
    for key, (value, default) in replaced.items() if given is not None else ():
        if value != default:
            raise UserError(
                f"model.{key} is {value} and model.{name} is set, which replaces it; give the value to model.{name}, "
                f"and leave model.{key} at {default}"
            )


def check_importance_sampling(old_logprobs: str, importance_sampling: TruncatedImportanceSampling | None) -> None:
    """Refuse two corrections of one difference."""
    if old_logprobs == "engine" and importance_sampling is not None:
        raise UserError(
            "model.sampler_correction is set and model.old_logprobs is engine, whose ratio holds that correction "
            "already; leave one of them out"
        )


def check_objective(objective: Objective, mini_batches: int, old_logprobs: str) -> None:
    """Refuse terms of the objective that cannot act as they are set up, or not together."""
    if not objective.kl_coef and objective.kl_estimator != "k3":
        raise UserError(
            f"model.kl_estimator is {objective.kl_estimator} and model.kl_coef is 0, so there is no KL to estimate; "
            "set kl_coef, as in 0.001, or leave kl_estimator out"
        )
    if objective.kl_estimator == "k1":
        log.warning(
            "model.kl_estimator is k1: as a term of the loss, its gradient does not depend on the reference, and "
            "nothing pulls the policy back to it; k2 and k3 do"
        )
    ratio_is_one = mini_batches == 1 and old_logprobs == "trainer"
    if ratio_is_one and objective.loss.requires_multiple_updates:
        log.warning(
            "model.mini_batches is 1, so every ratio is 1 when a rollout step makes its only update, and this %s "
            "behaves like the default PPOClip; set mini_batches to at least 2",
            type(objective.loss).__name__,
        )
    kinds = [type(regularizer).__name__ for regularizer in objective.regularizers]
    for kind, regularizer in zip(kinds, objective.regularizers, strict=True):
        if kinds.count(kind) > 1:
            raise UserError(
                f"model.regularizers names {kind} {kinds.count(kind)} times; keep one, with the sum of weights"
            )
        if regularizer.requires_multiple_updates:
            _check_updates(kind, mini_batches, old_logprobs)


def _check_updates(kind: str, mini_batches: int, old_logprobs: str) -> None:
    if old_logprobs == "engine":
        raise UserError(
            f"model.old_logprobs is engine and {kind} acts on changes of the trainer's log-probabilities: "
            "it would take the engine's other numerics for that; set old_logprobs to trainer"
        )
    if mini_batches < 2:
        raise UserError(
            f"model.mini_batches is {mini_batches} and {kind} acts on what earlier updates of a rollout step "
            f"have changed, of which there are none; set mini_batches to at least 2, or leave {kind} out"
        )


def check_filter(group_filter: GroupFilter | None, estimator: AdvantageEstimator, group_size: int) -> None:
    """Refuse a filter that would drop what the method learns from, or everything."""
    if group_filter is None:
        return
    name = type(group_filter).__name__
    if group_size == 1:
        raise UserError(f"model.group_size is 1, and {name} compares the rollouts of a group; give at least 2")
    if estimator.uses_zero_variance_groups:
        raise UserError(
            f"{type(estimator).__name__} also learns from groups whose rewards are equal, as their searches differ, "
            f"and {name} would drop these; use one of the two"
        )


def check_data(trainer: Trainer, stage: str, agent: Agent, group_filter: GroupFilter | None) -> None:
    """Refuse questions that the ranks cannot share evenly, or whose prompt alone fills a rollout.

    Of many questions, the longest are checked.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, QuestionData):
        if stage == "fit" and group_filter is not None:
            raise UserError("model.group_filter asks further questions of QuestionData; give that to fit as datamodule")
        return
    if stage == "fit" and data.questions_per_step % trainer.world_size:
        raise UserError(
            f"data.questions_per_step is {data.questions_per_step} and there are {trainer.world_size} processes, which "
            "must share the questions evenly; give a multiple"
        )
    longest = sorted(data.questions_for(stage), key=lambda question: -len(question.question))
    for question in longest[:_PROMPTS_CHECKED]:
        check_prompt(question, agent)


def check_trainer(trainer: Trainer, fitting: bool) -> None:
    """Refuse settings of a trainer that cannot work; epochs do not matter, since the training questions have no end."""
    check_precision(trainer.precision)
    if not fitting:
        return
    if trainer.max_steps != -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            f"trainer.max_steps is {trainer.max_steps}, which counts optimizer steps; leave it at -1 and set "
            "model.rollout_steps"
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError("trainer.overfit_batches repeats batches; give data.train a file with few questions instead")
