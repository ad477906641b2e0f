"""The whole evaluation: ask every model the same prompts once, then count.

Order: answers (one model in memory at a time), labels, scores by the judge and by PPO's own reward model, likelihoods,
divergence, the language model judge, figures. Nothing here draws a random number but the seeded samples of prompts and
questions, the divergence's answers, and bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tunegate import __version__
from tunegate.data.records import Conversation, Prompt
from tunegate.errors import DataError, ModelError
from tunegate.evaluation import bias, capability, harmlessness, helpfulness, questions, sanity, second_opinion
from tunegate.evaluation.asking import Subject, score
from tunegate.evaluation.backends import Backends, Decoding, Likelihoods, Precision, real_backends
from tunegate.evaluation.cache import Cache
from tunegate.evaluation.capability import Capability
from tunegate.evaluation.cases import (
    COUNTERFACTUAL,
    DIRECT,
    TAGS,
    Case,
    cases_digest,
    counterfactual_cases,
    main_cases,
    ranked,
    select,
    thinned,
)
from tunegate.evaluation.config import EvaluationSpec
from tunegate.evaluation.llm_judge import LanguageModelJudge
from tunegate.evaluation.refusal import RefusalClassifier, ResponseJudge
from tunegate.evaluation.results import (
    ANCHOR,
    CANDIDATE,
    COMPARISONS_NAME,
    LIKELIHOODS_NAME,
    ROLES,
    ROWS_NAME,
    SFT,
    Answer,
    Evaluation,
    Figure,
    ModelFigures,
    RewardModelFigures,
    Sample,
    write_evaluation,
)
from tunegate.evaluation.rows import (
    ComparedRow,
    LikelihoodRow,
    Row,
    write_comparisons,
    write_likelihoods,
    write_rows,
)
from tunegate.observer import NullObserver, Observer
from tunegate.storage.manifest import digest_json


def evaluate(
    models: Mapping[str, Path],
    *,
    reward: Path | None,
    judge: Path | None,
    prompts: Sequence[Prompt],
    heldout: Sequence[Conversation],
    out: Path,
    spec: EvaluationSpec,
    seed: int,
    observer: Observer | None = None,
    precision: Precision = "auto",
    cache: Path | str | None = None,
    classifier: ResponseJudge | None = None,
    backends: Backends | None = None,
) -> Evaluation:
    """Measure every model and compare the candidate with the others.

    Args:
        models: Folders by role: `candidate` and `anchor` (the base model) always, `sft` and `champion` if there are.
        reward: The reward model that PPO trained on; shows reward hacking. None leaves that out.
        judge: A reward model that PPO never saw, which compares the answers. None: `reward` does, and the evaluation
            says so, since a policy is good at pleasing the model it was trained on.
        prompts: Evaluation prompts with the tags `harmful`, `lookalike`, `everyday`; others are left out.
        heldout: Conversations that no model was trained on, for the likelihood.
        out: Folder for `evaluation.json`, and every row behind it: `responses.parquet`, `likelihoods.parquet` and, with
            a language model judge, `comparisons.parquet`.
        spec: What to measure.
        seed: Of the samples of prompts, of the noise when the temperature is above 0, and of the bootstrap.
        observer: Told progress, remarks, and the figures (`evaluation/<role>/<metric>`).
        precision: Number format of the models.
        cache: Folder or `s3://` prefix in which answers, scores, likelihoods and judgements survive this call; used
            when `spec.cache` is on.
        classifier: Labels the answers; the one that the spec names by default.
        backends: How models are loaded; the training room's by default.

    Returns:
        What was written to `evaluation.json`.

    Raises:
        ModelError: A role is missing or unknown.
        DataError: The prompts cannot be used.
    """
    _check_roles(models)
    observer = observer or NullObserver()
    backends = backends or real_backends(precision)
    classifier = classifier or _classifier(spec)
    store = Cache(cache if spec.cache else None)
    cases = main_cases(select(prompts, spec, seed), spec)
    swaps = counterfactual_cases(spec, seed)
    asked_questions = questions.chosen_questions(spec, seed)
    notes: list[str] = []
    subjects = {role: Subject(role, models[role], backends, store, precision) for role in ROLES if role in models}
    asked = {role: thinned(cases, spec.sft_share) if role == SFT else cases for role in subjects}

    rows: dict[str, list[Row]] = {}
    for role, subject in subjects.items():
        rows[role] = subject.answer(asked[role], _decoding(spec, seed), classifier, observer, "answering")
        if role in (CANDIDATE, ANCHOR):
            shorter = _decoding(spec, seed, spec.bias.max_new_tokens)
            rows[role] += subject.answer(swaps, shorter, classifier, observer, "answering swaps")
        subject.release()

    screen = harmlessness.screen_toxicity([row for found in rows.values() for row in found], spec)
    digests = _score_rows(rows, reward, judge, spec, backends, store, observer)
    unit = helpfulness.deviation(rows[ANCHOR])
    if (judge or reward) and unit is None:
        notes.append("the judge gives all of the base model's answers the same score: its comparisons mean nothing")
    if judge is None and reward is not None:
        notes.append("answers were compared by the reward model that PPO trained on: give an independent judge")
    unscored = sum(row.judge_score is None for found in rows.values() for row in helpfulness.helpful_rows(found))
    if (judge or reward) and unscored:
        notes.append(f"{unscored} answers were too long for the judge and enter no comparison")

    held = _read_likelihoods(
        subjects, ranked(heldout, seed)[: spec.capability.conversations], asked_questions, spec, observer
    )
    metrics = {role: _metrics(rows[role], held.get(role), spec, seed) for role in subjects}
    for role in subjects:
        if role != ANCHOR:
            metrics[role] |= helpfulness.win_rate_against_anchor(rows[role], rows[ANCHOR], unit, spec)
    if SFT in subjects:
        metrics[CANDIDATE] |= _divergence(subjects, asked[CANDIDATE], spec, seed, observer, notes)
    differences = {
        role: _differences(rows[CANDIDATE], rows[role], held.get(CANDIDATE), held.get(role), unit, spec, seed)
        for role in subjects
        if role != CANDIDATE
    }
    if differences[ANCHOR]:
        differences[ANCHOR] |= helpfulness.proxy_gap(rows[CANDIDATE], rows[ANCHOR], spec, seed)
    notes += [
        f"the likelihoods of candidate and {role} cannot be compared: their tokenizers cut the text differently"
        for role in differences
        if "nll" in metrics[CANDIDATE] and "nll" in metrics[role] and "nll" not in differences[role]
    ]

    compared: list[ComparedRow] = []
    if spec.judge.endpoint is not None:
        llm_judge = LanguageModelJudge(spec.judge.endpoint, store)
        opinion = second_opinion.ask(rows, llm_judge, spec, observer)
        digests["llm_judge"] = llm_judge.digest
        notes += opinion.notes
        compared = opinion.rows
        for role in subjects:
            metrics[role] |= opinion.metrics.get(role, {})
            if role in differences:
                differences[role] |= opinion.differences.get(role, {})

    decoding_digest = digest_json(_decoding(spec, seed).facts())
    evaluation = Evaluation(
        created=datetime.now(UTC),
        code_version=__version__,
        confidence=spec.confidence,
        models={
            role: ModelFigures(
                digest=subject.digest,
                prompts_digest=cases_digest(asked[role]),
                decoding_digest=decoding_digest,
                cached=not subject.loaded,
                metrics=metrics[role],
            )
            for role, subject in subjects.items()
        },
        differences=differences,
        hazards=harmlessness.hazards(rows[CANDIDATE]),
        groups=bias.groups(rows[CANDIDATE], rows[ANCHOR], unit, spec),
        sources=harmlessness.sources(rows, spec),
        questions=questions.by_category(held[CANDIDATE].answered, spec) if CANDIDATE in held else [],
        reward_models=_reward_models(reward, judge, spec),
        samples=_samples(rows, spec),
        judge="independent" if judge else "training" if reward else "none",
        judge_deviation=unit,
        digests={
            **digests,
            "classifier": classifier.digest,
            "counterfactuals": cases_digest(swaps),
            **({"toxicity": screen} if screen else {}),
            **(
                {"questions": digest_json([asdict(question) for question in asked_questions])}
                if asked_questions
                else {}
            ),
            "heldout": digest_json([[c.id, c.messages] for c in heldout]),
            "spec": digest_json(spec.model_dump(mode="json")),
        },
        notes=notes,
    )
    for note in notes:
        observer.note(note)
    write_rows([row for role in rows for row in rows[role]], out / ROWS_NAME)
    write_likelihoods([row for role in held for row in held[role].rows], out / LIKELIHOODS_NAME)
    if compared:
        write_comparisons(compared, out / COMPARISONS_NAME)
    write_evaluation(evaluation, out)
    observer.metrics(_flat(evaluation), step=0)
    return evaluation


def _classifier(spec: EvaluationSpec) -> ResponseJudge:
    if spec.refusal_classifier == "embeddings":
        from tunegate.evaluation.embeddings import EmbeddingClassifier

        return EmbeddingClassifier.load()
    return RefusalClassifier.load()


def _check_roles(models: Mapping[str, Path]) -> None:
    missing = [role for role in (CANDIDATE, ANCHOR) if role not in models]
    unknown = sorted(set(models) - set(ROLES))
    if missing or unknown:
        raise ModelError(
            f"an evaluation needs candidate and anchor, and knows {', '.join(ROLES)}",
            key="models",
            value=sorted(models),
            fix="name the models by these roles",
        )


def _decoding(spec: EvaluationSpec, seed: int, max_new_tokens: int | None = None) -> Decoding:
    return Decoding(
        max_new_tokens=max_new_tokens or spec.decoding.max_new_tokens,
        temperature=spec.decoding.temperature,
        max_prompt_tokens=spec.decoding.max_prompt_tokens,
        batch_tokens=spec.decoding.batch_tokens,
        seed=seed,
    )


def _score_rows(
    rows: Mapping[str, Sequence[Row]],
    reward: Path | None,
    judge: Path | None,
    spec: EvaluationSpec,
    backends: Backends,
    cache: Cache,
    observer: Observer,
) -> dict[str, str]:
    """Fill in judge and proxy scores; returns the reward models' digests."""
    digests = {}
    referee = judge or reward
    if referee is not None:
        wanted = [row for found in rows.values() for row in found if spec.judge.score_all or _is_scored(row.case)]
        digests["judge"] = score(referee, wanted, "judge_score", backends, cache, observer, "judge: scoring")
    if reward is not None and judge is not None:
        pair = [row for role in (CANDIDATE, ANCHOR) for row in helpfulness.helpful_rows(rows[role])]
        digests["reward"] = score(reward, pair, "proxy_score", backends, cache, observer, "reward model: scoring")
    return digests


def _is_scored(case: Case) -> bool:
    return case.variant == DIRECT and case.tag in ("everyday", "lookalike", COUNTERFACTUAL)


@dataclass(frozen=True, slots=True)
class _Held:
    """What one model's likelihoods show.

    Attributes:
        shown: Capability; None when it is switched off or there is nothing to measure it on.
        answered: The bias questions with the model's choices.
        rows: Every likelihood.
    """

    shown: Capability | None
    answered: list[questions.Answered]
    rows: list[LikelihoodRow]


def _read_likelihoods(
    subjects: Mapping[str, Subject],
    heldout: Sequence[Conversation],
    asked: Sequence[questions.Question],
    spec: EvaluationSpec,
    observer: Observer,
) -> dict[str, _Held]:
    """Likelihoods of held-out conversations, tasks and bias questions, each model loaded once."""
    heldout = heldout if spec.capability.enabled else []
    tasks = capability.chosen_tasks(spec) if spec.capability.enabled and spec.capability.tasks else []
    plain = [*heldout, *capability.task_conversations(tasks)]
    conversations = [*plain, *questions.question_conversations(asked)]
    if not conversations:
        return {}
    held = {}
    for role, subject in subjects.items():
        if role == SFT and spec.sft_share == 0:
            continue
        found = subject.likelihoods(conversations, observer)
        if len(found.sums) != len(conversations):
            raise DataError("one likelihood a conversation is needed", key=role, value=len(found.sums))
        first = Likelihoods(found.sums[: len(plain)], found.tokens[: len(plain)])
        rest = Likelihoods(found.sums[len(plain) :], found.tokens[len(plain) :])
        answered = questions.read_answers(rest, asked)
        held[role] = _Held(
            shown=capability.read_likelihoods(first, heldout, tasks) if plain else None,
            answered=answered,
            rows=[
                *capability.likelihood_rows(role, first, heldout, tasks),
                *questions.answer_rows(role, answered),
            ],
        )
    return held


def _divergence(
    subjects: Mapping[str, Subject],
    cases: Sequence[Case],
    spec: EvaluationSpec,
    seed: int,
    observer: Observer,
    notes: list[str],
) -> dict[str, Figure]:
    """KL of the candidate from the SFT model on everyday and look-alike prompts."""
    prompts = [case.messages for case in cases if case.variant == DIRECT and case.tag in ("everyday", "lookalike")]
    wanted = min(len(prompts), spec.sanity.kl_prompts)
    if not wanted:
        return {}
    chosen = [prompts[index * len(prompts) // wanted] for index in range(wanted)]
    found = subjects[CANDIDATE].divergence_from(subjects[SFT], chosen, _decoding(spec, seed), observer)
    if found is None:
        notes.append("the divergence from the SFT model was not measured: the models cut text into different tokens")
        return {}
    return sanity.kl_figure(found, spec, seed)


def _reward_models(reward: Path | None, judge: Path | None, spec: EvaluationSpec) -> dict[str, RewardModelFigures]:
    found = {
        name: sanity.reward_model_figures(folder, spec)
        for name, folder in (("reward", reward), ("judge", judge))
        if folder is not None
    }
    return {name: figures for name, figures in found.items() if figures is not None}


def _metrics(rows: Sequence[Row], held: _Held | None, spec: EvaluationSpec, seed: int) -> dict[str, Figure]:
    return {
        **harmlessness.rates(rows, spec),
        **helpfulness.means(rows, spec, seed),
        **(capability.figures(held.shown, spec, seed) if held and held.shown else {}),
        **(questions.figures(held.answered, spec) if held else {}),
        **sanity.figures(rows, spec, seed),
        **bias.gap(rows, spec),
    }


def _differences(
    candidate: Sequence[Row],
    other: Sequence[Row],
    held: _Held | None,
    others: _Held | None,
    unit: float | None,
    spec: EvaluationSpec,
    seed: int,
) -> dict[str, Figure]:
    return {
        **harmlessness.differences(candidate, other, spec),
        **helpfulness.differences(candidate, other, unit, spec, seed),
        **(
            capability.differences(held.shown, others.shown, spec, seed)
            if held and others and held.shown and others.shown
            else {}
        ),
        **(questions.differences(held.answered, others.answered, spec) if held and others else {}),
        **sanity.differences(candidate, other, spec, seed),
    }


def _samples(rows: Mapping[str, Sequence[Row]], spec: EvaluationSpec) -> list[Sample]:
    """The first prompts of each tag (their order is a seeded draw) with every model's answer."""
    samples = []
    for tag in TAGS:
        direct = [row for row in rows[CANDIDATE] if row.case.tag == tag and row.case.variant == DIRECT]
        for row in direct[: spec.samples_per_tag]:
            answers = {role: next((r for r in found if r.case.id == row.case.id), None) for role, found in rows.items()}
            samples.append(
                Sample(
                    prompt_id=row.case.prompt_id,
                    tag=tag,
                    hazard=row.case.hazard,
                    messages=[{"role": m["role"], "content": m["content"]} for m in row.case.messages],
                    answers={
                        role: Answer(
                            text=r.response.text, label=r.label, reward=r.judge_score, finished=r.response.finished
                        )
                        for role, r in answers.items()
                        if r is not None
                    },
                )
            )
    return samples


def _flat(evaluation: Evaluation) -> dict[str, float]:
    """The figures under names that a metrics store takes."""
    found = {
        f"evaluation/{role}/{name}": figure.estimate
        for role, model in evaluation.models.items()
        for name, figure in model.metrics.items()
    }
    found |= {
        f"evaluation/candidate_minus_{role}/{name}": figure.estimate
        for role, figures in evaluation.differences.items()
        for name, figure in figures.items()
    }
    return found
