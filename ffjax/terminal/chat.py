"""The chat itself: reads messages and commands, prints answers."""

from __future__ import annotations

import dataclasses
import time
import traceback
from typing import Any

from ffjax.failures import sentence
from ffjax.terminal import commands
from ffjax.terminal.conversation import Conversation
from ffjax.terminal.figures import figures
from ffjax.terminal.interrupt import Stop, stops_the_answer
from ffjax.terminal.lines import Lines
from ffjax.terminal.messages import command_of, read_message
from ffjax.terminal.partner import Answer, Message, NewPartner, Partner, Pieces
from ffjax.terminal.screen import Screen

__all__ = ["Chat"]

_LEAVING = "Ctrl-D or /quit leaves, /help says more."


class Chat:
    """A conversation with a partner, at a terminal or in a pipe.

    At a terminal, what fails is a sentence, and the chat goes on. In a pipe nobody is there to
    mend it, and what follows would be answered out of its context: the error leaves `run`.

    Attributes:
        conversation: the messages.
        sampling: the parameters of the answers to come, `ffjax.SamplingParams`.
        screen: where it prints.
        files: those that this chat has read or written, which it may replace.
    """

    def __init__(
        self,
        new_partner: NewPartner,
        sampling: Any,
        screen: Screen,
        lines: Lines,
        *,
        context: int | None = None,
        shows_figures: bool = True,
        shows_traceback: bool = False,
        how: dict[str, Any] | None = None,
    ):
        """Has nothing said yet.

        Args:
            new_partner: makes the one that answers.
            sampling: its first parameters.
            screen: where to print.
            lines: what is typed.
            context: most tokens of a conversation and its answer; None: not known.
            shows_figures: whether a line of figures follows each answer.
            shows_traceback: whether Python's traceback is printed before an error's sentence.
            how: what else the partner's `reply` is given.
        """
        self.conversation = Conversation()
        self.sampling = sampling
        self.screen = screen
        self.files: set[Any] = set()
        self._new_partner = new_partner
        self._partner: Partner | None = None
        self._lines, self._context = lines, context
        self._shows_figures = shows_figures
        self._shows_traceback = shows_traceback
        self._how = how or {}
        self._retries = 0

    def run(self) -> None:
        """Until the lines end, or /quit.

        Raises:
            Exception: whatever fails in a pipe; at a terminal nothing does.
            KeyboardInterrupt: Ctrl-C in a pipe.
        """
        self.screen.read_any_bytes()
        try:
            while self._turn():
                pass
        finally:
            self._drop_partner()

    def _turn(self) -> bool:
        """Reads a message and sees to it; returns whether the chat goes on."""
        try:
            return self._see_to(read_message(self._lines))
        except EOFError:
            if self.screen.interactive:
                self.screen.note("")
            return False
        except KeyboardInterrupt:
            if not self.screen.interactive:
                raise
            self.screen.note(f"\n{_LEAVING}")
            return True
        except Exception as error:
            if not self.screen.interactive or isinstance(error, BrokenPipeError):
                raise
            if self._shows_traceback:
                self.screen.note("".join(traceback.format_exception(error)))
            # What is not finite says so itself; it is no fault of ours.
            is_ours = not isinstance(error, FloatingPointError)
            self.screen.note(sentence(error) if is_ours else str(error))
            return True

    def _see_to(self, text: str) -> bool:
        _check(text)
        if (command := command_of(text)) is not None:
            return commands.run(self, *command)
        if text.strip():
            before = list(self.conversation.messages)
            self.conversation.ask(text.strip())
            self._retries = 0
            self._answer(before)
        return True

    def again(self) -> None:
        """Answers the user's last message once more, with other draws.

        Raises:
            ValueError: there is none.
        """
        if not any(one["role"] == "user" for one in self.conversation.messages):
            raise ValueError("There is nothing to answer yet. Type a message.")
        before = list(self.conversation.messages)
        if self.conversation.take_back_answer():
            self._retries += 1
            if getattr(self.sampling, "temperature", 1) == 0:
                self.screen.note(
                    "At temperature 0 the answer comes out the same: /set temperature 0.7 draws."
                )
        self._answer(before)

    def _answer(self, before: list[Message]) -> None:
        """Has the partner answer, and prints it as it comes.

        What has been said before it was stopped stays. Where nothing was, or it fails, the
        conversation is as it was.

        Args:
            before: the messages, to go back to.
        """
        said: list[str] = []
        done = None
        try:
            done = self._reply(said)
        finally:
            if done is not None and said:
                self.conversation.answer("".join(said))
            else:
                self.conversation.messages = before
        if done is not None:
            self._say_of(done, bool(said))

    def _reply(self, said: list[str]) -> tuple[Answer, float | None, Stop] | None:
        """Prints an answer, and adds its pieces to `said`; None where it was broken off."""
        if not self.screen.interactive:
            return self._pieces(said, Stop())
        try:
            with stops_the_answer(self.screen.note) as stop:
                return self._pieces(said, stop)
        except KeyboardInterrupt:
            # It came anywhere: of the cache nothing is certain.
            self._drop_partner()
            self.screen.note("\nStopped.")
            return None

    def _pieces(self, said: list[str], stop: Stop) -> tuple[Answer, float | None, Stop]:
        started, first = time.perf_counter(), None
        self.screen.wait("Reading ..." if self._partner else "Compiling and reading ...")
        try:
            pieces = self._asked()
        except BaseException:
            self.screen.waited()
            raise
        try:
            for piece in pieces:
                if piece:
                    if first is None:
                        self.screen.waited()
                        first = time.perf_counter() - started
                    stop.began = True
                    said.append(piece)
                    self.screen.piece(piece)
                if stop.asked:
                    break
        except BaseException:
            if said:
                self.screen.piece("\n")
            raise
        finally:
            self.screen.waited()
            pieces.close()
        done = pieces.completion
        if said and not said[-1].endswith("\n"):
            self.screen.piece("\n")
        elif not said and not self.screen.interactive:
            self.screen.piece("\n")  # an answer a line, an empty one too
        if first is not None:
            first = max(0.0, first - done.compile_seconds)
        return done, first, stop

    def _asked(self) -> Pieces:
        """The partner's answer, of which nothing has come yet."""
        if self._partner is None:
            self._partner = self._new_partner()
        try:
            messages = list(self.conversation.messages)
            return self._partner.reply(messages, self._parameters(), **self._how)
        except ValueError as error:
            if not self.screen.interactive:
                raise
            raise ValueError(
                f"{error} Nothing is lost: /save FILE keeps the conversation as it was before, "
                "/undo takes back a turn, /reset begins a new one."
            ) from error

    def _parameters(self) -> Any:
        """The sampling parameters: an answer that is drawn again is drawn with another seed."""
        seed = getattr(self.sampling, "seed", None)
        if seed is None or self._retries == 0:
            return self.sampling
        return dataclasses.replace(self.sampling, seed=(seed + self._retries) % 2**64)

    def _say_of(self, done: tuple[Answer, float | None, Stop], any_text: bool) -> None:
        answer, first, stop = done
        if stop.asked:
            kept = "what it said is kept" if any_text else "the message is taken back"
            self.screen.note(f"Stopped; {kept}.")
        elif answer.finish_reason == "length":
            self.screen.note(self._why_cut(answer))
        elif not any_text:
            self.screen.note("The answer is empty; the message is taken back.")
        if self._shows_figures:
            self.screen.note(figures(answer, first))

    def _why_cut(self, answer: Answer) -> str:
        count = len(answer.tokens)
        if self._context is not None and answer.prompt_tokens + count >= self._context:
            return (
                f"The model's context is full, with {self._context} tokens. Nothing is lost: "
                "/save FILE keeps the conversation, /reset begins a new one."
            )
        return f"Cut off after {count} tokens, as max_tokens says: /set max_tokens {2 * count}."

    def _drop_partner(self) -> None:
        partner, self._partner = self._partner, None
        if partner is not None:
            partner.close()


def _check(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "A message is text in the terminal's encoding, and some bytes of this one are not. "
            "Correct it, or set PYTHONUTF8=1 or LC_ALL=C.UTF-8."
        ) from None
