"""The command that runs a model on several machines, each of which has some of its blocks, and pipeline(); or, of
slices, a part of every block.

torchrun --nproc-per-node 2 -m runtime.pipeline llama.shards --prompts-file prompts.txt
torchrun --nnodes 3 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
    -m runtime.pipeline llama.shards --prompts-file prompts.txt --journal run.journal

The first rank hands each text's tokens on, the last one chooses the next; several texts are under way, so that all
ranks have work. Every host has the shards that it is to run, or all; the first has the prompts and prints the results.
Of slices each rank makes every step, and so chooses the same tokens.
"""

from model import command

if __name__ == "__main__":
    command.start("runtime.pipeline")

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from model.errors import InputError
from runtime.batch import Result, in_order, print_results, read_prompts
from runtime.flags import add_generation_flags, add_program_flags, generation_options
from runtime.generation import Chooser, GenerationOptions, Teller, check_ids
from runtime.journal import Journal
from runtime.peers import Peers, Ring, Sums, place
from runtime.plan import Host, read_hosts
from runtime.program import Program
from runtime.sampler import Rng
from runtime.session import Session, check_prompt
from runtime.shares import here, shares


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
        chunk = max(method.max_length for method in self.metadata.methods)
        for start in range(0, len(tokens), chunk):
            end = min(start + chunk, len(tokens))
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
    teller: Teller


def pipeline(stage: Stage, under_way: int, journal: Journal) -> Iterator[Result]:
    """Continues every text from the first rank, `under_way` of them together, and yields the results in their order,
    each as `generate` would have it with a seed of its own.

    A prompt that cannot be run becomes a result; the others go on.

    Raises:
        LostPeerError: a rank ended, or did not answer in time.
    """
    return in_order(_ended(stage, under_way, journal))


def _ended(stage: Stage, under_way: int, journal: Journal) -> Iterator[Result]:
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
        journal.add(number, token)
        text = active[number]
        text.result.steps.append(text.teller.tell(token, text.position == stage.metadata.max_seq_len))
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
        teller = Teller(prompt, texts.options, stage.tokenizer)
    except InputError as error:
        return Result(number, error=str(error))
    result, capacity = Result(number), stage.metadata.max_seq_len
    for count, token in enumerate(texts.done.get(number, ())):
        result.steps.append(teller.tell(token, len(prompt) + count == capacity))
        if result.steps[-1].finish_reason:
            return result
    return _Active(result, slot, stage.begin(slot, number), teller)


def _texts(program: Program, peers: Peers, options: argparse.Namespace) -> tuple[Texts, Journal]:
    """What the first rank was given, on every rank, and its journal; the others keep none.

    Raises:
        InputError: it cannot be used, or the ranks were given different options.
    """
    metadata = program.metadata
    generation = replace(generation_options(options), stop_ids=metadata.stop_ids)
    check_ids(generation.sampling, metadata.config.vocab_size)
    given = peers.shared([repr(generation), options.seed])
    for rank, other in enumerate(given):
        if other != given[0]:
            raise InputError(f"rank {rank} was given {other}, and rank 0 {given[0]}; give all the same options")

    def read() -> tuple[list[Any], Journal] | None:
        if peers.rank > 0:
            return None
        prompts = read_prompts(options.prompts_file, program)
        said = [str(prompt) if isinstance(prompt, InputError) else list(prompt) for prompt in prompts]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        run = {"model": metadata.identity.hex(), "prompts": digest, "options": given[0]}
        return said, Journal(options.journal, run)

    first = peers.together(read)
    said, done = peers.shared([first[0], list(first[1].tokens.items())] if first else None)[0]
    prompts = [InputError(prompt) if isinstance(prompt, str) else prompt for prompt in said]
    return Texts(prompts, dict(done), generation, options.seed), first[1] if first else Journal(None, {})


def _run(options: argparse.Namespace, peers: Peers) -> int:
    threads = peers.together(lambda: place(options.threads))
    under_way = options.texts or 2 * peers.count
    mine = shares(options.folder, peers, lambda sizes: _host(options, peers, threads, sizes), under_way)
    sliced = mine[0].slices > 1
    program = peers.together(
        lambda: Program(
            [Path(part.path) for part in mine],
            threads=threads,
            check=not options.no_check,
            memory_budget=options.memory_budget,
            partial=not sliced,
            group=Sums(peers) if sliced and peers.count > 1 else None,
        )
    )
    texts, journal = _texts(program, peers, options)
    stage = Stage(program, Ring(peers, program.metadata.config.dim, alone=sliced), texts)
    if peers.rank > 0 and not sliced:
        stage.follow()
        return 0
    results = pipeline(stage, 1 if sliced else under_way, journal)
    if peers.rank > 0:
        return 1 if [result for result in results if result.error is not None] else 0
    return print_results(results, f"{peers.count} ranks", known=sum(map(len, texts.done.values())))


def _host(options: argparse.Namespace, peers: Peers, threads: int | None, sizes: Sequence[int]) -> Host:
    """What this rank can do: as the file of hosts says, or as it finds."""
    if options.hosts is None:
        return here(threads or os.cpu_count() or 1, options.memory_budget, sizes)
    hosts = read_hosts(options.hosts, sizes)
    if len(hosts) != peers.count:
        raise InputError(f"--hosts {options.hosts} has {len(hosts)} hosts, and there are {peers.count} ranks")
    return hosts[peers.rank]


def main(arguments: list[str] | None = None) -> int:
    """The command: from the first rank a JSON object for each prompt to stdout, in their order, and the throughput to
    stderr; exit code 0, 1 where a prompt could not be run, or 2 for bad input or a lost rank.
    """
    options = _parser().parse_args(arguments)
    generation_options(options)
    if options.texts is not None and options.texts < 1:
        raise InputError(f"--texts {options.texts} is impossible; give 1 or more")
    peers = Peers(options.timeout)
    try:
        return _run(options, peers)
    finally:
        peers.close()


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.pipeline", "Runs the shards of a model on several machines.", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="the shards or slices; on each host those that it is to run, or all")
    add(
        "--prompts-file",
        type=Path,
        required=True,
        metavar="FILE",
        help="as for runtime.batch; the first rank's is read",
    )
    add(
        "--texts",
        type=int,
        metavar="N",
        help="so many are under way together; of slices always one (default: two for each rank)",
    )
    add("--journal", type=Path, metavar="FILE", help="the first rank keeps every token here, and goes on behind them")
    add(
        "--hosts",
        type=Path,
        metavar="FILE",
        help="of each rank's host, see runtime.plan: who gets which shards (default: by free memory and its speed)",
    )
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for a rank (default: %(default)g)")
    add_generation_flags(parser)
    add_program_flags(parser)
    return parser
