"""One model behind a batcher, for one event loop: what the routes of an application share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.requests import Intake
from tnnlm.serving.responses import Answer
from tnnlm.serving.scheduler import Batcher, ClosedError, QueueFullError
from tnnlm.serving.schemas import ApiError
from tnnlm.serving.sequence import Event, Reading
from tnnlm.serving.settings import Settings


class Service:
    """A generator behind a batcher, for one event loop."""

    def __init__(
        self, generator: TextGenerator, settings: Settings, executor: Executor | None = None
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.batcher = Batcher(generator, settings.limits, self.metrics, self._deliver, executor)
        self.intake = Intake(generator.tokenizer, settings.name, settings.limits)
        self.started = time.time()
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Run the batcher as long as the application."""
        self._loop = asyncio.get_running_loop()
        self.batcher.start()
        try:
            yield
        finally:
            # Not on the loop: the batcher's last events go through it.
            await asyncio.to_thread(self.batcher.close)

    def submit(self, answer: Answer, readings: Sequence[Reading]) -> None:
        """Hand a request to the batcher.

        Raises:
            ApiError: if it is full, or closing.
        """
        for job in answer.jobs:
            job.owner = answer
        try:
            self.batcher.submit(readings)
        except QueueFullError:
            raise ApiError(429, "too many requests wait; try again in a moment") from None
        except ClosedError:
            raise ApiError(503, "the server is shutting down") from None

    def card(self) -> dict[str, Any]:
        """The model, as /v1/models lists it."""
        settings, limits = self.settings, self.settings.limits
        return {
            "id": settings.name,
            "object": "model",
            "created": int(self.started),
            "owned_by": "tnnlm",
            "tnnlm": {
                "parameters": settings.parameters,
                "vocabulary": self.intake.tokenizer.size,
                "state_bytes": self.batcher.row_bytes,
                "engine": settings.engine,
                "max_prompt_tokens": limits.max_prompt_tokens,
                "max_tokens": limits.max_tokens,
            },
        }

    def health(self) -> dict[str, Any]:
        """Whether it takes requests, and what it has to do."""
        return {
            "status": "ok" if self.batcher.alive else "stopping",
            "model": self.settings.name,
            "uptime_s": round(time.time() - self.started, 1),
            **self.batcher.load,
        }

    def _deliver(self, events: list[Event]) -> None:
        assert self._loop is not None
        # One wake-up of the loop for all events of a step.
        self._loop.call_soon_threadsafe(_hand_out, events)


def _hand_out(events: list[Event]) -> None:
    for event in events:
        event.job.owner.queue.put_nowait(event)
