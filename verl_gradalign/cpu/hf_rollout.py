# SPDX-License-Identifier: Apache-2.0
"""The `hf` rollout: transformers' generate behind verl's rollout-replica interface, for machines without a GPU.

One named Ray actor per replica holds a copy of the policy, batches the requests that arrive together and receives
weight pushes from the training workers. It does not shard a model and has no paged cache: it is for small models.
verl's asynchronous trainers abort what runs before they push weights; a client then asks again with the tokens it has.
"""

import asyncio
import hashlib
import os
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterable, Iterable
from itertools import islice
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from verl_gradalign.cpu.generate import Completion, SamplingParams, SequenceGenerator

# How long the server waits for more requests before it starts a batch. Requests of one step arrive within a few
# milliseconds of each other; a batch takes tens of milliseconds at least.
BATCH_WINDOW_S = 0.02

# Calls that Ray lets into the server at once. A paused server holds every request that arrives, and the call that ends
# the pause must still get in; verl's own limit (max_num_seqs + 16) is a deadlock with more requests than that.
MAX_CALLS = 100_000

NOT_BEGUN = Completion(token_ids=[], log_probs=[], stop_reason="aborted")


def server_name(replica_rank: int, suffix: str = "") -> str:
    """Return the name of a replica's server, a Ray actor."""
    return f"hf_server_{replica_rank}{suffix}"


async def _no_op(*_: Any, **__: Any) -> None:
    """Return at once: there is no device memory to give back here, and nothing to profile."""


class HFServer:
    """Generates for one replica. An async Ray actor: requests queue up while a batch is computed in a thread."""

    def __init__(
        self, model_path: str, dtype: str, seed: tuple[int, int], response_length: int, max_num_seqs: int
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).eval()
        self._generator = SequenceGenerator(model, tokenizer)
        self._seed = seed
        self._response_length = response_length
        self._max_num_seqs = max_num_seqs
        self._weights_version = 0
        self._times_asked: Counter[tuple[int, ...]] = Counter()
        self._waiting: list[tuple[list[int], SamplingParams, asyncio.Future[Completion]]] = []
        self._worker: asyncio.Task[None] | None = None
        # Set from an abort to the next resume. The thread that computes a batch looks at it after every token.
        self._paused = threading.Event()
        self._rejects = False

    async def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: Any = None,
        video_data: Any = None,
        **_: Any,
    ) -> TokenOutput:
        """Return one completion, or as much of it as there is when generation is aborted (stop reason "aborted").

        A request that arrives while generation is paused waits, or is aborted at once if the abort said so.

        Raises: ValueError for images or videos, n above 1 (verl asks once per response) and unknown parameters.
        """
        if image_data or video_data:
            raise ValueError("the hf rollout takes text only; use rollout.name=vllm for images and videos")
        params = SamplingParams.from_request(sampling_params, self._response_length)
        if params.n != 1:
            raise ValueError(f"n={params.n}: a rollout server answers one completion per request; ask n times")
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        if self._rejects:
            future.set_result(NOT_BEGUN)
        else:
            self._waiting.append((list(prompt_ids), params, future))
            self._start_work()
        completion = await future
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.log_probs if params.logprobs else None,
            stop_reason="aborted" if completion.stop_reason == "aborted" else "completed",
            extra_fields={"global_steps": self._weights_version},
        )

    async def generate_many(
        self, prompts: list[list[int]], counts: list[int], sampling_params: dict[str, Any]
    ) -> tuple[list[list[Completion]], int]:
        """Return `counts[i]` completions of each prompt, as many calls of `generate` would, and the weights' version.

        Prompts of like length share a batch: padding is computed too.
        """
        params = SamplingParams.from_request(sampling_params, self._response_length)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        asked = [prompts[i] for i in order for _ in range(counts[i])]
        seeds = [self._next_seed(prompt) for prompt in asked]
        completions: list[Completion] = []
        for start in range(0, len(asked), self._max_num_seqs):
            batch = slice(start, start + self._max_num_seqs)
            completions += await asyncio.to_thread(self._generator.generate, asked[batch], params, seeds[batch])
        in_order = iter(completions)
        answers = {i: list(islice(in_order, counts[i])) for i in order}
        return [answers[i] for i in range(len(prompts))], self._weights_version

    async def reseed(self, seed: int) -> None:
        """Sample as a server that was started with this seed."""
        self._seed = (seed, self._seed[1])
        self._times_asked.clear()

    def _start_work(self) -> None:
        """Serve what waits, unless that is being done or generation is paused."""
        if self._waiting and not self._paused.is_set() and (self._worker is None or self._worker.done()):
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Serve batches until no request waits or generation is paused."""
        while self._waiting:
            await self._until_quiet()
            if self._paused.is_set():
                return
            batch, self._waiting = self._waiting[: self._max_num_seqs], self._waiting[self._max_num_seqs :]
            by_params = defaultdict(list)
            for prompt, params, future in batch:
                by_params[params].append((prompt, future))
            for params, requests in by_params.items():
                prompts, futures = zip(*requests, strict=True)
                seeds = [self._next_seed(prompt) for prompt in prompts]
                try:
                    completions = await asyncio.to_thread(
                        self._generator.generate, prompts, params, seeds, self._paused.is_set
                    )
                except Exception as error:
                    for future in futures:
                        future.set_exception(error)
                    continue
                for future, completion in zip(futures, completions, strict=True):
                    future.set_result(completion)

    async def _until_quiet(self) -> None:
        """Wait until no request arrived for BATCH_WINDOW_S, or a full batch waits."""
        num_waiting = -1
        while num_waiting != len(self._waiting) < self._max_num_seqs:
            num_waiting = len(self._waiting)
            await asyncio.sleep(BATCH_WINDOW_S)

    def _next_seed(self, prompt: list[int]) -> int:
        """Return the seed of a prompt's next completion.

        It depends on the seed (rollout seed and replica), the weights' version, the prompt and how often that prompt
        was asked since the last weight push, so a group of responses does not depend on the order of arrival.
        """
        key = tuple(prompt)
        parts = (*self._seed, self._weights_version, self._times_asked[key], key)
        self._times_asked[key] += 1
        return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")

    async def load_weights(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        """Replace the policy. Raises ValueError if a parameter is missing or unknown."""
        model = self._generator.model
        missing, unexpected = model.load_state_dict(weights, strict=False)
        tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        if set(missing) - tied or unexpected:
            raise ValueError(f"weight push does not fit the rollout model: missing {missing}, unexpected {unexpected}")
        self._weights_version = self._weights_version if global_steps is None else global_steps
        self._times_asked.clear()

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """End every request with the tokens it has, and pause until `resume_generation`.

        Nothing runs any more when this returns. Requests that arrive during the pause wait for its end, or, with
        `reject_request`, are aborted at once: their client is to look for another server.
        """
        self._paused.set()
        self._rejects = reject_request
        for _, _, future in self._waiting:
            future.set_result(NOT_BEGUN)
        self._waiting.clear()
        if self._worker is not None:
            await self._worker

    async def resume_generation(self) -> None:
        """Serve the requests that arrived during the pause, and new ones."""
        self._paused.clear()
        self._rejects = False
        self._start_work()

    # verl calls these around weight pushes and scoring.
    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = _no_op


class HFReplica(RolloutReplica):
    """Launches one `HFServer` on the node of its first worker, a training rank or one that only receives weights."""

    async def launch_servers(self) -> None:
        """Start the server and wait until its model is loaded."""
        node_id = await self.workers[0].__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
        name = server_name(self.replica_rank, self.name_suffix)
        actor = ray.remote(HFServer).options(
            name=name,
            num_cpus=0,
            max_concurrency=MAX_CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
        )
        server = actor.remote(
            model_path=self.model_config.path,
            dtype=self.config.dtype,
            seed=(self.config.seed, self.replica_rank),
            response_length=self.config.response_length,
            max_num_seqs=self.config.max_num_seqs,
        )
        await server.__ray_ready__.remote()
        self.servers, self._server_handle, self._server_address = [server], server, name


class HFRollout(BaseRollout):
    """A worker's end of the weight push to its replica's server: a training rank's, or a separate rollout worker's."""

    resume = release = _no_op

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        """Find the server by this worker's rank among those of all replicas, or as the replica with the given rank."""
        super().__init__(config, model_config, device_mesh)
        rollout = self.config
        num_workers = (
            rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
        )
        own_replica, place = divmod(int(os.environ["RANK"]), num_workers)
        self.replica_rank = own_replica if replica_rank < 0 else replica_rank
        self.is_leader_rank = place == 0

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        peft_config: Any = None,
        **_: Any,
    ) -> None:
        """Send the full weights to the server. Collective: gathering the tensors takes all ranks."""
        if wire_format != "named_tensors" or peft_config is not None:
            raise ValueError(
                "the hf rollout takes full weights only: set checkpoint_engine.backend=naive (gloo for separate_async) "
                "and, for LoRA, actor_rollout_ref.model.lora.merge=True"
            )
        tensors = {name: tensor.detach().cpu() async for name, tensor in ensure_async_iterator(weights)}
        if self.is_leader_rank:
            server = ray.get_actor(server_name(self.replica_rank))
            await server.load_weights.remote(tensors, global_steps)
