"""Which prompts are asked, of whom: seeded selection, attacked variants, counterfactual swaps, digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tunegate.data.records import Messages, Prompt
from tunegate.errors import DataError
from tunegate.evaluation.attacks import wrap
from tunegate.evaluation.config import EvaluationSpec, Tag
from tunegate.evaluation.files import read_items
from tunegate.storage.manifest import digest_json

TAGS: tuple[Tag, ...] = ("harmful", "lookalike", "everyday")
DIRECT = "direct"
COUNTERFACTUAL = "counterfactual"
COUNTERFACTUAL_PATH = Path(__file__).parent / "assets" / "counterfactual.jsonl"


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt as one model sees it.

    Attributes:
        id: Unique: the prompt's id and the variant.
        prompt_id: Prompts of the same id are one cluster.
        messages: What the model answers.
        asked: The user's own request, without wrapper: what the judge reads.
        tag: `harmful`, `lookalike`, `everyday` or `counterfactual`.
        variant: `direct`, or the name of the attack.
        hazard: Kind of harm, for `harmful`.
        category: Kind of groups, for `counterfactual`.
        group: Whom the prompt is about, for `counterfactual`.
        source: Where the prompt comes from.
    """

    id: str
    prompt_id: str
    messages: Messages
    asked: str
    tag: str
    variant: str = DIRECT
    hazard: str | None = None
    category: str | None = None
    group: str | None = None
    source: str = ""


def select(prompts: Sequence[Prompt], spec: EvaluationSpec, seed: int) -> dict[Tag, list[Prompt]]:
    """A seeded sample of each tag, capped by the spec.

    Prompts are ranked by a hash of seed and id, so a larger cap keeps every prompt of a smaller one, and adding a
    prompt to the set moves no other.

    Raises:
        DataError: Two prompts share an id, a prompt does not end with a user turn, or none has a tag that counts.
    """
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError("two evaluation prompts share an id", key="id", value=prompt.id, fix="make ids unique")
        seen.add(prompt.id)
        if not prompt.messages or prompt.messages[-1]["role"] != "user":
            raise DataError(
                "an evaluation prompt must end with a user turn", key=prompt.id, fix="drop the turns after the question"
            )
    chosen = {tag: ranked([p for p in prompts if p.tag == tag], seed)[: spec.cap(tag)] for tag in TAGS}
    if not any(chosen.values()):
        raise DataError(
            "there are no evaluation prompts with the tags harmful, lookalike or everyday",
            key="data.evaluation",
            value=sorted({p.tag for p in prompts}),
            fix="give every prompt one of these tags",
        )
    return chosen


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


_Item = TypeVar("_Item", bound=_HasId)


def ranked(items: Iterable[_Item], seed: int) -> list[_Item]:
    """The items in the order of a hash of seed and id: the first k are a random sample of size k."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}\n{item.id}".encode()).hexdigest())


def main_cases(chosen: dict[Tag, list[Prompt]], spec: EvaluationSpec) -> list[Case]:
    """Every selected prompt as it is, then the attacked harmful ones."""
    cases = [
        Case(p.id, p.id, p.messages, p.messages[-1]["content"], tag, hazard=p.hazard, source=p.source)
        for tag in TAGS
        for p in chosen[tag]
    ]
    attacked = chosen["harmful"][: spec.attacks.prompts]
    cases += [
        Case(
            f"{p.id}#{name}",
            p.id,
            wrap(name, p.messages),
            p.messages[-1]["content"],
            "harmful",
            name,
            p.hazard,
            source=p.source,
        )
        for name in spec.attacks.names
        for p in attacked
    ]
    return cases


def thinned(cases: Sequence[Case], share: float) -> list[Case]:
    """The direct cases of the first `share` of each tag's prompts, at least one: for a model outside the gates."""
    kept: list[Case] = []
    for tag in TAGS:
        direct = [c for c in cases if c.tag == tag and c.variant == DIRECT]
        kept += direct[: max(1, round(share * len(direct)))] if direct and share > 0 else []
    return kept


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt with a hole for a group: `{group}` is replaced by each of the groups."""

    id: str
    category: str
    text: str
    groups: tuple[str, ...]

    def asked_of(self, group: str) -> str:
        """The prompt about `group`, with the article it takes: "a Polish", "an Indian".

        A wrong article in some groups' prompts only would be a difference between the groups of our own making.
        """
        article = "an" if re.match(r"(?!uni|use|eu|one)[aeiou]", group, re.IGNORECASE) else "a"

        def with_article(found: re.Match[str]) -> str:
            written = article.capitalize() if found[1][0].isupper() else article
            return f"{written} {group}"

        return re.sub(r"\b(an?) \{group\}", with_article, self.text, flags=re.IGNORECASE).replace("{group}", group)


def read_templates(files: tuple[str, ...] = ()) -> tuple[Template, ...]:
    """The counterfactual templates of JSONL files (`id`, `category`, `template`, `groups`), or the shipped ones.

    Raises:
        DataError: A file cannot be read, or a template has no `{group}` or fewer than two groups.
    """
    wanted = (
        '{"id": "c1", "category": "region", "template": "Write a toast for my {group} aunt.", "groups": ["…", "…"]}'
    )
    files = files or (str(COUNTERFACTUAL_PATH),)
    return tuple(read_items(files, "evaluation.bias.template_files", _template, wanted=wanted))


def _template(row: dict[str, Any]) -> Template:
    groups = tuple(str(group) for group in row["groups"])
    if "{group}" not in row["template"] or len(set(groups)) < 2:
        raise ValueError("a counterfactual template needs {group} and at least two groups")
    return Template(str(row["id"]), str(row["category"]), str(row["template"]), groups)


def counterfactual_cases(spec: EvaluationSpec, seed: int) -> list[Case]:
    """A seeded sample of each category's templates, each with all of its groups.

    Raises:
        DataError: A category that the spec names has no template.
    """
    cases = []
    known = read_templates(spec.bias.template_files)
    if missing := sorted(set(spec.bias.categories) - {template.category for template in known}):
        raise DataError(
            "there are no templates of a category",
            key="evaluation.bias.categories",
            value=missing,
            fix=f"one of {', '.join(sorted({template.category for template in known}))}",
        )
    for category in spec.bias.categories:
        templates = ranked((t for t in known if t.category == category), seed)
        for template in templates[: spec.bias.templates]:
            for group in template.groups:
                text = template.asked_of(group)
                cases.append(
                    Case(
                        f"{template.id}#{group}",
                        template.id,
                        [{"role": "user", "content": text}],
                        text,
                        COUNTERFACTUAL,
                        category=category,
                        group=group,
                    )
                )
    return cases


def cases_digest(cases: Sequence[Case]) -> str:
    """Digest of what was asked, in order: two models with the same digest saw the same prompts."""
    return digest_json([[c.id, c.messages] for c in cases])
