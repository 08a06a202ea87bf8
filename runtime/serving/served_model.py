"""Model: the model that a server serves; and Access: who may use it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from preproc.jinja_template import Carried
from preproc.tokenizer import Tokenizer
from runtime.engine.program import Program
from runtime.pte.metadata import Metadata
from runtime.text.sampler import SamplingOptions


@dataclass(frozen=True)
class Model:
    """The served model.

    Attributes:
        name: its name in requests.
        created: modification time of the file, in seconds since 1970.
        program, tokenizer: the opened file and its tokenizer.
        template: the chat template; None if there is none.
    """

    name: str
    created: int
    program: Program
    tokenizer: Tokenizer
    template: Carried | None

    @property
    def metadata(self) -> Metadata:
        """The contents of the file other than graph and weights."""
        return self.program.metadata

    @property
    def sampling(self) -> dict[str, float]:
        """The sampling options of a request that gives none: the checkpoint's recommendations, or no restriction."""
        plain = SamplingOptions(temperature=1.0)
        names = ("temperature", "top_k", "top_p", "min_p")
        return {name: getattr(plain, name) for name in names} | dict(self.metadata.sampling)

    def warnings(self, asked: str | None) -> list[str]:
        """Returns a sentence if a request asked for another model."""
        if asked in (None, self.name):
            return []
        return [f"model {json.dumps(asked, ensure_ascii=False)} is not served; {self.name} answered"]


@dataclass(frozen=True)
class Access:
    """Limits on requests.

    Attributes:
        api_key: the key that requests must have; None for no key.
        max_body: maximum size of a request's body in bytes.
        origins: the origins whose pages may use the server, beside this machine; "*" is any.
    """

    api_key: str | None
    max_body: int
    origins: Sequence[str] = ()
