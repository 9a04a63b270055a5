"""A model and its tokenizer together: text in, text out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Generator as Pieces
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import checkpoints
from ffjax.broken import NotFiniteError
from ffjax.decode import Implementation
from ffjax.model import Transformer
from ffjax.prefill.choice import Prefill
from ffjax.sampling.params import SamplingParams
from ffjax.speculation.choice import Speculation, checked_speculation
from ffjax.text.asked import Asked, completed, prompt_tokens, samples, with_overrides
from ffjax.text.batches import TextBatch, texts
from ffjax.text.completion import Completion
from ffjax.text.defaults import default_sampling
from ffjax.text.stream import TextStream
from ffjax.text.tokenizers import load_tokenizer
from ffjax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ffjax.text.session import ChatSession

__all__ = ["Generator"]


class Generator:
    """Writes texts with a model.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        sampling: how tokens are chosen where a call does not say.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        sampling: SamplingParams | None = None,
        implementation: Implementation | None = None,
        prefill: Prefill | None = None,
        speculation: Speculation | None = None,
    ):
        """Compiles nothing yet.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            sampling: how tokens are chosen where a call does not say. None: greedily.
            implementation: of the decode steps; see `ffjax.generate`.
            prefill: of the prefill; see `ffjax.generate`.
            speculation: see `ffjax.generate`. Prompts then run up to 4 at a time, or 8 // T.
                Conversations go as far as a draft model does, too.

        Raises:
            ValueError: there is no speculation of that name, or the draft model does not fit.
            TypeError: it is no speculation.
        """
        self.model, self.tokenizer = model, tokenizer
        self.sampling = SamplingParams() if sampling is None else sampling
        self._how: dict[str, Any] = {"implementation": implementation, "prefill": prefill}
        self._speculation = checked_speculation(speculation, model)
        self._chat: ChatSession | None = None

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        dtype: Any = None,
        ignore_fields: Collection[str] = (),
        weights: Literal["int8", "int4"] | None = None,
        sampling: SamplingParams | None = None,
        implementation: Implementation | None = None,
        prefill: Prefill | None = None,
        speculation: Speculation | None = None,
    ) -> Generator:
        """Loads a model with its tokenizer, and how it wants tokens chosen.

        Args:
            path: as `ffjax.load` takes it. None: the shipped model.
            dtype: as in `ffjax.load`.
            ignore_fields: as in `ffjax.load`.
            weights: "int8" or "int4", to quantize; see `ffjax.quantize`. None: as they are.
            sampling: how tokens are chosen where a call does not say. None: as the
                `generation_config.json` that lies with the model says, else greedily.
            implementation: of the decode steps; see `ffjax.generate`.
            prefill: of the prefill; see `ffjax.generate`.
            speculation: as in `Generator`.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: what is there cannot be loaded, see `ffjax.load`; or there is no speculation
                of that name, or the draft model does not fit.
            NotImplementedError: the tokenizer needs the extra `hf`.
        """
        path = checkpoints.SHIPPED_MODEL if path is None else path
        model = checkpoints.load(path, dtype=dtype, ignore_fields=ignore_fields)
        tokenizer = load_tokenizer(path, model.config)
        if sampling is None:
            sampling = default_sampling(path)
        if weights is not None:
            from ffjax.quantization import quantize

            model = quantize(model, weights)
        return cls(
            model,
            tokenizer,
            sampling=sampling,
            implementation=implementation,
            prefill=prefill,
            speculation=speculation,
        )

    @overload
    def generate(
        self, prompts: str, sampling: SamplingParams | None = None, **overrides: Any
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: list[str] | tuple[str, ...],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **overrides: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: Any,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        **overrides: Any,
    ) -> Any:
        """Goes on from texts.

        Several prompts run side by side, as many at a time as a step takes. Each draws with the
        noise that it has alone; logits of another batch may differ in their last bits.

        Args:
            prompts: a text, or several.
            sampling: how tokens are chosen, and what ends a text: for all, or one for each prompt.
                None: as `self.sampling` says. Without `max_tokens`, up to 1024 tokens, as far as
                there is room; without `seed`, each text draws with a seed of its own.
            n: how many texts of each prompt. The seed of a text is one more than that of the text
                before it.
            overrides: fields of `SamplingParams` that replace those, as in `temperature=0.8`.

        Returns:
            A completion of a text, a list of them of several. Where `n` is above 1, a list of n
            completions stands in the place of each.

        Raises:
            ValueError: a prompt is empty, or too long with its new tokens for the model's context;
                or an option is out of range.
            TypeError: an argument is of the wrong kind.
            NotFiniteError: the logits of a text were NaN or infinite. Its `completions` are what
                came before, of this text, those beside it and all before them.
        """
        alone = isinstance(prompts, str)
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        params = self._params(sampling, len(rows), overrides)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n is how many texts of each prompt, at least 1; got {n!r}.")
        asked = [self.asked(row, one) for row, one in zip(rows, params, strict=True)]
        each = [one for row in asked for one in samples(row, n)]
        out: list[Completion] = []
        try:
            how = {**self._how, "speculation": self._speculation}
            out.extend(texts(self.model, self.tokenizer, each, **how))
        except NotFiniteError as error:
            error.completions = out + (error.completions or [])
            raise
        grouped = out if n == 1 else [out[i : i + n] for i in range(0, len(out), n)]
        return grouped[0] if alone else grouped

    def stream(
        self, prompt: str, sampling: SamplingParams | None = None, **overrides: Any
    ) -> TextStream:
        """Goes on from a text, piece by piece.

        Args:
            prompt: the text.
            sampling: as in `generate`.
            overrides: as in `generate`.

        Returns:
            An iterator over pieces of the new text.

        Raises:
            ValueError: as `generate`, before the first piece.
            TypeError: likewise.
            NotFiniteError: the iterator does.
        """
        [params] = self._params(sampling, 1, overrides)
        return self.stream_asked(self.asked(prompt, params))

    def stream_asked(self, asked: Asked) -> TextStream:
        """Goes on from token ids, piece by piece.

        Args:
            asked: the prompt, and how; from `asked`, or `completed` by hand.
        """
        how = {**self._how, "speculation": self._speculation}
        batch = TextBatch(self.model, self.tokenizer, [asked], **how)
        return TextStream(_pieces(batch), lambda: batch.completions()[0])

    def asked(self, prompt: str, sampling: SamplingParams) -> Asked:
        """What a text asks of the model: its token ids, and how to go on from them.

        Raises:
            ValueError: the prompt is empty.
            TypeError: it is no text.
        """
        tokens = prompt_tokens(self.tokenizer, prompt)
        return Asked(tokens, completed(sampling, tokens, self.model.config))

    def session(self, *, capacity: int | None = None) -> ChatSession:
        """A conversation with a cache of its own.

        Args:
            capacity: positions of the cache to begin with; it grows. None: what the first reply
                needs.
        """
        from ffjax.text.session import ChatSession

        return ChatSession(
            self.model,
            self.tokenizer,
            sampling=self.sampling,
            capacity=capacity,
            speculation=self._speculation,
            **self._how,
        )

    def stream_chat(
        self, messages: Sequence[Any], sampling: SamplingParams | None = None, **how: Any
    ) -> TextStream:
        """Writes the next message of a conversation, piece by piece.

        The cache is kept for the next call, which feeds only what is new: of one conversation.
        For several by turns, `session`.

        Args:
            messages: as in `ChatSession.reply`.
            sampling: as in `ChatSession.reply`.
            how: as in `ChatSession.reply`.

        Raises:
            ValueError: as `ChatSession.reply`.
            TypeError: likewise.
            NotFiniteError: the iterator does.
        """
        if self._chat is None:
            self._chat = self.session()
        return self._chat.reply(messages, self.sampling if sampling is None else sampling, **how)

    def chat(
        self, messages: Sequence[Any], sampling: SamplingParams | None = None, **how: Any
    ) -> Completion:
        """Writes the next message of a conversation; as `stream_chat`, all at once."""
        with self.stream_chat(messages, sampling, **how) as stream:
            for _ in stream:
                pass
            return stream.completion

    def _params(self, sampling: Any, count: int, overrides: dict[str, Any]) -> list[SamplingParams]:
        """The parameters of each prompt."""
        if sampling is None or isinstance(sampling, SamplingParams):
            one = with_overrides(self.sampling if sampling is None else sampling, overrides)
            return [one] * count
        if isinstance(sampling, str | bytes) or not isinstance(sampling, Sequence):
            raise TypeError(
                f"sampling is a SamplingParams, or one for each prompt; got {sampling!r}."
            )
        if len(sampling) != count:
            raise ValueError(
                f"sampling is one for all prompts or one for each; there are {len(sampling)} for "
                f"{count} prompt{'' if count == 1 else 's'}."
            )
        return [with_overrides(one, overrides) for one in sampling]


def _pieces(batch: TextBatch) -> Pieces[str, None, None]:
    try:
        for [piece] in batch:
            if piece:
                yield piece
    finally:
        batch.close()
