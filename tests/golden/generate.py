"""Writes the golden files that Python and C++ are both tested against. Run it again when the built-in model changes.

python -m tests.golden.generate
"""

import json
import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from export.checkpoints.layouts import BUILT_IN
from export.llama import export_llama
from export.planning.jinja_reduction import reduced
from export.planning.plan import ExportOptions
from preproc.chat_template import NAMED
from preproc.jinja_template import JinjaTemplate, to_file
from preproc.mask import HIDDEN
from preproc.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIALS, Tokenizer, open_tokenizer
from runtime.engine import session_file
from runtime.engine.memory_budget import MARGIN
from runtime.engine.program import SMALL, Program
from runtime.engine.session import SINKS, Session
from runtime.pte.metadata import FORMAT_VERSION, STREAM
from runtime.text.conversation import ANSWER_SHARE
from runtime.text.generation import GenerationOptions, StopFilter, generate
from runtime.text.prompts import prompt_ids
from runtime.text.sampler import Rng, SamplingOptions, logprobs, sample
from tests.support.chat_templates import PUBLIC
from tests.support.prescribed import steps_of

GOLDEN = Path(__file__).parent
MODELS = GOLDEN.parent.parent / "build" / "models"
STORIES = GOLDEN.parent.parent.parent / "shared" / "data" / "stories260K"

OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.8, top_p=0.9),
    SamplingOptions(temperature=0.7, top_k=5),
    SamplingOptions(temperature=1.3, top_k=12, top_p=0.5),
    SamplingOptions(temperature=0.01),
    SamplingOptions(temperature=100.0, top_p=0.999),
    SamplingOptions(temperature=1.0, top_k=1),
    SamplingOptions(temperature=1.0, top_k=1000, top_p=1e-9),
]
PENALISED = [
    SamplingOptions(temperature=1.0, min_p=0.2),
    SamplingOptions(temperature=1.5, top_k=9, top_p=0.95, min_p=0.05),
    SamplingOptions(repetition_penalty=1.3),
    SamplingOptions(presence_penalty=0.75, penalty_window=3),
    SamplingOptions(temperature=0.9, frequency_penalty=0.3, penalty_window=8),
    SamplingOptions(temperature=0.7, repetition_penalty=0.8, presence_penalty=-0.2, frequency_penalty=0.1),
    SamplingOptions(temperature=1.2, top_p=0.9, min_p=0.01, repetition_penalty=1.7, frequency_penalty=0.6),
]
"""Options with penalties, sampled with and without biases."""
RECENT = [0, 3, 0, 5, 0, 2, 1, 6]
DRAWS = 12
CONTENTS = [
    "Once upon a time",
    "\n  two\tlines \n\u3000\n and space \x1c\u2029 ",
    "\u00e9t\u00e9 \u65e5\u672c \U0001f642 naïve",
    "",
    "</s><s>[INST] sly [/INST]</s>",
    " \n",
    "Lily had a dog. <|im_end|>",
]
"""Contents of chat messages."""
RUNS = [
    ("", SamplingOptions(), 0, 200),
    ("", SamplingOptions(temperature=0.8), 7, 120),
    ("Once upon a time, there was a big red dog", SamplingOptions(temperature=0.8, top_p=0.9), 2**63, 80),
    ("The \N{SNOWMAN} said: \u65e5\u672c", SamplingOptions(temperature=1.2, top_k=20), 3, 60),
    ("A long way. " * 20, SamplingOptions(), 0, 40),
]


def _logits() -> list[list[float]]:
    """Returns rows of float32 logits: of order 1, of order 10, with ties, all equal, some hidden, all but one hidden, a
    single token.
    """
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(64, generator=generator)
    ties = torch.randint(0, 4, (40,), generator=generator).float()
    hidden = torch.where(torch.rand(32, generator=generator) < 0.5, torch.tensor(-1e9), plain[:32])
    single = torch.full((16,), -torch.finfo(torch.float32).max)
    single[9] = 0
    rows = [plain, 10 * plain, ties, torch.zeros(7), hidden, single, torch.tensor([2.5])]
    return [row.tolist() for row in rows]


def _shown(options: SamplingOptions) -> dict[str, Any]:
    """Returns the options that every case has, and those that differ from their defaults."""
    usual = vars(SamplingOptions())
    always = ("temperature", "top_k", "top_p")
    return {name: value for name, value in vars(options).items() if name in always or value != usual[name]}


def _penalised(number: int, logits: list[float]) -> list[dict[str, Any]]:
    """Returns cases of tokens sampled with penalties, which depend on the tokens before."""
    cases = []
    biases: list[dict[int, float]] = [{}, {0: -1.5, len(logits) - 1: 0.625}]
    for options in (replace(options, logit_bias=bias) for options in PENALISED for bias in biases):
        rng, start = Rng(number), [token % len(logits) for token in RECENT]
        recent = list(start)
        for _ in range(DRAWS):
            recent.append(sample(torch.tensor(logits), options, rng, recent))
        case = {"logits": number, "seed": number, "recent": start, "tokens": recent[len(start) :]}
        cases.append(case | _shown(options))
    return cases


def _logprobs() -> list[dict[str, Any]]:
    rows = []
    for number, logits in enumerate(_logits()):
        for token, k in ((0, 0), (len(logits) - 1, 1), (len(logits) // 2, 5), (0, 1000)):
            logprob, top = logprobs(torch.tensor(logits), token, k)
            rows.append({"logits": number, "token": token, "k": k, "logprob": logprob, "top_logprobs": top})
    return rows


def sampler() -> dict[str, Any]:
    """Returns values of the random generator, tokens sampled from rows of logits, and log-probabilities."""
    seeds = [0, 1, 7, 2**32, 2**63, 2**64 - 1]
    coins = []
    for seed in seeds:
        rng = Rng(seed)
        coins.append({"seed": seed, "values": [rng.coin() for _ in range(4)]})
    cases = []
    for number, logits in enumerate(_logits()):
        for options in OPTIONS:
            rng = Rng(number)
            tokens = [sample(torch.tensor(logits), options, rng) for _ in range(DRAWS)]
            cases.append({"logits": number, "seed": number, "tokens": tokens, **_shown(options)})
    for number, logits in enumerate(_logits()):
        cases += _penalised(number, logits)
    return {"coins": coins, "logits": _logits(), "cases": cases, "logprobs": _logprobs()}


ONLY_PYTHON = {"typical_p", *(name for name in vars(SamplingOptions()) if name.startswith(("dry_", "mirostat")))}
"""Options of sampling that the C++ runner lacks."""


def constants() -> dict[str, Any]:
    """Returns the constants that are defined in both languages and must be equal."""
    return {
        "format_version": FORMAT_VERSION,
        "session_version": session_file.VERSION,
        "stream": STREAM,
        "small": SMALL,
        "margin": MARGIN,
        "sinks": SINKS,
        "answer_share": ANSWER_SHARE,
        "hidden": HIDDEN,
        "sampling": {name: value for name, value in vars(SamplingOptions()).items() if name not in ONLY_PYTHON},
        "llama3_pattern": LLAMA3_PATTERN,
        "llama3_specials": list(LLAMA3_SPECIALS),
    }


def _ends(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Returns cases for every way in which a text ends, and for characters split over tokens."""
    (stop,) = tokenizer.stop_ids
    byte = {tokenizer.piece(token, first=False): token for token in reversed(range(tokenizer.vocab_size))}
    once, snowman = tokenizer.encode("Once upon a time, there was"), [byte[bytes([b])] for b in "\N{SNOWMAN}".encode()]
    half = [*once[:4], *snowman[:2]]
    split = [*once[:2], *snowman, *once[2:]]
    return [
        {"name": "a stop token", "tokens": [*once, stop]},
        {"name": "a stop token at once", "tokens": [stop]},
        {"name": "max_new_tokens", "tokens": once, "max_new_tokens": 3},
        {"name": "the context is full", "tokens": once, "capacity": 5},
        {"name": "a stop string within a token", "tokens": once, "stop_strings": ["pon"]},
        {"name": "a stop string that ends a token", "tokens": once, "stop_strings": ["upon"]},
        {"name": "a stop string over several tokens", "tokens": once, "stop_strings": ["n a time, t"]},
        {"name": "a stop string that is the text's beginning", "tokens": once, "stop_strings": ["Once up"]},
        {"name": "the earlier of two", "tokens": once, "stop_strings": ["there", "time"]},
        {"name": "one inside another", "tokens": once, "stop_strings": ["upon a time", "on"]},
        {"name": "one inside another that never comes", "tokens": once, "stop_strings": ["upon a house", "on"]},
        {"name": "one inside another, at the end", "tokens": [*once[:3], stop], "stop_strings": ["upon a house", "on"]},
        {"name": "held back and given out", "tokens": [*once, stop], "stop_strings": ["upon a house", "there!"]},
        {
            "name": "held back until max_new_tokens",
            "tokens": once,
            "stop_strings": ["a time, therefore"],
            "max_new_tokens": 6,
        },
        {"name": "held back until a stop token", "tokens": [*once, stop], "stop_strings": ["was not"]},
        {"name": "held back until the context is full", "tokens": once, "stop_strings": ["time!"], "capacity": 4},
        {"name": "stopped by the last token", "tokens": once, "stop_strings": ["upon"], "max_new_tokens": 2},
        {"name": "a character over three tokens", "tokens": [*split, stop]},
        {"name": "a stop string that such a character ends", "tokens": split, "stop_strings": ["on\N{SNOWMAN}"]},
        {"name": "a stop string that is one", "tokens": split, "stop_strings": ["\N{SNOWMAN}"]},
        {"name": "a stop string that begins with one", "tokens": split, "stop_strings": ["\N{SNOWMAN} a t"]},
        {"name": "another character of the same first bytes", "tokens": [*split, stop], "stop_strings": ["\N{CLOUD}"]},
        {"name": "a character left open by a stop token", "tokens": [*half, stop]},
        {"name": "a character left open by max_new_tokens", "tokens": half, "max_new_tokens": len(half)},
        {"name": "a character left open by the context", "tokens": half, "capacity": len(half)},
        {"name": "bytes that are none", "tokens": [*once[:2], snowman[1], *half[4:], *once[2:], stop]},
        {
            "name": "a stop string of what is no character",
            "tokens": [*half, *once],
            "stop_strings": ["\N{REPLACEMENT CHARACTER} "],
        },
        {"name": "a character that the prompt began", "prompt": half, "tokens": [snowman[2], *once, stop]},
        {
            "name": "a stop string across the prompt's end",
            "prompt": once[:4],
            "tokens": [*once[4:], stop],
            "stop_strings": ["time, there"],
        },
    ]


def finish() -> dict[str, Any]:
    """Returns every step of texts with prescribed tokens, and random pieces of text through a StopFilter."""
    tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    usual = {"prompt": [1], "capacity": 40, "max_new_tokens": None, "stop_strings": []}
    cases = []
    for case in (usual | case for case in _ends(tokenizer)):
        case |= {"stop_ids": list(tokenizer.stop_ids), "vocab_size": tokenizer.vocab_size}
        cases.append(case | {"steps": steps_of(case, tokenizer)})
    draw = random.Random(1)
    filters = []
    for _ in range(150):
        stops = ["".join(draw.choices("ab\N{SNOWMAN}", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        pieces = ["".join(draw.choices("ab\N{SNOWMAN}", k=draw.randint(0, 4))) for _ in range(draw.randint(1, 6))]
        stop_filter = StopFilter(stops)
        given = [*(stop_filter.add(piece) for piece in pieces), stop_filter.finish()]
        filters.append({"stop_strings": stops, "pieces": pieces, "given": given, "stopped": stop_filter.stopped})
    return {"cases": cases, "filters": filters}


def generation(path: Path) -> dict[str, Any]:
    """Returns what a model generates for some prompts, ids and text, and the identity of its checkpoint."""
    program = Program(path)
    runs = []
    for prompt, sampling, seed, length in RUNS:
        ids = prompt_ids(program, prompt)
        options = GenerationOptions(sampling, length, program.metadata.stop_ids)
        steps = list(generate(Session(program), ids, options, Rng(seed), program.tokenizer))
        run = {"prompt": prompt, "prompt_ids": ids, "seed": seed, "max_new_tokens": length, **_shown(sampling)}
        runs.append(run | {"ids": [step.token for step in steps], "text": "".join(step.text for step in steps)})
    return {"checkpoint": program.metadata.provenance["checkpoint"], "runs": runs}


def chat() -> dict[str, Any]:
    """Returns conversations rendered by each named and public template, with ids from the built-in tokenizer. Its BOS
    and EOS stand for the template's special tokens; other models' special tokens are encoded as ordinary text.
    """
    tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    public = {name: reduced(JinjaTemplate(public.source, "<s>", "</s>")) for name, public in PUBLIC.items()}
    now = datetime(2026, 2, 3, 12, 30)
    cases = []
    for template in (NAMED | public).values():
        for number in range(6):
            contents = [CONTENTS[(number + 2 * i) % len(CONTENTS)] for i in range(1 + 2 * (number % 3))]
            messages = [("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
            if template.system and number % 2:
                messages = [("system", CONTENTS[number]), *messages]
            case = {"template": to_file(None, template), "messages": messages, "text": template.text(messages, now)}
            end_id = template.end_id(tokenizer, tokenizer.bos_id)
            ids = tokenizer.encode_parts(template.parts(messages, now))
            cases.append(case | {"ids": ids, "end_id": end_id})
    return {"now": [now.year, now.month, now.day, now.hour, now.minute], "cases": cases}


def write(name: str, content: dict[str, Any]) -> None:
    """Writes one line per entry, for readable diffs."""
    parts = []
    for key, value in content.items():
        items = ",\n".join(json.dumps(item) for item in value) if isinstance(value, list) else None
        parts.append(f"{json.dumps(key)}: " + (json.dumps(value) if items is None else f"[\n{items}\n]"))
    (GOLDEN / name).write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    """Writes all golden files; that of stories260K only if ../shared/data has the model."""
    write("constants.json", constants())
    write("sampler.json", sampler())
    write("chat.json", chat())
    write("finish.json", finish())
    tiny = ExportOptions(checkpoint=BUILT_IN, max_seq_len=512, output=MODELS / "tiny.pte")
    write("tiny.json", generation(export_llama(tiny)))
    if STORIES.is_dir():
        stories = ExportOptions(
            checkpoint=STORIES / "stories260K.bin",
            tokenizer=STORIES / "tok512.model",
            max_seq_len=512,
            output=MODELS / "stories260K.pte",
        )
        write("stories260K.json", generation(export_llama(stories)))


if __name__ == "__main__":
    main()
