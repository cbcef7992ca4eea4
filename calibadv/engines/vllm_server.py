"""Sample from a running vLLM server, on other GPUs or another machine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from calibadv.distributed import ProcessGroup
from calibadv.engines._partial_completion import PartialCompletion
from calibadv.engines.vllm import Dtype
from calibadv.errors import ServiceError, UserError
from calibadv.interfaces import StreamingEngine
from calibadv.numerics.rng import request_seed
from calibadv.policy.policy import Policy
from calibadv.policy.tokenizer import AgentTokenizer
from calibadv.types import Completion, DrawKey, Sampling

_POLL_SECONDS = 0.02  # that collect waits; a search that comes back meanwhile waits no longer


class VLLMServerEngine(StreamingEngine):
    """Sample from a vLLM server that runs with this policy's folder.

    Start it with the routes that change weights, and with the log-probabilities of what was really drawn from:
    ``VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs``. Those routes obey anyone who
    reaches them: keep the server in a network of your own. No sampling setting of its folder is used.

    After an update the weights are written to a folder, with adapters merged, and the server loads them from there;
    vLLM's transfers between GPUs (NCCL, CUDA IPC) are not used. On a CPU, vLLM 0.32 never updates an output layer that
    is tied to the embedding, and fails where it cuts a prompt: there, serve a folder whose config.json says
    ``"tie_word_embeddings": false``, with ``--no-enable-chunked-prefill``.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        weights_folder: folder in which weights are handed over; the server must see it under the same path.
        dtype: of the weights that are handed over; the server's.
        concurrency: the most requests under way; the server's ``--max-num-seqs`` keeps it busy.
        timeout: seconds after which a request, or loading the weights, counts as failed.
    """

    def __init__(
        self, url: str, weights_folder: str, dtype: Dtype = "bfloat16", concurrency: int = 256, timeout: float = 600.0
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"url is '{url}'; give the server's address, with http:// or https://")
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}; it must be at least 1")
        if timeout <= 0:
            raise UserError(f"timeout is {timeout}; it must be above 0 seconds")
        self.url = url.rstrip("/")
        self.weights_folder = Path(weights_folder)
        self.dtype = dtype
        self.concurrency = concurrency
        self.timeout = timeout
        self._model = ""
        self._tokenizer: AgentTokenizer | None = None
        self._numbers = count()
        self._versions = count()
        self._requests: dict[Future[Completion], int] = {}

    @override
    def validate(self) -> None:
        served = self._call("GET", "/v1/models")["data"][0]
        mode = self._call("GET", "/server_info?config_format=json")["vllm_config"]["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise UserError(
                f"the vLLM server at {self.url} gives {mode}, which leave the temperature out; "
                "start it with --logprobs-mode processed_logprobs"
            )
        self._model, self.max_model_len = served["id"], served["max_model_len"]

    @override
    def sync(self, policy: Policy) -> None:
        self._tokenizer = policy.tokenizer
        if not self._model:
            self.validate()
        processes = ProcessGroup.current()
        weights: dict[str, Tensor] = {}
        for name, tensor in policy.weights():  # sharded ones are put together on all processes at once
            if processes.rank == 0:
                weights[name] = tensor.to("cpu", getattr(torch, self.dtype), copy=True).contiguous()
        failures = processes.gather(self._load_weights(weights) if processes.rank == 0 else "")
        if any(failures):
            raise ServiceError(max(failures))

    @override
    def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[DrawKey]) -> list[int]:
        numbers = []
        for prompt, key in zip(prompts, keys, strict=True):
            number = next(self._numbers)
            self._requests[self._executor.submit(self._complete, list(prompt), sampling, key)] = number
            numbers.append(number)
        return numbers

    @override
    def collect(self) -> dict[int, Completion]:
        done, _ = wait(self._requests, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        return {self._requests.pop(request): request.result() for request in done}

    @override
    def release(self) -> None:
        for request in self._requests:
            request.cancel()
        wait(self._requests)
        self._requests.clear()

    @cached_property
    def _client(self) -> Any:
        import urllib3

        # A request that failed half-way is not sent again: its answer would count twice against the server's time.
        timeout = urllib3.Timeout(connect=min(10.0, self.timeout), read=self.timeout)
        return urllib3.PoolManager(maxsize=self.concurrency, block=True, timeout=timeout, retries=False)

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.concurrency, thread_name_prefix="vllm")

    def _call(self, method: str, route: str, body: dict[str, Any] | None = None) -> Any:
        from urllib3.exceptions import HTTPError

        try:
            response = self._client.request(method, self.url + route, json=body)
        except HTTPError as error:
            raise ServiceError(f"the vLLM server at {self.url}{route} does not answer ({error}); is it up?") from error
        if response.status != 200:
            body_text = " ".join(response.data.decode(errors="replace").split())[:300]
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if response.status == 404 else ""
            raise ServiceError(f"the vLLM server at {self.url}{route} answered {response.status}: {body_text}{hint}")
        return response.json()

    def _load_weights(self, weights: dict[str, Tensor]) -> str:
        """Have the server load these weights; returns the error, which all processes must raise, or an empty text."""
        from safetensors.torch import save_file

        folder = self.weights_folder / f"weights-{next(self._versions):06d}"
        unfinished = folder.with_suffix(".part")
        try:
            for old in (folder, unfinished):
                shutil.rmtree(old, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
            unfinished.rename(folder)  # the server sees all of it, or nothing; no power cut is to be outlived
            request = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
            self._call("POST", "/collective_rpc", request)
            if not self._call("POST", "/reset_prefix_cache")["success"]:
                return f"the vLLM server at {self.url} works for others too: it cannot drop what old weights computed"
        except (ServiceError, OSError) as error:
            return str(error)
        finally:
            for old in (folder, unfinished):
                shutil.rmtree(old, ignore_errors=True)
        return ""

    def _complete(self, prompt: list[int], sampling: Sampling, key: DrawKey) -> Completion:
        assert self._tokenizer is not None, "sync comes before submit"
        assert self.max_model_len is not None
        request = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": min(sampling.max_tokens, self.max_model_len - len(prompt)),
            "temperature": sampling.temperature,
            "seed": request_seed(key),
            # All of them, since the server fills the gaps from the folder's generation config.
            **{"top_k": 0, "top_p": 1.0, "min_p": 0.0},
            **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
            "ignore_eos": True,
            "stop_token_ids": sorted(self._tokenizer.end_ids),
            "stop": list(self._tokenizer.stop_strings),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        }
        (choice,) = self._call("POST", "/v1/completions", request)["choices"]
        partial = PartialCompletion()
        partial.extend(choice["token_ids"], choice["logprobs"]["token_logprobs"], self._tokenizer)
        if partial.reason is None and choice["finish_reason"] != "length":
            raise ServiceError(
                f"the vLLM server at {self.url} ended a message ({choice['finish_reason']}) that ends in "
                f"{self._tokenizer.decode(partial.token_ids)[-40:]!r}; is its folder that of model.policy?"
            )
        return partial.completion()
