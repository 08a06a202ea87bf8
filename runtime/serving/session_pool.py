"""SessionPool: sessions that keep their texts, so that a prompt with the same beginning need not be run again in full.

The pool is not thread-safe; only the thread that runs the program may use it.
"""

from collections.abc import Sequence

from model.errors import InputError
from runtime.engine.session import Session, Steps, common

WORTH_COPYING = 16
"""Minimum number of common tokens for which a text is copied; fewer are faster to run again."""


class SessionPool:
    """A pool of at most `limit` sessions of one program, each of which is idle or taken."""

    def __init__(self, program: Steps, limit: int) -> None:
        """Starts with one idle session; others are created when needed.

        Raises:
            InputError: the limit is invalid, or the program was exported for several texts at once.
        """
        if limit < 1:
            raise InputError(f"--sessions {limit} is invalid; give 1 or more")
        self._program, self._limit = program, limit
        self._idle = [Session(program)]  # the least recently used first
        self._taken = list[Session]()

    def __len__(self) -> int:
        """Returns the number of sessions, idle and taken."""
        return len(self._idle) + len(self._taken)

    @property
    def has_room(self) -> bool:
        """Whether a session can be taken."""
        return len(self._taken) < self._limit

    def take(self, prompt: Sequence[int]) -> Session:
        """Takes a session whose text is the longest cached beginning of the prompt.

        It is usually the idle session with the longest common beginning, the least recently used of several. If that
        session would lose tokens, or none is idle, and the limit allows it, a new session is created with a copy of the
        text that has the longest common beginning. If a taken session has at least WORTH_COPYING more tokens in common,
        a copy of it replaces the least recently used idle session.
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
        """Returns a taken session to the pool; it keeps its text for later prompts."""
        self._taken.remove(session)
        self._idle.append(session)

    def discard(self, session: Session) -> None:
        """Removes a taken session from the pool after a failure."""
        self._taken.remove(session)
