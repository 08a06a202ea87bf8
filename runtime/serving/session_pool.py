"""SessionPool: sessions that keep their texts, so that a prompt which begins like one of them is not run anew.

Not for several threads: who runs the program owns the pool.
"""

from collections.abc import Sequence

from model.errors import InputError
from runtime.engine.session import Session, Steps, common

WORTH_COPYING = 16
"""Tokens that a prompt shares with a text before the text is copied for them; fewer are sooner run again."""


class SessionPool:
    """Up to `limit` sessions of one program. One is idle, or taken by one who extends it."""

    def __init__(self, program: Steps, limit: int) -> None:
        """Starts with one idle session, and makes the others when they are needed.

        Raises:
            InputError: limit is impossible, or the program takes no sessions.
        """
        if limit < 1:
            raise InputError(f"--sessions {limit} is impossible; give 1 or more")
        self._program, self._limit = program, limit
        self._idle = [Session(program)]  # the least recently used first
        self._taken = list[Session]()

    def __len__(self) -> int:
        """How many sessions there are."""
        return len(self._idle) + len(self._taken)

    @property
    def has_room(self) -> bool:
        """Whether a session can be taken."""
        return len(self._taken) < self._limit

    def take(self, prompt: Sequence[int]) -> Session:
        """A session whose text is what the prompt begins with, as far as one that is here began like it.

        A session that would lose nothing comes first; then a new one, which copies what it can of another's text; then
        the idle one with the longest beginning in common, of several the least recently used; or, where one that is
        taken has much more in common, a copy of that, in place of the least recently used.
        """
        assert self.has_room, f"all {self._limit} sessions are taken"

        def shared(session: Session) -> int:
            return common(session.tokens, prompt[:-1])

        session = max(self._idle, key=shared, default=None)
        nearest = max([*self._idle, *self._taken], key=shared, default=None)
        if session is None or (len(self) < self._limit and shared(session) < session.position):
            session = nearest.fork() if nearest and shared(nearest) >= WORTH_COPYING else Session(self._program)
        elif nearest and shared(nearest) >= shared(session) + WORTH_COPYING:
            self._idle.pop(0)
            session = nearest.fork()
        else:
            self._idle.remove(session)
        self._taken.append(session)
        session.shorten(shared(session))
        return session

    def give_back(self, session: Session) -> None:
        """Ends a `take`: the session keeps its text, for prompts to come."""
        self._taken.remove(session)
        self._idle.append(session)

    def discard(self, session: Session) -> None:
        """Ends a `take` after a failure: nothing of the session stays."""
        self._taken.remove(session)
