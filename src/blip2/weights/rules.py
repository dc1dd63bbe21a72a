"""How the tensors of one format become those of another: tables of rules that can be read both ways.

A rule names tensors of ours, mostly one, and what they are made of in the other format. `*` in the names is a layer's
number. A rule that fits nothing, and a tensor that no rule fits, are errors.
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
    """From tensors of the other format to ours, and back."""

    def join(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]: ...

    def split(self, ours: Sequence[Tensor]) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Same:
    """As it is."""

    def join(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same."""
        return theirs

    def split(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same."""
        return ours


@dataclass(frozen=True)
class Stacked:
    """Several tensors of theirs, one below the other.

    Attributes:
        shares: how many equal parts of the whole each takes.
    """

    shares: tuple[int, ...]

    def join(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """One tensor, along the first dimension.

        Raises:
            RuntimeError: they do not go together.
        """
        if theirs[0].is_meta:  # `torch.cat` would import torch's compiler for it, a second and a half
            if len({tensor.shape[1:] for tensor in theirs}) > 1:
                raise RuntimeError("of different widths")
            return [theirs[0].new_empty(sum(map(len, theirs)), *theirs[0].shape[1:])]
        return [torch.cat(list(theirs))]

    def split(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """Views of the parts."""
        (whole,) = ours
        part = len(whole) // sum(self.shares)
        return whole.split([share * part for share in self.shares])


@dataclass(frozen=True)
class Plus:
    """A number added to each value.

    Attributes:
        amount: what ours has more.
    """

    amount: float

    def join(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Theirs, plus the amount."""
        return [tensor + self.amount for tensor in theirs]

    def split(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """Ours without the amount."""
        return [tensor - self.amount for tensor in ours]


@dataclass(frozen=True)
class KeyBias:
    """One bias of theirs for query, key and value, of which ours keeps query and value: the key's is zero (EVA)."""

    def join(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Biases of query and value.

        Raises:
            CheckpointError: the key has a bias too.
        """
        (whole,) = theirs
        query, key, value = whole.reshape(3, -1)
        if not key.is_meta and key.any():
            raise CheckpointError("an attention key of the vision encoder has a bias, where this encoder has none")
        return [query, value]

    def split(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """One bias, zeros in its middle."""
        query, value = ours
        return [torch.cat([query, torch.zeros_like(query), value])]


@dataclass(frozen=True)
class NoKeyBias:
    """`KeyBias` the other way round: one bias of ours, of which theirs keeps query and value."""

    def join(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """One bias, zeros in its middle."""
        return KeyBias().split(theirs)

    def split(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """Biases of query and value.

        Raises:
            CheckpointError: the key has a bias too.
        """
        return KeyBias().join(ours)


@dataclass(frozen=True)
class Leading:
    """Ours has dimensions of size 1 before theirs.

    Attributes:
        count: how many.
    """

    count: int

    def join(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """With the dimensions."""
        return [tensor.reshape(*[1] * self.count, *tensor.shape) for tensor in theirs]

    def split(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """Without them."""
        return [tensor.reshape(tensor.shape[self.count :]) for tensor in ours]


@dataclass(frozen=True)
class Copied:
    """One tensor of ours that theirs holds several times over."""

    count: int

    def join(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The first: they are one tensor under several names.

        Raises:
            CheckpointError: they differ.
        """
        if not theirs[0].is_meta and not all(torch.equal(theirs[0], other) for other in theirs[1:]):
            raise CheckpointError("tensors that should be one under several names differ")
        return theirs[:1]

    def split(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensor, as often as it is named."""
        return [*ours] * self.count


@dataclass(frozen=True)
class Transposed:
    """Matrices that lie the other way round, and then what else is to be done with them."""

    then: Operation

    def join(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Rows become columns."""
        return self.then.join([tensor.mT for tensor in theirs])

    def split(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """Columns become rows."""
        return [tensor.mT for tensor in self.then.split(ours)]


@dataclass(frozen=True)
class Rule:
    """Some tensors of ours and where they come from.

    Attributes:
        ours: names, with `*` for a layer's number.
        theirs: names of what they are made of, in order.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    operation: Operation = field(default_factory=Same)

    def at(self, layer: int) -> Rule:
        """The rule for one layer."""
        ours, theirs = (tuple(name.replace("*", str(layer)) for name in names) for names in (self.ours, self.theirs))
        return replace(self, ours=ours, theirs=theirs)


def same(pairs: Mapping[str, str]) -> list[Rule]:
    """Rules for tensors that only change their name: ours to theirs."""
    return [Rule((ours,), (theirs,)) for ours, theirs in pairs.items()]


def weights_and_biases(pairs: Mapping[str, str]) -> list[Rule]:
    """Rules for modules, whose `weight` and `bias` keep theirs: names of ours to theirs, without the last part."""
    return same({f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in pairs.items() for kind in ("weight", "bias")})


def within(rules: Iterable[Rule], ours: str = "", theirs: str = "") -> list[Rule]:
    """The rules of a part for the whole that it stands in: each name with what stands before it."""
    return [
        replace(
            rule, ours=tuple(ours + name for name in rule.ours), theirs=tuple(theirs + name for name in rule.theirs)
        )
        for rule in rules
    ]


def for_layers(rules: Iterable[Rule], layers: Iterable[int]) -> list[Rule]:
    """Every rule with a `*` once for each of the layers."""
    numbers = list(layers)
    return [each for rule in rules for each in ([rule.at(n) for n in numbers] if "*" in rule.ours[0] else [rule])]


def to_ours(rules: Sequence[Rule], state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Tensors of the other format by our names.

    Args:
        rules: without `*`.
        source: what an error calls the tensors.
    Raises:
        CheckpointError: a tensor is missing or left over; the message lists them.
    """
    check((name for rule in rules for name in rule.theirs), state.keys(), source)
    return {
        name: tensor
        for rule in rules
        for name, tensor in zip(rule.ours, rule.operation.join([state[name] for name in rule.theirs]), strict=True)
    }


def to_theirs(rules: Sequence[Rule], state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Our tensors by the other format's names; the way back of `to_ours`."""
    check((name for rule in rules for name in rule.ours), state.keys(), source)
    return {
        name: tensor
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.operation.split([state[name] for name in rule.ours]), strict=True)
    }


def check(needed: Iterable[str], found: Iterable[str], source: object) -> None:
    """Raises CheckpointError, with the names, where a tensor is missing or left over."""
    needed, found = set(needed), set(found)
    wrong = [f"missing {name}" for name in sorted(needed - found)]
    wrong += [f"unexpected {name}" for name in sorted(found - needed)]
    if wrong:
        raise CheckpointError(f"{source}: {listed(wrong)}")


def listed(wrong: Sequence[str]) -> str:
    """What is wrong in one line, the first of it where there is much."""
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return f"{'; '.join(wrong[:SHOWN])}{more}"
