"""Rollouts by vLLM, behind the same calls as `Generator`; imported only when a spec asks for it.

vLLM keeps a copy of the weights of its own on the GPU, which every update of the policy is pushed into. Its noise is
not that of `Generator`: a run with it is reproducible by its own seeds, as far as vLLM is. What PPO trains on is
unaffected, since log-probabilities are computed again by the model in training.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tunegate.data.records import Messages
from tunegate.errors import SpecError
from tunegate.observer import NullObserver, Observer
from tunegate.training.ppo_config import SamplingSpec
from tunegate.training.ranks import world
from tunegate.training.rollout import Completion, Generator


class VLLMGenerator:
    """Draws responses with vLLM.

    Attributes:
        own: The generator whose model, tokenizer and limits it stands for.
        chat: Its tokenizer and template; says which tokens stop a response.
        context: Longest prompt and response together (tokens).
    """

    def __init__(self, own: Generator, folder: str, *, memory: float) -> None:
        """Start the engine with the weights of a folder.

        Args:
            own: What it stands for; its weights are pushed by `refresh`.
            folder: Model folder that the engine starts from.
            memory: Share of the GPU that vLLM may take for weights and cache.

        Raises:
            SpecError: If vLLM is not installed, or several processes train together.
        """
        if world()[1] > 1:
            raise SpecError(
                "vLLM draws rollouts in one process only",
                key="ppo.generator",
                value="vllm",
                fix="set distributed.processes: 1, or ppo.generator: own",
            )
        # In a process of its own the engine could not be given this process's weights.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
        except ImportError as error:
            raise SpecError(
                "vLLM is not installed",
                key="ppo.generator",
                value="vllm",
                fix="pip install vllm (it needs a GPU), or set ppo.generator: own",
            ) from error
        self.own, self.chat, self.context = own, own.chat, own.context
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=folder,
            dtype="bfloat16" if next(own.model.parameters()).dtype == torch.bfloat16 else "float32",
            max_model_len=own.context,
            gpu_memory_utilization=memory,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            seed=0,
        )

    @torch.no_grad()
    def refresh(self, names: Sequence[str] | None = None) -> None:
        """Push the weights of `own` into the engine and drop what it has cached for the old ones.

        Args:
            names: Parameters that have changed; unset means all.
        """
        wanted = None if names is None else set(names)
        weights = [(n, p.detach()) for n, p in self.own.model.named_parameters() if wanted is None or n in wanted]
        self._engine.apply_model(lambda model: model.load_weights(iter(weights)))
        self._engine.reset_prefix_cache()

    def encode(self, prompt: Messages, sampling: SamplingSpec) -> list[int]:
        """See `Generator.encode`."""
        return self.own.encode(prompt, sampling)

    def generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        sampling: SamplingSpec,
        *,
        seed: Sequence[int],
        numbers: Sequence[int] | None = None,
        observer: Observer | None = None,
    ) -> list[Completion]:
        """See `Generator.generate_ids`."""
        numbers = numbers if numbers is not None else range(len(rows))
        parameters = [
            self._params(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=_row_seed(seed, number),
                stop_token_ids=list(self.chat.stop_ids),
                ignore_eos=True,  # the configured stop tokens say what ends a response, not the model's EOS
                logprobs=0,  # of the drawn token alone
                detokenize=False,
            )
            for number in numbers
        ]
        prompts = [{"prompt_token_ids": list(row)} for row in rows]
        outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        found = [self._completion(row, output.outputs[0]) for row, output in zip(rows, outputs, strict=True)]
        (observer or NullObserver()).progress(len(rows), len(rows), "response", "generating")
        return found

    def _completion(self, prompt: Sequence[int], output: Any) -> Completion:
        ids = [int(token) for token in output.token_ids]
        logprobs = [float(step[token].logprob) for token, step in zip(ids, output.logprobs, strict=True)]
        return Completion(
            text=self.chat.decode(ids),
            token_ids=ids,
            logprobs=logprobs,
            finished=bool(ids) and ids[-1] in set(self.chat.stop_ids),
            prompt_tokens=len(prompt),
        )


def _row_seed(seed: Sequence[int], number: int) -> int:
    """One seed for a row, a pure function of which draw it is and of its number."""
    return int(np.random.SeedSequence([*seed, number]).generate_state(1)[0])
