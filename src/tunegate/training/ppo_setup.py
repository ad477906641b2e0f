"""What a PPO run needs before it starts: scorers, critics, prompts that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tunegate.data.records import Prompt
from tunegate.errors import DataError, SpecError
from tunegate.observer import Observer
from tunegate.training.config import MEMBERS, OptimizerSpec, Sharding
from tunegate.training.critic import Critic, SeparateCritic, SharedTrunkCritic
from tunegate.training.policy import Policy
from tunegate.training.ppo_config import CostSpec, EnsembleSpec, PPOSpec
from tunegate.training.ranks import world
from tunegate.training.reward_model import RewardModel
from tunegate.training.scoring import Scorer, load_function


def make_scorers(reward: Path | None, judge: Path | None, spec: PPOSpec) -> dict[str, Scorer]:
    """What scores responses: `reward`, and `cost` and `judge` where there are any.

    Raises:
        SpecError: If a function does not exist, or there is neither a reward model nor a function.
        ModelError: If a folder is not a reward model.
    """
    scorers = {"reward": _reward_scorer(reward, spec)}
    if spec.cost is not None:
        scorers["cost"] = _cost_scorer(spec.cost, reward, spec)
    if judge is not None:
        scorers["judge"] = Scorer([RewardModel.load(judge, precision=spec.precision)], name="judge")
    return scorers


def _reward_scorer(reward: Path | None, spec: PPOSpec) -> Scorer:
    if spec.reward_function is not None:
        function = load_function(spec.reward_function, key="ppo.reward_function")
        return Scorer(function=function, name="ppo.reward_function")
    if reward is None:
        raise SpecError(
            "PPO needs a reward model or a reward function",
            key="ppo.reward_function",
            fix="give the folder of a reward model, or set ppo.reward_function",
        )
    members = sorted((reward / MEMBERS).glob("*/"))
    members += [Path(member) for member in spec.ensemble.members] if spec.ensemble is not None else []
    if spec.ensemble is not None and not members:
        raise SpecError(
            "there is one reward model, and nothing to join it with",
            key="ppo.ensemble",
            fix="set reward.ensemble to how many reward models to train, or name folders in ppo.ensemble.members",
        )
    models = [RewardModel.load(path, precision=spec.precision) for path in (reward, *members)]
    return Scorer(models, ensemble=(spec.ensemble or EnsembleSpec()) if members else None)


def _cost_scorer(cost: CostSpec, reward: Path | None, spec: PPOSpec) -> Scorer:
    if cost.function is not None:
        return Scorer(function=load_function(cost.function, key="ppo.cost.function"), name="ppo.cost.function")
    if cost.head is not None:
        if reward is None:
            raise SpecError(
                "the cost is a head of the reward model, and there is none",
                key="ppo.cost.head",
                value=cost.head,
                fix="give a reward model with that head, or another source of the cost",
            )
        return Scorer([RewardModel.load(reward, precision=spec.precision, head=cost.head)], name="cost")
    return Scorer([RewardModel.load(Path(str(cost.model)), precision=spec.precision)], name="cost")


def make_critic(
    scorer: Scorer, source: Path | None, policy: Policy, observer: Observer, sharding: Sharding = "none"
) -> Critic:
    """The critic of a signal: on the scoring model's trunk or weights, if it reads the policy's tokens.

    Args:
        scorer: What scores the signal.
        source: Folder of its model, if any.
        policy: The policy, whose trunk or weights serve otherwise.
        observer: Told if they do.
        sharding: Of a separate critic.
    """
    spec = policy.spec
    readable = scorer.can_read(policy.chat)
    if scorer.models and not readable:
        observer.note(f"the {scorer.name} model has other tokens than the policy: the critic starts from the policy")
    if spec.critic == "separate":
        start = source if readable and source is not None else policy.path
        return SeparateCritic(
            start,
            precision=spec.precision,
            gradient_checkpointing=spec.gradient_checkpointing,
            sharding=sharding,
        )
    width = (scorer.models[0].model if readable else policy.model).config.hidden_size
    return SharedTrunkCritic(int(width), spec.critic_hidden, policy.device)


def optimizer_spec(spec: PPOSpec) -> OptimizerSpec:
    """How policy and critics are stepped."""
    return OptimizerSpec(
        schedule=spec.schedule, warmup=0.0, gradient_clip=spec.gradient_clip, epsilon=spec.adam_epsilon
    )


def fitting_prompts(prompts: Sequence[Prompt], policy: Policy, scorers: Mapping[str, Scorer]) -> list[Prompt]:
    """The prompts that fit the policy and every model that scores, with room for a response."""
    spec = policy.spec
    limits = [(policy.chat, min(spec.max_prompt_tokens, policy.context - spec.max_new_tokens))]
    for scorer in scorers.values():
        limits += [(model.chat, model.head.max_length - spec.max_new_tokens - 1) for model in scorer.models]
    return [p for p in prompts if all(chat.fit_prompt(p.messages, limit) is not None for chat, limit in limits)]


def check_prompts(fitting: Mapping[str, Sequence[Prompt]], given: Mapping[str, int], spec: PPOSpec) -> None:
    """See that there is something to train and to measure on, for every rank.

    Args:
        fitting: `prompts` and `heldout_prompts` that fit.
        given: How many there were of each.
        spec: Sizes.

    Raises:
        DataError: If too few prompts fit.
        SpecError: If a rank would get none.
    """
    for (name, prompts), least in zip(fitting.items(), (1, 2), strict=True):
        if len(prompts) < least:
            raise DataError(
                f"PPO needs at least {least} {name} that fit",
                key=name,
                value=f"{len(prompts)} of {given[name]}",
                fix="raise ppo.max_prompt_tokens, lower ppo.max_new_tokens, or add prompts",
            )
    ranks = world()[1]
    fewest = min(spec.responses_per_update // ranks, *(len(prompts) // ranks for prompts in fitting.values()))
    if fewest < 1 or spec.responses_per_update // ranks < spec.minibatches:
        raise SpecError(
            f"{ranks} processes share each rollout, and every one needs a prompt for every minibatch",
            key="ppo.prompts_per_update",
            value=spec.prompts_per_update,
            fix=f"set it to at least {ranks * spec.minibatches}, with as many prompts",
        )
