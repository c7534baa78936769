"""One thing that a user should know of a compiled step."""

import dataclasses

from zerojax.plan import provenance


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something a user should know. `wrong`: ZeRO does not explain it, and `Plan.check` raises.

    Attributes:
      what: a sentence, with what to do about it.
      instruction, source: in the compiled program, and the user's line, "file:line"; empty where it is about the whole.
      bytes: sent or kept on each device.
    """

    what: str
    bytes: float = 0.0
    instruction: str = ""
    source: str = ""
    wrong: bool = False

    def __str__(self):
        return self.what + (f" From {provenance.readable(self.source)}" if self.source else "")
