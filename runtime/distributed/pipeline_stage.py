"""Stage: a rank's part of texts that pass from rank to rank; and pipeline(), which runs several texts at once."""

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
    """A step of one text, as it passes from rank to rank.

    Attributes:
        slot: index of the caches of the text.
        text: number of the text.
        start: position of the step's first token; 0 begins the text.
        wanted: whether the last rank chooses the next token after this step.
        tokens: the tokens that it appends.
    """

    slot: int
    text: int
    start: int
    wanted: bool
    tokens: tuple[int, ...]

    def to_integers(self) -> list[int]:
        """Returns the task as the integers of a message."""
        return [self.slot, self.text, self.start, self.wanted, *self.tokens]

    @staticmethod
    def of(integers: Sequence[int]) -> "Task":
        """Returns the task from the integers of a message."""
        slot, text, start, wanted, *tokens = integers
        return Task(slot, text, start, bool(wanted), tuple(tokens))


@dataclass(frozen=True)
class Texts:
    """The texts and options that all ranks have.

    Attributes:
        prompts: the ids of each prompt, or the error that prevents it.
        done: text number -> tokens that an earlier run chose; only texts that have some.
        options: how to choose tokens and when to end a text.
        seed: seed of each text's random numbers.
    """

    prompts: Sequence[Sequence[int] | InputError]
    done: dict[int, list[int]]
    options: GenerationOptions
    seed: int

    def given(self, number: int) -> tuple[Sequence[int], list[int]]:
        """Returns a text's prompt, and the tokens that an earlier run chose after it."""
        prompt = self.prompts[number]
        assert not isinstance(prompt, InputError), f"text {number} cannot be run"
        return prompt, self.done.get(number, [])


class Stage:
    """The part of all texts that one rank runs."""

    def __init__(self, program: Program, ring: Ring, texts: Texts) -> None:
        self.metadata, self.tokenizer = program.metadata, program.tokenizer
        self._program, self._ring, self.texts = program, ring, texts
        self._sessions, self._choosers = dict[int, Session](), dict[int, Chooser]()
        self._ends = program.metadata.methods[0].end_layer == program.metadata.config.n_layers

    def run(self, task: Task, stream: Tensor | None = None) -> None:
        """Runs a step and sends its result to the next rank; the last rank sends the chosen token to the first."""
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
        """Returns the chooser of the task's text, a new one before the text's first token."""
        prompt, done = self.texts.given(task.text)
        if task.start + len(task.tokens) == len(prompt) + len(done):
            self._choosers[task.slot] = Chooser(prompt, self.texts.options.sampling, Rng(self.texts.seed))
            self._choosers[task.slot].follow(done)
        return self._choosers[task.slot]

    def begin(self, slot: int, number: int) -> int:
        """Runs a text's prompt and earlier tokens, chunk by chunk, and returns their number."""
        prompt, done = self.texts.given(number)
        tokens = (*prompt, *done)
        for start in range(0, len(tokens), self.metadata.chunk):
            end = min(start + self.metadata.chunk, len(tokens))
            self.run(Task(slot, number, start, end == len(tokens), tokens[start:end]))
        return len(tokens)

    def follow(self) -> None:
        """Runs the steps that the previous rank sends, until an empty message ends them."""
        while (message := self._ring.receive())[0]:
            self.run(Task.of(message[0]), message[1])
        self.end()

    def end(self) -> None:
        """Sends the empty message to the next rank, unless that is the first, and closes the ring."""
        if not self._ends:
            self._ring.send([])
        self._ring.close()

    def chosen(self) -> tuple[int, int]:
        """Receives a text's number and the token that the last rank chose for it."""
        (number, token), _ = self._ring.receive()
        return number, token


@dataclass
class _Active:
    """An active text: its result so far, the slot of its caches, its length, and the builder of its steps."""

    result: Result
    slot: int
    position: int
    builder: StepBuilder


def pipeline(stage: Stage, under_way: int, token_log: TokenLog) -> Iterator[Result]:
    """Continues every text, `under_way` of them at a time, and yields the results in the texts' order.

    The first rank calls it; with slices, every rank does. Each result equals that of `generate` with the same seed. A
    prompt that cannot be run becomes a result with an error; the others go on.

    Raises:
        LostPeerError: a rank ended, or did not answer in time.
    """
    return in_order(_ended(stage, under_way, token_log))


def _ended(stage: Stage, under_way: int, token_log: TokenLog) -> Iterator[Result]:
    """Yields the results of `pipeline` in the order in which texts end."""
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
    """Begins a text; returns its result if that is an error or an earlier run has finished the text."""
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
