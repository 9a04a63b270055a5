"""A batch whose sequences come and go: what chats and the server run on.

`batch` is what its owner sees, `state` what lies on the device, `programs` what runs there.
"""

from ffjax.live.batch import Block, Chosen, Fed, LiveBatch

__all__ = ["Block", "Chosen", "Fed", "LiveBatch"]
