"""The engine that samples from a vLLM server: against a server that the test makes up, and against a real one."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import urllib3
from safetensors.torch import load_file
from support.agents import SEARCH, agent_of, play, teach
from support.models import byte_level_folder
from support.samplers import change, greedy_as_transformers, keys, own, prompts_of, widen

from calibadv.engines import VLLMServerEngine
from calibadv.engines._stop import stop_reason
from calibadv.numerics.rng import request_seed
from calibadv.policy.loading import load_policy
from calibadv.policy.lora import Lora
from calibadv.policy.policy import Policy
from calibadv.types import Sampling, StopReason

Body = dict[str, Any]
Reply = tuple[int, Body]


class Server:
    """Answers as vLLM's routes do; the test replaces routes."""

    def __init__(self) -> None:
        config = {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}}
        self.routes: dict[str, Callable[[Body], Reply]] = {
            "/v1/models": lambda _: (200, {"data": [{"id": "served", "max_model_len": 600}]}),
            "/server_info?config_format=json": lambda _: (200, config),
            "/collective_rpc": lambda _: (200, {"results": [None]}),
            "/reset_prefix_cache": lambda _: (200, {"success": True}),
        }
        self.asked: list[tuple[str, Body]] = []
        self.url = ""

    def answer(self, route: str, body: Body) -> Reply:
        self.asked.append((route, body))
        return self.routes.get(route, lambda _: (404, {"detail": "Not Found"}))(body)

    def completes(self, token_ids: list[int], finish_reason: str = "stop") -> None:
        logprobs = {"token_logprobs": [-0.5] * len(token_ids)}
        choice = {"token_ids": token_ids, "logprobs": logprobs, "finish_reason": finish_reason}
        self.routes["/v1/completions"] = lambda _: (200, {"choices": [choice]})


@pytest.fixture
def server() -> Iterator[Server]:
    made_up = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            status, reply = made_up.answer(self.path, json.loads(body) if body else {})
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        made_up.url = f"http://127.0.0.1:{listening.server_port}"
        Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
        yield made_up
        listening.shutdown()


@pytest.fixture(scope="module")
def policy(llama_folder: Path) -> Policy:
    return load_policy(str(llama_folder))


def connected(server: Server, policy: Policy, folder: Path, **settings: Any) -> VLLMServerEngine:
    engine = VLLMServerEngine(server.url, str(folder / "weights"), **{"dtype": "float32", **settings})
    engine.sync(policy)
    return engine


def test_the_server_gets_whole_weights_and_forgets_what_it_computed_with_others(
    server: Server, llama_folder: Path, tmp_path: Path
) -> None:
    policy = load_policy(str(llama_folder), Lora(rank=2))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    loaded: list[dict[str, torch.Tensor]] = []

    def load(body: Body) -> Reply:
        assert body["method"] == "reload_weights"
        (file,) = Path(body["kwargs"]["weights_path"]).iterdir()
        loaded.append(load_file(file))
        return 200, {"results": [None]}

    server.routes["/collective_rpc"] = load
    engine = connected(server, policy, tmp_path)
    engine.sync(policy)
    assert [route for route, _ in server.asked][-4:] == ["/collective_rpc", "/reset_prefix_cache"] * 2
    merged = policy.model.merge_and_unload().state_dict()  # type: ignore[operator]
    for weights in loaded:
        assert set(weights) == set(merged)  # the tied output layer under its own name too
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, merged[name])
    assert list((tmp_path / "weights").iterdir()) == []  # nothing is left behind


def test_what_the_server_is_asked_for(server: Server, policy: Policy, tmp_path: Path) -> None:
    engine = connected(server, policy, tmp_path)
    server.completes(policy.tokenizer.encode("no")[:1], finish_reason="length")
    (key,) = keys(5)
    engine.generate([[1, 2, 3]], Sampling(0.7, max_tokens=24), [key])
    route, request = server.asked[-1]
    assert route == "/v1/completions"
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert request.items() >= {"prompt": [1, 2, 3], "temperature": 0.7, "max_tokens": 24, **neutral}.items()
    assert request["seed"] == request_seed(key)
    engine.generate([[1] * 590], Sampling(0.7, max_tokens=24), [key])
    assert server.asked[-1][1]["max_tokens"] == 10  # the server refuses more than fits its 600


def test_a_message_is_cut_at_its_end(server: Server, policy: Policy, tmp_path: Path) -> None:
    engine = connected(server, policy, tmp_path)
    message = policy.tokenizer.encode(SEARCH)
    server.completes([*message, *policy.tokenizer.encode(" more")])
    (completion,) = engine.generate([[1]], Sampling(1.0, max_tokens=100), keys(0))
    assert completion.token_ids == tuple(message)
    assert completion.logprobs == (-0.5,) * len(message)
    assert completion.stop_reason is StopReason.TAG


def test_requests_are_under_way_together_and_dropped_together(server: Server, policy: Policy, tmp_path: Path) -> None:
    engine = connected(server, policy, tmp_path, concurrency=2)
    server.completes(policy.tokenizer.encode("no")[:1], finish_reason="length")
    done = engine.generate([[1]] * 9, Sampling(1.0, max_tokens=1), keys(*range(9)))
    assert len(done) == 9
    engine.submit([[1]] * 9, Sampling(1.0, max_tokens=1), keys(*range(9)))
    engine.release()
    assert engine.collect() == {}


def fails(server: Server, route: str, status: int, told: str) -> None:
    server.routes[route] = lambda _: (status, {"error": {"message": told}})


def test_a_server_that_is_not_there(policy: Policy, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RuntimeError, match=rf"vLLM server at {url}/v1/models does not answer .* is it up\?"):
        VLLMServerEngine(url, str(tmp_path)).sync(policy)


def test_a_server_without_the_routes_that_change_weights(server: Server, policy: Policy, tmp_path: Path) -> None:
    del server.routes["/server_info?config_format=json"]
    with pytest.raises(RuntimeError, match=r"answered 404.*VLLM_SERVER_DEV_MODE=1"):
        connected(server, policy, tmp_path)


def test_a_server_whose_logprobs_leave_the_temperature_out(server: Server, policy: Policy, tmp_path: Path) -> None:
    config = {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}}}
    server.routes["/server_info?config_format=json"] = lambda _: (200, config)
    with pytest.raises(ValueError, match=r"gives raw_logprobs.*--logprobs-mode processed_logprobs"):
        connected(server, policy, tmp_path)


def test_weights_that_the_server_cannot_load(server: Server, policy: Policy, tmp_path: Path) -> None:
    fails(server, "/collective_rpc", 500, "out of\nmemory")
    with pytest.raises(RuntimeError, match=r"/collective_rpc answered 500: .*out of.*memory") as raised:
        connected(server, policy, tmp_path)
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "weights").iterdir()) == []


def test_weights_that_do_not_fit_the_disk_are_not_left_there(server: Server, policy: Policy, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            connected(server, policy, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_server_that_keeps_what_old_weights_computed(server: Server, policy: Policy, tmp_path: Path) -> None:
    server.routes["/reset_prefix_cache"] = lambda _: (200, {"success": False})
    with pytest.raises(RuntimeError, match="works for others too"):
        connected(server, policy, tmp_path)


def test_a_request_that_fails_stops_the_run(server: Server, policy: Policy, tmp_path: Path) -> None:
    engine = connected(server, policy, tmp_path)
    fails(server, "/v1/completions", 500, "engine died")
    with pytest.raises(RuntimeError, match=r"/v1/completions answered 500: .*engine died"):
        play(agent_of(policy, engine, max_rollout_tokens=600, max_turn_tokens=50), "a", "b", samples=3)
    assert engine.collect() == {}


def test_a_request_that_takes_too_long(server: Server, policy: Policy, tmp_path: Path) -> None:
    engine = connected(server, policy, tmp_path, timeout=0.2)
    server.routes["/v1/completions"] = lambda _: (time.sleep(1), (200, {}))[1]
    with pytest.raises(RuntimeError, match=r"does not answer .*[Tt]imed out"):
        engine.generate([[1]], Sampling(1.0, max_tokens=5), keys(0))


def test_a_message_that_ends_for_no_reason(server: Server, policy: Policy, tmp_path: Path) -> None:
    engine = connected(server, policy, tmp_path)
    server.completes(policy.tokenizer.encode("the film"))
    with pytest.raises(RuntimeError, match=r"ended a message \(stop\) that ends in 'the film'; is its folder"):
        engine.generate([[1]], Sampling(1.0, max_tokens=50), keys(0))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "localhost:8000"}, "url is 'localhost:8000'; .* http"),
        ({"concurrency": 0}, "concurrency is 0; it must be at least 1"),
        ({"timeout": 0.0}, "timeout is 0.0; it must be above 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        VLLMServerEngine(**{"url": "http://127.0.0.1:1", "weights_folder": "w", **settings})


# A real server.


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Policy, VLLMServerEngine]]:
    pytest.importorskip("vllm")
    root = tmp_path_factory.mktemp("served")
    folder = widen(byte_level_folder(root / "policy", "qwen2", merged_behind="\n"), tie_word_embeddings=False)
    policy = teach(folder, SEARCH + "\n\n", "I do not know.", steps=40)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--logprobs-mode", "processed_logprobs"]
    command += [
        "--dtype",
        "float32",
        "--max-model-len",
        "768",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        "100000000",
    ]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"})
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            engine = VLLMServerEngine(f"http://127.0.0.1:{port}", str(root / "weights"), dtype="float32")
            engine.sync(policy)
            yield policy, engine
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: int = 240) -> None:
    for _ in range(seconds):
        assert process.poll() is None, "the server has ended"
        try:
            if urllib3.request("GET", url, retries=False).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            pass
        time.sleep(1)
    pytest.fail(f"no answer at {url} after {seconds} seconds")


@pytest.mark.vllm
@pytest.mark.long
def test_a_real_server_samples_as_we_do(served: tuple[Policy, VLLMServerEngine]) -> None:
    policy, engine = own(served[0]), served[1]
    assert engine.max_model_len == 768
    assert greedy_as_transformers(policy, engine)
    change(policy)
    assert not greedy_as_transformers(policy, engine)
    engine.sync(policy)
    assert greedy_as_transformers(policy, engine)
    engine.sync(served[0])


@pytest.mark.vllm
@pytest.mark.long
def test_a_real_server_draws_by_key_and_ends_at_the_tag(served: tuple[Policy, VLLMServerEngine]) -> None:
    policy, engine = served
    prompts, sampling = prompts_of(policy), Sampling(0.7, max_tokens=40)
    one, again, other = (engine.generate(prompts, sampling, keys(*range(n, n + 16))) for n in (0, 0, 16))
    assert [c.token_ids for c in one] == [c.token_ids for c in again] != [c.token_ids for c in other]
    for prompt, completion in zip(prompts, one, strict=True):
        ids = completion.token_ids
        places = [n for n in range(len(ids)) if stop_reason(policy.tokenizer, ids[: n + 1]) is not None]
        assert places in ([], [len(ids) - 1])
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / 0.7, dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)
    assert {completion.stop_reason for completion in one} >= {StopReason.TAG, StopReason.END}
    rollouts = play(agent_of(policy, engine, max_rollout_tokens=768, max_searches=2), "a", "b", samples=4)
    assert any(rollout.num_searches == 2 for rollout in rollouts)
