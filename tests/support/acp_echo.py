"""An agent of the real Agent Client Protocol SDK that says back what it is told; runs in a guest."""

from __future__ import annotations

import asyncio
from typing import Any

from acp import (
    Agent,
    Client,
    InitializeResponse,
    NewSessionResponse,
    PromptResponse,
    run_agent,
    update_agent_message_text,
)


class Echo(Agent):
    """Answers every prompt with its text; `where` is the directory of its session."""

    def on_connect(self, conn: Client) -> None:
        """Keep who is spoken to."""
        self._client = conn

    async def initialize(self, protocol_version: int, **_: Any) -> InitializeResponse:
        """Agree to the version."""
        return InitializeResponse(protocol_version=protocol_version)

    async def new_session(self, cwd: str, **_: Any) -> NewSessionResponse:
        """Begin the one session, named by its directory."""
        return NewSessionResponse(session_id=cwd)

    async def prompt(self, session_id: str, prompt: list[Any], **_: Any) -> PromptResponse:
        """Say it back."""
        for block in prompt:
            await self._client.session_update(session_id, update_agent_message_text(block.text))
        return PromptResponse(stop_reason="end_turn")


if __name__ == "__main__":
    asyncio.run(run_agent(Echo()))
