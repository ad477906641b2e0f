"""`TuneSpec`: everything that shapes a run, one section a stage, checked before any work starts."""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from tunegate.data.config import DataSpec
from tunegate.errors import SpecError
from tunegate.evaluation.config import EvaluationSpec
from tunegate.gates.config import GatesSpec
from tunegate.registry.config import RegistrySpec
from tunegate.resources import ResourcesSpec
from tunegate.section import Section
from tunegate.storage.config import StorageSpec
from tunegate.storage.manifest import digest_json
from tunegate.tracking.config import TrackingSpec
from tunegate.training.config import DistributedSpec, ModelSpec, RewardSpec, SFTSpec
from tunegate.training.dpo_config import DPOSpec
from tunegate.training.ppo_config import PPOSpec

PROFILES = ("smoke", "demo")
_BIAS_FILES = ("questions", "template_files")


class CostSpec(Section):
    """What an hour of the machine costs, so that plan and report can show money."""

    hourly_price: float = Field(default=0.0, ge=0)
    """Price of one hour of the machine that a stage runs on, in `currency`; 0 shows time only."""

    currency: str = "USD"
    """Name of the currency, for display."""


class TuneSpec(Section):
    """A run of the `instruction-tuning` pipeline."""

    schema_version: Literal[1] = 1
    """Version of this format."""

    name: str = Field(default="instruction-tuning", min_length=1, max_length=80)
    """Name of the run, shown in MLflow and in the report."""

    seed: int = Field(default=17, ge=0, lt=2**31)
    """The one seed that every other seed of the run is derived from."""

    model: ModelSpec = ModelSpec()
    """The base model."""

    data: DataSpec = DataSpec()
    """Sources, mixture, splits and checks."""

    sft: SFTSpec = SFTSpec()
    """Stage 1: supervised fine-tuning."""

    reward: RewardSpec = RewardSpec()
    """Stage 2: the reward model."""

    ppo: PPOSpec = PPOSpec()
    """Stage 3: RLHF by PPO."""

    last_stage: Literal["ppo", "grpo", "rloo", "dpo"] = "ppo"
    """What the third stage does: `ppo`, `grpo` or `rloo` (section `ppo`: rollouts scored by the reward model), or `dpo`
    (section `dpo`: the preferences themselves, without rollouts)."""

    dpo: DPOSpec = DPOSpec()
    """Stage 3, with `last_stage: dpo`."""

    distributed: DistributedSpec = DistributedSpec()
    """How many processes train together; does not change what is learned."""

    evaluation: EvaluationSpec = EvaluationSpec()
    """What is measured on base, SFT and candidate."""

    gates: GatesSpec = GatesSpec()
    """Limits and margins that decide about promotion."""

    registry: RegistrySpec = RegistrySpec()
    """Where and under which name the candidate is registered."""

    tracking: TrackingSpec = TrackingSpec()
    """Where numbers are logged."""

    storage: StorageSpec = StorageSpec()
    """Where artifacts and run records are kept."""

    resources: ResourcesSpec = ResourcesSpec()
    """What the pods of a cluster get; does not change what is computed, and is ignored on one machine."""

    cost: CostSpec = CostSpec()
    """Prices for plan and report."""

    @model_validator(mode="after")
    def _one_algorithm(self) -> Self:
        if self.ppo.algorithm != "ppo" and self.ppo.algorithm != self.last_stage:
            raise ValueError(
                f"ppo.algorithm is {self.ppo.algorithm!r}, but last_stage is {self.last_stage!r}; set last_stage: "
                f"{self.ppo.algorithm} and leave ppo.algorithm out"
            )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        """Heads of the reward model name sources that exist, every source belongs to one, and a cost is one of them."""
        heads = self.reward.heads
        if heads:
            given = {source.name for kind in ("preferences", "ratings") for source in getattr(self.data, kind)}
            named = {source for head in heads for source in head.sources}
            if unknown := sorted(named - given):
                raise ValueError(
                    f"reward.heads: there is no source {', '.join(unknown)} of preferences or ratings; "
                    f"there are {', '.join(sorted(given)) or 'none'} (set name: of a source)"
                )
            if homeless := sorted(given - named):
                raise ValueError(f"reward.heads: the source {', '.join(homeless)} belongs to no head; name it in one")
        cost = self.ppo.cost.head if self.ppo.cost is not None else None
        if cost is not None and cost not in {head.name for head in heads if head.kind == "cost"}:
            raise ValueError(f"ppo.cost.head: reward.heads has no head {cost!r} of kind 'cost'; add it")
        return self

    @property
    def rollouts(self) -> PPOSpec:
        """The section `ppo` with the algorithm that `last_stage` names."""
        algorithm = "ppo" if self.last_stage == "dpo" else self.last_stage
        return self.ppo.model_copy(update={"algorithm": algorithm})

    def digest(self, sections: Iterable[str] | None = None) -> str:
        """The sha256 of the spec, or of some of its sections."""
        content = self.model_dump(mode="json")
        if sections is not None:
            content = {name: content[name] for name in sections}
        return digest_json(content)

    def stage_seed(self, stage: str) -> int:
        """The seed of a stage: derived from `seed` and the stage's name, so that stages do not share streams."""
        return int(digest_json([self.seed, stage])[:8], 16) & 0x7FFFFFFF


def read_spec_mapping(text: str, origin: str) -> dict[str, Any]:
    """Parse YAML (or JSON) into a mapping.

    Raises:
        SpecError: It is not YAML, has duplicate keys, or is not a mapping.
    """
    try:
        content = yaml.load(io.StringIO(text), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark else origin
        problem = getattr(error, "problem", None) or str(error)
        raise SpecError(f"the spec is not valid YAML: {problem}", key=where, fix="correct that line") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SpecError(
            "a spec is a mapping of sections", key=origin, value=type(content).__name__, fix="start from: tunegate init"
        )
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, since YAML would silently keep the last one."""


def _construct_unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique_mapping)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn `["ppo.steps=40", "sft.method=lora"]` into a nested mapping; values are read as YAML.

    Raises:
        SpecError: An assignment has no `=` or no key.
    """
    content: dict[str, Any] = {}
    for text in assignments:
        path, separator, raw = text.partition("=")
        if not separator or not path.strip():
            raise SpecError("an override is written key=value", key="--set", value=text, fix="--set ppo.steps=40")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError:
            value = raw
        nested: Any = value
        for part in reversed(path.strip().split(".")):
            nested = {part: nested}
        content = merge(content, nested)
    return content


def profile_mapping(profile: str) -> dict[str, Any]:
    """The spec that a profile stands for.

    Raises:
        SpecError: There is no such profile.
    """
    if profile not in PROFILES:
        near = difflib.get_close_matches(profile, PROFILES, 1)
        raise SpecError(
            "there is no such profile",
            key="--profile",
            value=profile,
            fix=f"{near[0]}?" if near else f"one of {', '.join(PROFILES)}",
        )
    text = (resources.files("tunegate") / "profiles" / f"{profile}.yaml").read_text()
    return read_spec_mapping(text, f"profile {profile}")


def build_spec(*layers: Mapping[str, Any], origin: str = "spec") -> TuneSpec:
    """Merge the layers (later ones win) and check the whole.

    Raises:
        SpecError: Unknown keys, wrong values or impossible combinations; all of them are named.
    """
    content: dict[str, Any] = {}
    for layer in layers:
        content = merge(content, layer)
    try:
        return TuneSpec.model_validate(content)
    except ValidationError as error:
        raise SpecError(_explain(error), key=origin) from None


def load_spec(
    path: Path | None = None,
    *,
    profile: str | None = None,
    assignments: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> TuneSpec:
    """Read a spec file on top of a profile, apply overrides, make relative data paths absolute.

    Raises:
        SpecError: The file is missing or the result is not a valid spec.
    """
    layers: list[Mapping[str, Any]] = []
    if profile:
        layers.append(profile_mapping(profile))
    base_dir = Path.cwd()
    if path is not None:
        try:
            text = path.read_text()
        except FileNotFoundError:
            raise SpecError(
                "there is no such file", key="SPEC", value=str(path), fix="tunegate init writes one to start from"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"the file cannot be read: {error}", key="SPEC", value=str(path)) from None
        layers.append(read_spec_mapping(text, str(path)))
        base_dir = path.parent
    layers.append(parse_assignments(assignments))
    layers.append(overrides or {})
    return resolve_paths(build_spec(*layers, origin=str(path or profile or "spec")), base_dir)


def resolve_paths(spec: TuneSpec, base_dir: Path) -> TuneSpec:
    """Make the relative paths of data sources, evaluation sets, model folder and storage root absolute.

    Others are left as they are. The paths of files and of the model are relative to the spec's folder, the storage root
    to the working directory.
    """
    data: dict[str, Any] = {}
    for kind in ("sft", "preferences", "ratings", "prompts", "evaluation"):
        sources = getattr(spec.data, kind)
        data[kind] = [s.model_copy(update={"uri": _absolute(s.uri, base_dir)}) for s in sources]
    bias = {key: tuple(_absolute(u, base_dir) for u in getattr(spec.evaluation.bias, key)) for key in _BIAS_FILES}
    tasks = tuple(_absolute(u, base_dir) for u in spec.evaluation.capability.task_files)
    root = spec.storage.root
    model_source = spec.model.source
    if model_source.startswith(("./", "../", "~")) or (base_dir / model_source).is_dir():
        model_source = _absolute(model_source, base_dir)
    return spec.model_copy(
        update={
            "data": spec.data.model_copy(update=data),
            "evaluation": spec.evaluation.model_copy(
                update={
                    "bias": spec.evaluation.bias.model_copy(update=bias),
                    "capability": spec.evaluation.capability.model_copy(update={"task_files": tasks}),
                }
            ),
            "model": spec.model.model_copy(update={"source": model_source}),
            "storage": spec.storage.model_copy(update={"root": _absolute(root, Path.cwd())}),
        }
    )


def _absolute(uri: str, base_dir: Path) -> str:
    if uri.startswith(("hf://./", "hf://../")):
        return f"hf://{(base_dir / uri.removeprefix('hf://')).absolute()}"
    head = uri.split("/", 1)[0]
    if ":" in head:  # s3://…, starter:…, hf://…
        return uri
    path = Path(uri).expanduser()
    return str(path if path.is_absolute() else (base_dir / path).absolute())


def dump_spec(spec: TuneSpec) -> str:
    """The whole spec as YAML, defaults included."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def spec_schema() -> str:
    """The JSON schema of the spec, as published in docs/spec.schema.json."""
    return json.dumps(TuneSpec.model_json_schema(), indent=2) + "\n"


def commented_spec(layer: Mapping[str, Any]) -> str:
    """A spec file to start from: every key with its description; the values of `layer` set, all others commented out.

    Args:
        layer: The values to set, e.g. those of a profile.
    """
    lines = ["# Tunegate run spec. Commented keys show their defaults. Check with: tunegate validate THIS_FILE", ""]
    _comment_section(TuneSpec, layer, lines, indent=0)
    return "\n".join(lines) + "\n"


def _comment_section(section: type[BaseModel], layer: Mapping[str, Any], lines: list[str], indent: int) -> None:
    pad = "  " * indent
    for name, field in section.model_fields.items():
        for text in (field.description or "").splitlines():
            lines.append(f"{pad}# {text.strip()}")
        default = field.get_default(call_default_factory=True)
        nested = _section_of(field.annotation)
        given = layer.get(name)
        if nested is not None and (isinstance(given, Mapping) or isinstance(default, BaseModel)):
            lines.append(f"{pad}{name}:" if isinstance(given, Mapping) and given else f"{pad}# {name}:")
            _comment_section(nested, given if isinstance(given, Mapping) else {}, lines, indent + 1)
        else:
            value = given if name in layer else _plain(default)
            text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=100).rstrip()
            prefix = pad if name in layer else f"{pad}# "
            lines.extend(prefix + line for line in text.splitlines())
        if indent == 0:
            lines.append("")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _explain(error: ValidationError) -> str:
    """One line a mistake: key, what is wrong, what was given, what would be right."""
    lines = []
    for item in error.errors():
        # Discriminator and union members show up in `loc` as type names; only real keys help the reader.
        location = [p for p in item["loc"] if not (isinstance(p, str) and p[:1].isupper())]
        key = ".".join(str(p) for p in location) or "spec"
        given = item.get("input")
        shown = "" if isinstance(given, (dict, list)) else f" (got {given!r})"
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(location[-1]), _known_keys(location[:-1]), 1)
            known = ", ".join(sorted(_known_keys(location[:-1])))
            hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {known}"
            lines.append(f"{key}: unknown key; {hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message[:1].lower()}{message[1:]}{shown}")
    head = "the spec has a mistake" if len(lines) == 1 else f"the spec has {len(lines)} mistakes"
    return f"{head}:\n  - " + "\n  - ".join(lines)


def _known_keys(location: Sequence[Any]) -> list[str]:
    section: type[BaseModel] | None = TuneSpec
    for part in location:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return []
        section = _section_in(section.model_fields[part].annotation)
    return list(section.model_fields) if section else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for candidate in get_args(annotation):
        if (found := _section_in(candidate)) is not None:
            return found
    return None
