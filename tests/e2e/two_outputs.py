# SPDX-License-Identifier: Apache-2.0
"""An agent loop that puts out two trajectories a session, as one that summarises its context in between does."""

from copy import deepcopy

from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


@register("two_outputs")
class TwoOutputsAgentLoop(SingleTurnAgentLoop):
    """Answers twice in one session; the last answer's reward counts for both."""

    async def run(self, sampling_params, **kwargs):
        first = await super().run(sampling_params, **deepcopy(kwargs))
        second = await super().run(sampling_params, **deepcopy(kwargs))
        return [first, second]
