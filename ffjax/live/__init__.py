"""A batch whose sequences come and go: what chats and the server run on.

`batch` is what its owner sees, `made` what it reads, `state` what lies on the device, `programs`
what runs there. A `feeder` feeds prompts to the model; a draft model has one of its own.
"""

from ffjax.live.batch import LiveBatch
from ffjax.live.made import Block, Chosen, Fed

__all__ = ["Block", "Chosen", "Fed", "LiveBatch"]
