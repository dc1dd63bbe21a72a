"""How the tensors of one format become those of another: tables of rules that can be read both ways.

A rule names one tensor of ours and what it is made of in the other format. `*` in the names is a layer's number. A rule
that fits nothing, and a tensor that no rule fits, are errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from blip2.errors import CheckpointError

SHOWN = 8  # names that an error lists


class Operation(Protocol):
    """From tensors of the other format to one of ours, and back."""

    def join(self, parts: Sequence[Tensor]) -> Tensor: ...

    def split(self, whole: Tensor) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Same:
    """One tensor, as it is."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The only part."""
        (only,) = parts
        return only

    def split(self, whole: Tensor) -> Sequence[Tensor]:
        """The tensor, alone."""
        return [whole]


@dataclass(frozen=True)
class Stacked:
    """Several tensors, one below the other.

    Attributes:
        shares: how many equal parts of the whole each takes.
    """

    shares: tuple[int, ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Along the first dimension."""
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> Sequence[Tensor]:
        """Views of the parts."""
        part = len(whole) // sum(self.shares)
        return whole.split([share * part for share in self.shares])


@dataclass(frozen=True)
class Plus:
    """One tensor, a number added to each of its values.

    Attributes:
        amount: what ours has more.
    """

    amount: float

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The only part, plus the amount."""
        (only,) = parts
        return only + self.amount

    def split(self, whole: Tensor) -> Sequence[Tensor]:
        """The tensor without the amount."""
        return [whole - self.amount]


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and where it comes from.

    Attributes:
        ours: its name, with `*` for a layer's number.
        theirs: names of what it is made of, in order.
    """

    ours: str
    theirs: tuple[str, ...]
    operation: Operation = field(default_factory=Same)

    def at(self, layer: int) -> Rule:
        """The rule for one layer."""
        theirs = tuple(name.replace("*", str(layer)) for name in self.theirs)
        return replace(self, ours=self.ours.replace("*", str(layer)), theirs=theirs)


def same(pairs: Mapping[str, str]) -> list[Rule]:
    """Rules for tensors that only change their name: ours to theirs."""
    return [Rule(ours, (theirs,)) for ours, theirs in pairs.items()]


def weights_and_biases(pairs: Mapping[str, str]) -> list[Rule]:
    """Rules for modules, whose `weight` and `bias` keep theirs: names of ours to theirs, without the last part."""
    return same({f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in pairs.items() for kind in ("weight", "bias")})


def within(rules: Iterable[Rule], ours: str = "", theirs: str = "") -> list[Rule]:
    """The rules of a part for the whole that it stands in: each name with what stands before it."""
    return [replace(rule, ours=ours + rule.ours, theirs=tuple(theirs + name for name in rule.theirs)) for rule in rules]


def for_layers(rules: Iterable[Rule], layers: int) -> list[Rule]:
    """Every rule with a `*` once for each layer."""
    return [each for rule in rules for each in ([rule.at(n) for n in range(layers)] if "*" in rule.ours else [rule])]


def to_ours(rules: Sequence[Rule], state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Tensors of the other format by our names.

    Args:
        rules: without `*`.
        source: what an error calls the tensors.
    Raises:
        CheckpointError: a tensor is missing or left over; the message lists them.
    """
    needed = [name for rule in rules for name in rule.theirs]
    check(set(needed), state.keys(), source)
    return {rule.ours: rule.operation.join([state[name] for name in rule.theirs]) for rule in rules}


def to_theirs(rules: Sequence[Rule], state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Our tensors by the other format's names; the way back of `to_ours`."""
    check({rule.ours for rule in rules}, state.keys(), source)
    return {
        name: part
        for rule in rules
        for name, part in zip(rule.theirs, rule.operation.split(state[rule.ours]), strict=True)
    }


def check(needed: Iterable[str], found: Iterable[str], source: object) -> None:
    """Raises CheckpointError, with the names, where a tensor is missing or left over."""
    needed, found = set(needed), set(found)
    wrong = [f"missing {name}" for name in sorted(needed - found)]
    wrong += [f"unexpected {name}" for name in sorted(found - needed)]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(f"{source}: {'; '.join(wrong[:SHOWN])}{more}")
