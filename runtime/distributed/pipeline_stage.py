"""A rank's part of texts that go from rank to rank, and pipeline(), which keeps several under way."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from model.errors import InputError
from runtime.distributed.process_group import Ring
from runtime.distributed.token_log import TokenLog
from runtime.engine.program import Program
from runtime.engine.session import Session, check_prompt
from runtime.text.batching import Result, in_order
from runtime.text.generation import Chooser, GenerationOptions, StepBuilder
from runtime.text.sampler import Rng


@dataclass(frozen=True)
class Task:
    """A step of one text, as it goes from rank to rank.

    Attributes:
        slot: which caches are its text's.
        text: its number.
        start: the position of its first token; 0 begins the text.
        wanted: whether the token behind it is asked for.
        tokens: what it appends.
    """

    slot: int
    text: int
    start: int
    wanted: bool
    tokens: tuple[int, ...]

    def to_integers(self) -> list[int]:
        """As a message has it."""
        return [self.slot, self.text, self.start, self.wanted, *self.tokens]

    @staticmethod
    def of(integers: Sequence[int]) -> "Task":
        """The same back."""
        slot, text, start, wanted, *tokens = integers
        return Task(slot, text, start, bool(wanted), tuple(tokens))


@dataclass(frozen=True)
class Texts:
    """What all ranks know of the texts.

    Attributes:
        prompts: the ids of each, or why it cannot be run.
        done: of some, by number: tokens that an earlier run chose.
        options: how to choose tokens and when to end.
        seed: of each text's random numbers.
    """

    prompts: Sequence[Sequence[int] | InputError]
    done: dict[int, list[int]]
    options: GenerationOptions
    seed: int

    def given(self, number: int) -> tuple[Sequence[int], list[int]]:
        """A text's prompt, and the tokens chosen behind it."""
        prompt = self.prompts[number]
        assert not isinstance(prompt, InputError), f"text {number} cannot be run"
        return prompt, self.done.get(number, [])


class Stage:
    """A rank's part of all texts."""

    def __init__(self, program: Program, ring: Ring, texts: Texts) -> None:
        self.metadata, self.tokenizer = program.metadata, program.tokenizer
        self._program, self._ring, self.texts = program, ring, texts
        self._sessions, self._choosers = dict[int, Session](), dict[int, Chooser]()
        self._ends = program.metadata.methods[0].end_layer == program.metadata.config.n_layers

    def run(self, task: Task, stream: Tensor | None = None) -> None:
        """Runs a step, and tells the next rank what came of it: the first one, behind the last, the token chosen."""
        if task.slot not in self._sessions:
            self._sessions[task.slot] = Session(self._program)
        session = self._sessions[task.slot]
        if task.start == 0:
            session.reset()
        assert task.start == session.position, f"a step at {task.start} is not behind {session.position} tokens"
        found = session.pass_on(task.tokens, stream)
        if not self._ends:
            self._ring.send(task.to_integers(), found)
        elif task.wanted:
            self._ring.send([task.text, self._chooser(task).choose(found[0])])

    def _chooser(self, task: Task) -> Chooser:
        """The text's; a new one where its first token is asked for."""
        prompt, done = self.texts.given(task.text)
        if task.start + len(task.tokens) == len(prompt) + len(done):
            self._choosers[task.slot] = Chooser(prompt, self.texts.options.sampling, Rng(self.texts.seed))
            self._choosers[task.slot].follow(done)
        return self._choosers[task.slot]

    def begin(self, slot: int, number: int) -> int:
        """Hands a text's prompt on, chunk by chunk, and returns how many tokens it has."""
        prompt, done = self.texts.given(number)
        tokens = (*prompt, *done)
        for start in range(0, len(tokens), self.metadata.chunk):
            end = min(start + self.metadata.chunk, len(tokens))
            self.run(Task(slot, number, start, end == len(tokens), tokens[start:end]))
        return len(tokens)

    def follow(self) -> None:
        """Runs what the rank before hands on, until it says that there is no more."""
        while (message := self._ring.receive())[0]:
            self.run(Task.of(message[0]), message[1])
        self.end()

    def end(self) -> None:
        """Tells the next rank that there is no more, but for the first, which knows."""
        if not self._ends:
            self._ring.send([])
        self._ring.close()

    def chosen(self) -> tuple[int, int]:
        """A text's number, and the token that the last rank chose."""
        (number, token), _ = self._ring.receive()
        return number, token


@dataclass
class _Active:
    """A text under way: its caches' slot, its length so far, and what it says."""

    result: Result
    slot: int
    position: int
    builder: StepBuilder


def pipeline(stage: Stage, under_way: int, token_log: TokenLog) -> Iterator[Result]:
    """Continues every text from the first rank, `under_way` of them together, and yields the results in their order,
    each as `generate` would have it with a seed of its own.

    A prompt that cannot be run becomes a result; the others go on.

    Raises:
        LostPeerError: a rank ended, or did not answer in time.
    """
    return in_order(_ended(stage, under_way, token_log))


def _ended(stage: Stage, under_way: int, token_log: TokenLog) -> Iterator[Result]:
    """The results of `pipeline` as texts end."""
    waiting = iter(range(len(stage.texts.prompts)))
    slots, active = list(range(under_way)), dict[int, _Active]()
    while True:
        while slots and (number := next(waiting, None)) is not None:
            started = _start(stage, number, slots[-1])
            if isinstance(started, Result):
                yield started
            else:
                slots.pop()
                active[number] = started
        if not active:
            break
        number, token = stage.chosen()
        token_log.add(number, token)
        text = active[number]
        text.result.steps.append(text.builder.build(token, text.position == stage.metadata.max_seq_len))
        if text.result.steps[-1].finish_reason:
            slots.append(text.slot)
            yield active.pop(number).result
        else:
            stage.run(Task(text.slot, number, text.position, True, (token,)))
            text.position += 1
    stage.end()


def _start(stage: Stage, number: int, slot: int) -> _Active | Result:
    """Begins a text, or tells what there is to it already."""
    prompt, texts = stage.texts.prompts[number], stage.texts
    try:
        if isinstance(prompt, InputError):
            raise prompt
        check_prompt(prompt, stage.metadata)
        builder = StepBuilder(prompt, texts.options, stage.tokenizer)
    except InputError as error:
        return Result(number, error=str(error))
    result, capacity = Result(number), stage.metadata.max_seq_len
    for count, token in enumerate(texts.done.get(number, ())):
        result.steps.append(builder.build(token, len(prompt) + count == capacity))
        if result.steps[-1].finish_reason:
            return result
    return _Active(result, slot, stage.begin(slot, number), builder)
