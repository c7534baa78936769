"""One thing that a user should know about a compiled step."""

import dataclasses

from zerojax.plan import provenance


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a user should know.

    Attributes:
      what: a sentence that describes it, with advice.
      bytes: the bytes that each device sends or keeps because of it.
      instruction: its name in the compiled program; empty for a finding about the whole program.
      source: the user's line that causes it, "file:line"; empty if it is not known.
      wrong: whether ZeRO does not explain it, so that `Plan.check` raises.
    """

    what: str
    bytes: float = 0.0
    instruction: str = ""
    source: str = ""
    wrong: bool = False

    def __str__(self) -> str:
        return self.what + (f" From {provenance.readable(self.source)}" if self.source else "")
