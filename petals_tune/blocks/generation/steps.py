"""Steps of generation sessions through blocks in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from petals_tune.blocks.adapters import CallPlan
from petals_tune.blocks.generation.attention import each_session_apart
from petals_tune.blocks.generation.probe import Caches
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.generation.states import positions_of
from petals_tune.blocks.generation.step_cache import Attention, StepCache
from petals_tune.blocks.passes import TORCH_ERRORS, Passes
from petals_tune.blocks.separate_rows import SessionRows, context_length
from petals_tune.copies import to_device, to_host
from petals_tune.errors import PetalsTuneError, RequestRefused, SessionLost
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan


class Stepper:
    """Runs steps of sessions: one session's of any number of positions, or several sessions' of one position each."""

    def __init__(self, passes: Passes, caches: Callable[[], Caches]):
        """`caches` says what blocks keep, once that was measured, with `alone`."""
        self._passes, self._caches = passes, caches

    @torch.no_grad()
    def alone(self, session: Session, step: Step, attention: Attention) -> torch.Tensor:
        """Run a step of a session at its position as it is, in one piece. Raises what failed."""
        session.prepare(step)
        (output,) = self._run_steps({0: (session, step)}, attention).values()
        if isinstance(output, Exception):
            raise output
        return output

    def together(self, steps: Sequence[tuple[Session, Step]]) -> list[torch.Tensor | Exception]:
        """Run the next positions of one or more sessions on the same blocks; where several, one position each.

        The result of a step that cannot be done is the error for its client; that session stays at its position.
        What the other sessions hold changes no bit of a session's output; how many rows and positions they have may
        change how it is rounded.
        """
        results: dict[int, torch.Tensor | Exception] = {}
        good: dict[int, tuple[Session, Step]] = {}
        for number, (session, step) in enumerate(steps):
            try:
                self._passes.check(session.span, step)
                if session.adapter is not None and step.position == 0:
                    session.adapter.check_positions(step.hidden.shape[1])
                session.check(step)
                pieces = self._pieces(session.span, step)
                for again in session.go_back(step.position):
                    for piece in self._pieces(session.span, again):
                        self._repeat(session, piece)
                if len(pieces) > 1:
                    results[number] = self._run_pieces(session, pieces)
                    continue
                session.prepare(step)
                good[number] = session, step
            except PetalsTuneError as error:
                results[number] = error
        if good:
            results |= self._run_steps(good, self._caches().attention)
        return [results[number] for number in range(len(steps))]

    def _pieces(self, span: BlockSpan, step: Step) -> list[Step]:
        """Cut a step where its blocks cannot go on from a state with several positions at once.

        Raises RequestRefused for padding in a step of one position, on blocks with a state: transformers does not mask
        it there, and the state would take it in.
        """
        length = step.hidden.shape[1]
        in_one = length == 1 or step.position == 0 or self._caches().states.go_on(span)
        pieces = [step] if in_one else positions_of(step)
        if (
            self._caches().states.keep_some(span)
            and (length == 1 or len(pieces) > 1)
            and step.padding is not None
            and not bool(step.padding.all())
        ):
            raise RequestRefused("padding in a step of one position, on blocks with a state", reason="padding")
        return pieces

    def _run_pieces(self, session: Session, pieces: Sequence[Step]) -> torch.Tensor | Exception:
        """The output of a step in pieces, one after the other; the error of the first one that fails."""
        outputs = []
        for piece in pieces:
            session.prepare(piece)
            (output,) = self._run_steps({0: (session, piece)}, self._caches().attention).values()
            if isinstance(output, Exception):
                return output
            outputs.append(output)
        return torch.cat(outputs, dim=1)

    def _repeat(self, session: Session, step: Step) -> None:
        """Run a step that `session` has taken before. Raises SessionLost where it fails: its client has the inputs."""
        (result,) = self._run_steps({0: (session, step)}, self._caches().attention).values()
        if isinstance(result, Exception):
            raise SessionLost(f"the states at position {step.position} could not be computed again") from result

    def _run_steps(
        self, steps: dict[int, tuple[Session, Step]], attention: Attention
    ) -> dict[int, torch.Tensor | Exception]:
        """The outputs of steps that were prepared. Where several fail together, each is run alone."""
        try:
            return self._run_together(steps, attention)
        except TORCH_ERRORS as error:
            if len(steps) == 1:
                ((number, (session, step)),) = steps.items()
                session.undo(step)
                return {number: error}
        # Behind the except clause: the error's frames hold the tensors that were made.
        return {number: self._run_steps({number: each}, attention)[number] for number, each in steps.items()}

    def _run_together(
        self, steps: dict[int, tuple[Session, Step]], attention: Attention
    ) -> dict[int, torch.Tensor | Exception]:
        """The outputs of steps in one pass through the blocks. Raises torch's own errors."""
        results: dict[int, torch.Tensor | Exception] = {}
        sessions = [session for session, _ in steps.values()]
        plan = CallPlan.of_sessions([(session.adapter_now, session.rows) for session in sessions])
        with self._passes.configured(sessions[0].span, plan):
            cache = StepCache(sessions, next(iter(steps.values()))[1].hidden.shape[1], attention)
            made = self._step(cache, sessions, [step for _, step in steps.values()])
            output, finite = to_host(made, made.isfinite().flatten(1).all(1))  # of each row
            rows = [session.rows for session in sessions]
            for place, ((number, (session, step)), own, good) in enumerate(
                zip(steps.items(), output.split(rows), finite.split(rows), strict=True)
            ):
                again = partial(self._step, StepCache([session], step.hidden.shape[1], attention), [session], [step])
                with self._passes.hooks.alone(place):
                    results[number] = own if good.all() else self._passes.not_finite(session.span, step.hidden, again)
        for place, (number, (session, step)) in enumerate(steps.items()):  # once nothing can fail any more
            if isinstance(results[number], torch.Tensor):
                session.advance(step, cache.states_of(place))
            else:
                session.undo(step)
        return results

    def _step(self, cache: StepCache, sessions: Sequence[Session], steps: Sequence[Step]) -> torch.Tensor:
        passes, positions = self._passes, None
        hidden = to_device(torch.cat([step.hidden for step in steps]), passes.device, passes.dtype)
        if passes.takes_positions and (len(sessions) > 1 or steps[0].positions is not None or passes.counts_from_zero):
            positions = torch.cat([_positions(*each) for each in zip(sessions, steps, strict=True)])
        rows = [
            SessionRows(rows=session.rows, context_length=context_length(step))
            for session, step in zip(sessions, steps, strict=True)
        ]
        with each_session_apart(passes.model.config, cache) if cache.apart else nullcontext():
            return passes.run(hidden, rows, mask=cache.mask(), positions=positions, cache=cache)


def _positions(session: Session, step: Step) -> torch.Tensor:
    """(B, S) position ids of a step; counted from the session's position where the client gave none."""
    length = step.hidden.shape[1]
    given = step.positions
    if given is None:
        given = torch.arange(session.position, session.position + length)[None]
    return given.expand(session.rows, length)
