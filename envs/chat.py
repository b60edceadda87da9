"""Chat as traffic: questions that people can read, sent to the chat API, and the answers kept."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from openai import AsyncOpenAI

from envs.replay import Replay, TokenClock
from envs.workload import Trace

SHORT = (
    "What is the capital of France?",
    "What is 12 plus 30?",
    "List three fruits.",
    "Which planet is the largest?",
    "What colour do blue and yellow make?",
    "Who wrote Hamlet?",
)
LONG = (
    "Write a short story about a lighthouse keeper and a whale.",
    "Explain to a child why the sky is blue.",
    "Give me advice on how to sleep well.",
    "Describe a walk through a forest in autumn.",
)
PASSAGES = (
    "The tide is the regular rise and fall of the sea. It is caused mainly by the pull of the "
    "moon, which draws the water nearest to it into a bulge, and leaves another on the far "
    "side of the earth. As the earth turns, each coast passes through both bulges in a day, "
    "and so most places have two high tides and two low tides. When sun and moon stand in "
    "line their pulls add up, and the tides are high; when they stand at a right angle, the "
    "tides are low. The shape of the coast matters as much: in a narrow bay the water is "
    "forced upwards and may rise by many metres, while in a closed sea one hardly sees a "
    "difference.",
    "A lighthouse is a tower with a bright lamp at its top, built where ships need warning or "
    "guidance. The first ones were open fires on hills. Later, lamps burned oil, and lenses "
    "made of many rings of glass gathered their light into a beam that could be seen for "
    "thirty kilometres. Each lighthouse has its own rhythm of flashes, so that sailors can "
    "tell which one they see. Keepers lived beside the lamp, trimmed its wick and wound the "
    "clockwork that turned the lens. Today nearly all of them run by themselves, and many of "
    "the keepers' houses are inns.",
)


@dataclass(frozen=True, slots=True)
class ChatTrace:
    """A trace with the question of each request; `trace.output_tokens` is the most it may get."""

    trace: Trace
    questions: tuple[str, ...]


def chat_traffic(duration_s: float, seed: int) -> ChatTrace:
    """Three phases of equal length, Poisson arrivals: quick questions, passages to summarise, and
    long answers."""
    rng = np.random.default_rng(seed)
    summaries = tuple(f"Summarise this in one sentence: {p}" for p in PASSAGES)
    phases = ((0.8, SHORT, 24), (0.6, summaries, 40), (0.4, LONG, 96))
    arrival_s, questions, limits = [], [], []
    for number, (rate_per_s, texts, limit) in enumerate(phases):
        start_s = number * duration_s / len(phases)
        at_s = start_s + rng.exponential(1 / rate_per_s)
        while at_s < start_s + duration_s / len(phases):
            arrival_s.append(at_s)
            questions.append(texts[rng.integers(len(texts))])
            limits.append(limit)
            at_s += rng.exponential(1 / rate_per_s)
    if not questions:  # a very short span still shows something
        arrival_s, questions, limits = [0.0], [SHORT[0]], [phases[0][2]]
    words = np.array([len(q.split()) for q in questions], dtype=np.int64)
    trace = Trace(np.array(arrival_s), words * 4 // 3 + 30, np.array(limits), duration_s)
    return ChatTrace(trace, tuple(questions))


@dataclass(slots=True)
class ChatReplay(Replay):
    """Sends questions to the chat API, greedily. A request is whole when it ended by itself or by
    its token limit."""

    questions: tuple[str, ...] = ()
    answers: dict[int, str] = field(default_factory=dict)  # whole ones, by request

    async def _stream(self, index: int, clock: TokenClock) -> int:
        tokens, text, ended = 0, "", False
        stream = await self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": self.questions[index]}],
            max_tokens=int(self.trace.output_tokens[index]),
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async with stream:
            async for chunk in stream:
                if chunk.choices:
                    clock.mark(time.monotonic() - clock.start_s)
                    text += chunk.choices[0].delta.content or ""
                    ended |= chunk.choices[0].finish_reason in ("stop", "length")
                if chunk.usage is not None:
                    tokens = chunk.usage.completion_tokens
        if ended:
            self.answers[index] = text
        return tokens

    def _shortfall(self, index: int, tokens: int) -> str:
        return "" if index in self.answers else f"broke off after {tokens} tokens"

    def samples(self, count: int) -> list[tuple[str, str]]:
        """(question, answer) of different questions, in the order they were asked."""
        found: dict[str, str] = {}
        for index in sorted(self.answers):
            found.setdefault(self.questions[index], self.answers[index].strip())
        step = max(1, len(found) // count)
        return list(found.items())[::step][:count]


def build_chat_replay(
    base_url: str, model: str, chat: ChatTrace, timeout_s: float = 120.0, api_key: str = "none"
) -> ChatReplay:
    """A replay against `base_url` (ending in /v1). The caller closes `replay.client`."""
    client = AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=timeout_s)
    return ChatReplay(client, model, chat.trace, [], questions=chat.questions)
