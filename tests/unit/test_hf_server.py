# SPDX-License-Identifier: Apache-2.0
"""The hf rollout server under aborts: requests end with what they have, and go on where they ended."""

import asyncio
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from verl.workers.config import RolloutConfig
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

from verl_gradalign.cpu.hf_rollout import HFRollout, HFServer
from verl_gradalign.toy.model import build_tiny_model

LOG_PROB_ATOL = 1e-4  # float32, cached against whole-sequence forwards; measured 5e-6
RESPONSE_LENGTH = 8
PROMPTS = ([5, 6, 7], [8, 9], [10, 11, 12, 13])
WAIT_S = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"hidden_size": 32, "num_layers": 2, "intermediate_size": 64}
    # Untied: a tied head at random weights repeats its last token for ever.
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=False, **sizes)


@pytest.fixture
def server(folder):
    return HFServer(str(folder), "float32", seed=(0, 0), response_length=RESPONSE_LENGTH, max_num_seqs=64)


def ask(server, prompt, **changes):
    """Start a request for RESPONSE_LENGTH tokens, and return its task."""
    params = {"temperature": 1.0, "ignore_eos": True, "logprobs": True} | changes
    return asyncio.create_task(server.generate("request", list(prompt), params))


@contextmanager
def held_at_token(server, position):
    """Hold the batch in the forward before token `position`, counted from 1; yields (has arrived there, let go)."""
    arrived, released = threading.Event(), threading.Event()
    num_forwards = 0

    def hold(*_):
        nonlocal num_forwards
        num_forwards += 1
        if num_forwards == position:
            arrived.set()
            assert released.wait(WAIT_S)

    handle = server._generator.model.register_forward_pre_hook(hold)
    try:
        yield arrived, released
    finally:
        released.set()
        handle.remove()


async def abort_at_token(server, position, prompts, **changes):
    """Return the outputs of requests whose batch was aborted while it computed its token `position`."""
    with held_at_token(server, position) as (arrived, released):
        requests = [ask(server, prompt, **changes) for prompt in prompts]
        assert await asyncio.to_thread(arrived.wait, WAIT_S)
        abort = asyncio.create_task(server.abort_all_requests())
        await asyncio.sleep(0)
        released.set()
        await abort
    assert not server._waiting and server._worker.done()
    return await asyncio.gather(*requests)


def test_a_running_batch_ends_at_the_next_token_with_the_tokens_it_has(server):
    async def claim():
        for output in await abort_at_token(server, 3, PROMPTS):
            assert output.stop_reason == "aborted"
            assert len(output.token_ids) == len(output.log_probs) == 3

    asyncio.run(claim())


def test_a_completion_that_ended_before_the_abort_is_complete(server):
    async def claim():
        (free,) = await asyncio.gather(ask(server, PROMPTS[0]))
        server._times_asked.clear()
        stopping = {"stop_token_ids": [free.token_ids[1]]}
        ended, cut = await abort_at_token(server, 4, PROMPTS[:2], **stopping)
        assert (ended.stop_reason, ended.token_ids) == ("completed", free.token_ids[:2])
        assert (cut.stop_reason, len(cut.token_ids)) == ("aborted", 4)

    asyncio.run(claim())


def test_a_waiting_request_ends_without_tokens(server):
    async def claim():
        requests = [ask(server, prompt) for prompt in PROMPTS]
        await asyncio.sleep(0)
        await server.abort_all_requests()
        for output in await asyncio.gather(*requests):
            assert (output.stop_reason, output.token_ids, output.log_probs) == ("aborted", [], [])

    asyncio.run(claim())


def test_a_request_during_the_pause_waits_for_its_end(server):
    async def claim():
        await server.abort_all_requests()
        request = ask(server, PROMPTS[0])
        done, _ = await asyncio.wait([request], timeout=0.2)
        assert not done
        await server.resume_generation()
        output = await request
        assert (output.stop_reason, len(output.token_ids)) == ("completed", RESPONSE_LENGTH)

    asyncio.run(claim())


def test_a_rejecting_pause_aborts_what_arrives_until_generation_resumes(server):
    async def claim():
        await server.abort_all_requests(reject_request=True)
        rejected = await ask(server, PROMPTS[0])
        assert (rejected.stop_reason, rejected.token_ids) == ("aborted", [])
        await server.resume_generation()
        assert (await ask(server, PROMPTS[0])).stop_reason == "completed"

    asyncio.run(claim())


def test_a_plain_abort_ends_the_rejection_of_an_earlier_one(server):
    async def claim():
        await server.abort_all_requests(reject_request=True)
        await server.abort_all_requests()
        request = ask(server, PROMPTS[0])
        done, _ = await asyncio.wait([request], timeout=0.2)
        assert not done
        await server.resume_generation()
        assert (await request).stop_reason == "completed"

    asyncio.run(claim())


def test_completions_without_an_abort_are_those_of_a_server_that_was_paused_before(server, folder):
    async def answers(server):
        return [output.token_ids for output in await asyncio.gather(*[ask(server, prompt) for prompt in PROMPTS])]

    async def paused_before():
        await server.abort_all_requests()
        await server.resume_generation()
        return await answers(server)

    other = HFServer(str(folder), "float32", seed=(0, 0), response_length=RESPONSE_LENGTH, max_num_seqs=64)
    assert asyncio.run(paused_before()) == asyncio.run(answers(other))


class _Client(FullyAsyncLLMServerClient):
    """verl's client with a server of this process in place of Ray's load balancer."""

    def __init__(self, server):
        rollout = SimpleNamespace(response_length=RESPONSE_LENGTH, name="hf", full_determinism=False)
        super().__init__(SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout)))
        self._server = SimpleNamespace(generate=SimpleNamespace(remote=server.generate))

    async def _acquire_server(self, request_id, **_):
        return "server", self._server

    def _release_server(self, server_id, request_id=None): ...


def test_verls_client_completes_an_aborted_response_with_the_next_weights(server):
    async def claim():
        before = {name: tensor.clone() for name, tensor in server._generator.model.state_dict().items()}
        after = {name: tensor * 1.5 if name == "model.norm.weight" else tensor for name, tensor in before.items()}
        await server.load_weights(before, global_steps=3)
        params = {"temperature": 1.0, "ignore_eos": True, "logprobs": True}
        with held_at_token(server, 3) as (arrived, released):
            request = asyncio.create_task(_Client(server).generate("r", prompt_ids=PROMPTS[0], sampling_params=params))
            assert await asyncio.to_thread(arrived.wait, WAIT_S)
            abort = asyncio.create_task(server.abort_all_requests())
            await asyncio.sleep(0)
            released.set()
            await abort
        await server.load_weights(after, global_steps=4)
        await server.resume_generation()
        return await request, before, after

    output, before, after = asyncio.run(claim())
    assert len(output.token_ids) == len(output.log_probs) == RESPONSE_LENGTH
    fields = output.extra_fields
    assert (fields["min_global_steps"], fields["max_global_steps"]) == (3, 4)
    # The first three tokens were drawn with the old weights, the others with the new ones.
    model, expected = server._generator.model, []
    for weights, part in ((before, slice(0, 3)), (after, slice(3, None))):
        model.load_state_dict(weights)
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPTS[0], *output.token_ids]])).logits[0, len(PROMPTS[0]) - 1 : -1]
        log_p = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(output.token_ids)[:, None]).squeeze(1)
        expected += log_p[part].tolist()
    assert output.log_probs == pytest.approx(expected, abs=LOG_PROB_ATOL)


def test_many_at_once_are_what_single_requests_give_in_their_order(server, folder):
    """Also after a new seed, which gives other samples."""
    other = HFServer(str(folder), "float32", seed=(7, 0), response_length=RESPONSE_LENGTH, max_num_seqs=2)
    params = {"temperature": 1.0, "ignore_eos": True, "logprobs": True}
    counts = [2, 1, 3]

    async def sampled():
        at_first, version = await server.generate_many([list(p) for p in PROMPTS], counts, params)
        await server.reseed(7)
        many, _ = await server.generate_many([list(p) for p in PROMPTS], counts, params)
        single = [[await ask(other, p) for _ in range(n)] for p, n in zip(PROMPTS, counts, strict=True)]
        return at_first, many, single, version

    at_first, many, single, version = asyncio.run(sampled())
    assert [[c.token_ids for c in group] for group in many] == [[c.token_ids for c in group] for group in single]
    for group, others in zip(many, single, strict=True):
        for completion, alone in zip(group, others, strict=True):
            torch.testing.assert_close(
                torch.tensor(completion.log_probs), torch.tensor(alone.log_probs), atol=LOG_PROB_ATOL, rtol=0
            )
    assert [len(group) for group in many] == counts and version == 0
    assert [g[0].token_ids for g in at_first] != [g[0].token_ids for g in many]


def test_one_worker_of_a_replica_pushes_weights_to_its_server(monkeypatch):
    """Training ranks count through all replicas; the workers of a separate one begin at 0 and are told which it is."""
    config = RolloutConfig(name="hf", tensor_model_parallel_size=2)

    def places(num_ranks, **replica):
        for rank in range(num_ranks):
            monkeypatch.setenv("RANK", str(rank))
            rollout = HFRollout(config, {}, device_mesh=None, **replica)
            yield rollout.replica_rank, rollout.is_leader_rank

    assert list(places(4)) == [(0, True), (0, False), (1, True), (1, False)]
    assert list(places(2, replica_rank=3)) == [(3, True), (3, False)]
