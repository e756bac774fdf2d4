"""Choice of a backend: ordered candidates, the reasons against each, and the user's wish.

An op lists its candidates in the order of preference. ``supports`` gives the reasons against one, empty when it runs.
Automatic choice takes the first without reasons that was not measured to be slower than plain PyTorch; a wish by name
works or raises with every candidate's reasons.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from basisconv_kernels.core import env, extension, log, selfcheck
from basisconv_kernels.core.errors import BackendUnavailable


@dataclass(frozen=True)
class Candidate:
    """A backend of one op.

    Attributes:
        name: the backend's name, as users say it.
        target: ``"module:function"``, imported when first chosen.
        supports: problem → reasons against, empty when the backend can run it.
        backward: ``"module:function"`` of its gradients; None where they are the reference's.
        check: ``"module:function"``, problem → ``selfcheck.Check`` of what would run on a GPU; automatic choice on a
            CUDA device passes over a candidate whose check fails. None where there is nothing to check.
    """

    name: str
    target: str
    supports: Callable[[Any], Sequence[str]]
    backward: str | None = None
    check: str | None = None


_NOTHING: Mapping[str, str] = MappingProxyType({})
NOBODY = ""  # no use_backend block around: the environment speaks
ASKED: ContextVar[str | None] = ContextVar("basisconv_backend", default=NOBODY)


def wish() -> str | None:
    """The backend asked for by ``use_backend`` or ``BASISCONV_BACKEND``, or None."""
    asked = ASKED.get()
    return env.backend() if asked is NOBODY else asked


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op call in the block that names no backend itself on this one; None returns to automatic choice.

    A graph that ``torch.compile`` traced keeps the backend of its tracing.
    """
    token = ASKED.set(name)
    try:
        yield
    finally:
        ASKED.reset(token)


def absent(backend: str) -> str | None:
    """Why a backend does not exist on this machine at all; None when it does."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return extension.load()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install basisconv_kernels[triton]"
        return None if torch.cuda.is_available() or env.triton_interprets() else "no CUDA device"
    if backend in ("cuda", "cuda_one_pass"):
        if (missing := extension.load()) is not None:
            return missing
        if "cuda" not in extension.facts():
            return "the native library was built without CUDA kernels; BASISCONV_BUILD=cuda builds them"
        return None if torch.cuda.is_available() else "no CUDA device"
    return f"no backend has the name {backend!r}"


def reasons(candidates: Sequence[Candidate], problem: Any) -> dict[str, tuple[str, ...]]:
    """The reasons against each candidate, in order of preference; empty tuples can run."""
    found = {}
    for candidate in candidates:
        missing = absent(candidate.name)
        found[candidate.name] = (missing,) if missing else tuple(candidate.supports(problem))
    return found


def first(
    candidates: Sequence[Candidate],
    against: Mapping[str, Sequence[str]],
    asked: str | None,
    slower: Mapping[str, str] = _NOTHING,
) -> Candidate | None:
    """The candidate for a call, None where none can run it.

    Args:
        candidates: in order of preference.
        against: what ``reasons`` gave for them.
        asked (str or None): a wish by name; it alone counts then.
        slower: {backend: by how much, in words} of those that automatic choice passes over, as from ``tuning.slower``;
            where all that can run are slower, none is passed over.
    """
    able = [c for c in candidates if not against[c.name] and (c.name == asked if asked else True)]
    fast = [c for c in able if asked is not None or c.name not in slower]
    return next(iter(fast or able), None)


def check_of(candidate: Candidate, problem: Any) -> selfcheck.Check | None:
    """What must have passed before automatic choice takes this candidate for the problem; None where nothing must."""
    if candidate.check is None or problem.device != "cuda":
        return None
    return load(candidate.check)(problem)


def select(
    op: str,
    candidates: Sequence[Candidate],
    problem: Any,
    asked: str | None,
    slower: Mapping[str, str] = _NOTHING,
) -> Candidate:
    """The candidate for this call.

    Args:
        op (str): name of the op, for messages.
        candidates: in order of preference.
        problem: what ``supports`` understands.
        asked (str or None): the user's explicit choice; None chooses.
        slower: as for ``first``.

    Raises:
        BackendUnavailable: the backend asked for cannot run the problem, or none can.
    """
    against = reasons(candidates, problem)
    chosen = first(candidates, against, asked, slower)
    while asked is None and chosen is not None and (check := check_of(chosen, problem)):
        distrust = selfcheck.against(check)
        if distrust is None:
            break
        against[chosen.name] = (distrust,)
        chosen = first(candidates, against, asked, slower)
    if chosen is None:
        raise BackendUnavailable(_refusal(op, problem, asked, against))
    if asked is None:
        why_not = {c.name: "; ".join(against[c.name]) or slower.get(c.name) for c in candidates}
        passed = [f"{name}: {why}" for name, why in why_not.items() if why and name != chosen.name]
        log.once(f"{op} [{problem}] → {chosen.name}" + (f" (not {' | '.join(passed)})" if passed else ""))
    return chosen


def _refusal(op: str, problem: Any, asked: str | None, against: dict[str, tuple[str, ...]]) -> str:
    head = f"{op}: backend {asked!r} cannot run [{problem}]" if asked else f"{op}: no backend can run [{problem}]"
    rows = [f"  {name}: {'; '.join(why) if why else 'can run'}" for name, why in against.items()]
    if asked is not None and asked not in against:
        rows.insert(0, f"  {asked}: {absent(asked) or 'not a backend of this op'}")
    return "\n".join([head, *rows])


def resolve(candidate: Candidate) -> Callable[..., Any]:
    """Import the candidate's target."""
    return load(candidate.target)


def load(target: str) -> Callable[..., Any]:
    """Import ``"module:function"``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
