"""Sample with vLLM inside the training process, from a copy of the weights that follows every update."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from calibadv.distributed import ProcessGroup
from calibadv.engines._partial_completion import PartialCompletion
from calibadv.engines._vllm_process import error_summary, vllm_environment
from calibadv.errors import UserError
from calibadv.interfaces import StreamingEngine
from calibadv.numerics.rng import request_seed
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import Completion, DrawKey, Sampling

if TYPE_CHECKING:
    from vllm import LLM

Dtype = Literal["float32", "bfloat16", "float16"]


class VLLMEngine(StreamingEngine):
    """Sample with vLLM in the training process; needs the extra ``vllm``.

    vLLM is started at the first ``sync``, with prefix caching, so that a turn does not compute its prompt again. It
    gets and gives token ids only: where a message ends is decided on its tokens as they come, as for every engine, and
    no sampling setting of the model folder is read. After an update the weights are copied from memory to memory, with
    adapters merged. Each request has a seed of its own, but a draw may change where other requests share its batch.
    Temperatures end at 2.

    In a run of several processes each has its own vLLM, on its own GPU. ``tensor_parallel_size`` above 1 is for a run
    of one process: the weights then travel to the workers through the memory of the host. vLLM's transfers between
    GPUs (NCCL, CUDA IPC) are not used.

    Args:
        max_model_len: the most tokens of a rollout, prompt included; the model's own limit by default. It must reach
            ``protocol.max_rollout_tokens``.
        dtype: of vLLM's copy of the weights and of its cache.
        gpu_memory_utilization: share of the GPU's memory (of the machine's, on a CPU) for vLLM's weights and cache; the
            rest is the trainer's.
        kv_cache_gib: memory of the key-value cache in GiB, in place of the share above.
        tensor_parallel_size: GPUs over which a layer is spread.
        enforce_eager: start faster and sample slower: compile nothing, capture no CUDA graphs.
        sleep: between sampling phases, move vLLM's weights to the memory of the host and free its cache. GPUs only.
    """

    def __init__(
        self,
        max_model_len: int | None = None,
        dtype: Dtype = "bfloat16",
        gpu_memory_utilization: float = 0.4,
        kv_cache_gib: float | None = None,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        sleep: bool = False,
    ) -> None:
        for name, value in (("max_model_len", max_model_len), ("tensor_parallel_size", tensor_parallel_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 < gpu_memory_utilization <= 1:
            raise UserError(f"gpu_memory_utilization is {gpu_memory_utilization}; it must be above 0 and at most 1")
        if kv_cache_gib is not None and kv_cache_gib <= 0:
            raise UserError(f"kv_cache_gib is {kv_cache_gib}; it must be above 0")
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_gib = kv_cache_gib
        self.tensor_parallel_size = tensor_parallel_size
        self.enforce_eager = enforce_eager
        self.sleep = sleep
        self._llm: LLM | None = None
        self._tokenizer: AgentTokenizer | None = None
        self._asleep = False
        self._numbers = count()
        self._partial: dict[int, PartialCompletion] = {}

    @override
    def validate(self) -> None:
        if find_spec("vllm") is None:
            raise UserError("VLLMEngine needs vLLM, which is not installed; run: pip install 'calibadv[vllm]'")
        processes = ProcessGroup.current()
        if processes.size > 1 and self.tensor_parallel_size > 1:
            raise UserError(
                f"tensor_parallel_size is {self.tensor_parallel_size} and {processes.size} processes train; it must be "
                "1 where there are several, or take calibadv.engines.VLLMServerEngine"
            )

    @override
    def sync(self, policy: Policy) -> None:
        if self._llm is None:
            self._llm = self._start(policy)
            self.max_model_len = self._llm.model_config.max_model_len
        self._tokenizer = policy.tokenizer
        self._wake()
        weights: Any = policy.weights()
        if self.tensor_parallel_size > 1:  # the workers are other processes
            weights = [(name, tensor.cpu()) for name, tensor in weights]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        assert self._llm.reset_prefix_cache(), "no request is under way between two phases"

    @override
    def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]) -> list[int]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        assert self._llm is not None, "sync comes before submit"
        self._wake()
        numbers = []
        for prompt, key in zip(prompts, keys, strict=True):
            # Top-k, top-p, min-p and penalties are off unless they are set here: the draw is from the whole softmax.
            parameters = SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                seed=request_seed(key),
                logprobs=0,  # of the drawn token alone
                detokenize=False,
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
            )
            number = next(self._numbers)
            self._llm.llm_engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, parameters)
            self._partial[number] = PartialCompletion()
            numbers.append(number)
        return numbers

    @override
    def collect(self) -> dict[int, Completion]:
        if not self._partial:
            return {}
        assert self._llm is not None
        assert self._tokenizer is not None
        done: dict[int, Completion] = {}
        stopped: list[str] = []
        for output in self._llm.llm_engine.step():
            number, drawn = int(output.request_id), output.outputs[0]
            partial = self._partial[number]
            logprobs = [of[token].logprob for token, of in zip(drawn.token_ids, drawn.logprobs or (), strict=True)]
            partial.extend(drawn.token_ids, logprobs, self._tokenizer)
            if partial.reason is None and not output.finished:
                continue
            if not output.finished:
                stopped.append(output.request_id)
            done[number] = self._partial.pop(number).completion()
        self._llm.llm_engine.abort_request(stopped)
        return done

    @override
    def release(self) -> None:
        if self._llm is None:
            return
        self._llm.llm_engine.abort_request([str(number) for number in self._partial])
        self._partial.clear()
        if self.sleep and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            assert self._llm is not None
            self._llm.wake_up()
            self._asleep = False

    def _start(self, policy: Policy) -> LLM:
        self.validate()
        processes = ProcessGroup.current()
        with vllm_environment(processes):
            from vllm import LLM
            from vllm.platforms import current_platform

            model: Any = policy.model
            config = copy.deepcopy(model.config)
            on_cpu = current_platform.is_cpu()
            if on_cpu:  # there vLLM packs a tied output layer once and would never update it
                config.tie_word_embeddings = False
            try:
                with tempfile.TemporaryDirectory() as folder:
                    config.save_pretrained(folder)
                    return LLM(
                        # The folder's name is part of the key under which compiled code is kept for the next run.
                        model=model.name_or_path or folder,
                        hf_config_path=folder,
                        load_format="dummy",  # the weights come from memory, at once
                        skip_tokenizer_init=True,
                        generation_config="vllm",
                        logprobs_mode="processed_logprobs",  # of softmax(logits / temperature)
                        enable_prefix_caching=True,
                        # On a CPU, vLLM cannot take back the draw of a request with a seed whose prompt it has cut.
                        enable_chunked_prefill=False if on_cpu else None,
                        max_model_len=self.max_model_len,
                        dtype=self.dtype,
                        gpu_memory_utilization=self.gpu_memory_utilization,
                        kv_cache_memory_bytes=self.kv_cache_gib and int(self.kv_cache_gib * 2**30),
                        tensor_parallel_size=self.tensor_parallel_size,
                        enforce_eager=self.enforce_eager,
                        enable_sleep_mode=self.sleep,
                        distributed_executor_backend="external_launcher" if processes.size > 1 else None,
                    )
            except (ValueError, NotImplementedError) as error:
                raise UserError(
                    f"vLLM does not take this policy, or these settings of model.engine ({error_summary(error)}); "
                    "change them, or sample with calibadv.engines.TransformersEngine"
                ) from error
