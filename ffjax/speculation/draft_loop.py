"""The device's side of a generation with a draft model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ffjax.cache import KVCache
from ffjax.decode import Implementation
from ffjax.loop import Made, slots_for
from ffjax.model import Transformer
from ffjax.parts import Parts
from ffjax.prefill.choice import Prefill, prefill_of, resolve_prefill
from ffjax.requests import Request
from ffjax.sampling.rows import Rows, Stages
from ffjax.settings import program_settings
from ffjax.speculation.draft import Draft, check_draft, check_draft_context
from ffjax.speculation.drafting import FIRST_TOKENS, ModelSource, draft_implementation
from ffjax.speculation.loop import SpeculativeLoop
from ffjax.speculation.source import Source

__all__ = ["DraftLoop"]


class DraftLoop(SpeculativeLoop):
    """A `SpeculativeLoop` whose drafts are written by a second model.

    That one has a cache and a prefill of its own. The prefill runs after the model's, so that the
    first token does not wait for it; the first step does.
    """

    def __init__(
        self,
        model: Transformer,
        request: Request,
        draft: Draft,
        implementation: Implementation | None = None,
        prefill: Prefill | None = None,
        *,
        make: Callable[..., Source] = ModelSource,
    ):
        """Compiles what is not compiled yet.

        Args:
            model: the model.
            request: what is asked for.
            draft: the draft model, and T.
            implementation: of the decode steps of both models; see `ffjax.decode_step`. None: for
                each the best that can run.
            prefill: of both prefills; see `ffjax.generate`. "steps" is for the model alone.
            make: takes the fields of a `ModelSource`; what it returns has its weights and state.

        Raises:
            ValueError: the draft model does not fit; or as `Loop`.
            NotImplementedError: as `SpeculativeLoop`; or the same of the draft model.
        """
        check_draft(draft, model)
        check_draft_context(draft, request)
        assert draft.tokens is not None, "T is chosen for a batch"
        parts = Parts.of(draft.model)
        with jax.default_device(parts.device):
            size = request.batch, slots_for(request.capacity)
            chosen = draft_implementation(parts, *size, implementation)
        self._draft, self._draft_prefill = parts, None
        source = make(graphdef=parts.graphdef, tokens=draft.tokens, implementation=chosen)
        super().__init__(model, request, source, implementation, prefill)

    def _prepare(
        self,
        model: Transformer,
        request: Request,
        implementation: Implementation | None,
        prefill: Prefill | None,
    ) -> None:
        super()._prepare(model, request, implementation, prefill)
        if request.max_new_tokens == 1:  # the prefill makes it
            return
        parts, stages = self._draft, Stages()
        size = request.batch, self._cache.capacity
        last = jnp.zeros((request.batch, parts.config.model_dim), jnp.float32)
        self._weights = parts.state
        self._held = KVCache.create(parts.config, *size, parts.dtype, tokens=FIRST_TOKENS)
        prefill = None if prefill == "steps" else prefill
        name = resolve_prefill(parts.dtype, parts.device, implementation, prefill)
        self._draft_prefill = prefill_of(parts, request, size[1], Rows(), stages, last, name)

    def _compiled_block(self) -> Any:
        assert self._draft_prefill is not None
        self._draft_prefill.compile(self._held, None)
        return super()._compiled_block()

    def prefill(self) -> Made:
        """Feeds the prompts to both models; returns the first new token of each."""
        made = super().prefill()
        if self._draft_prefill is not None:
            with jax.default_device(self._device), program_settings():
                self._held, _, _ = self._draft_prefill.run(self._held, None)
        return made
