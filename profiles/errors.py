"""The errors that a user can do something about: what was wrong, where, the evidence, and what would be right."""

from __future__ import annotations


class EdgestillError(Exception):
    """edgestill could not do it (I/O, build, crash of a component). Exit status 1.

    Args:
        message: what was wrong, one sentence.
        where: file, recipe key or command in which it was wrong.
        evidence: the line or figure that shows it.
        fix: one command or value that would be right.
    """

    exit_status = 1

    def __init__(
        self, message: str, *, where: str | None = None, evidence: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.evidence = evidence
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.message]
        lines += [
            f"  {label}: {text}"
            for label, text in (("where", self.where), ("evidence", self.evidence), ("fix", self.fix))
            if text
        ]
        return "\n".join(lines)


class InputError(EdgestillError):
    """The usage or the input was wrong. Exit status 2."""

    exit_status = 2


class Interrupted(EdgestillError):
    """The user stopped the work; what was done is kept and the same command goes on. Exit status 130."""

    exit_status = 130


def nearest(word: str, valid: list[str]) -> str:
    """A hint such as `did you mean "epochs"?`, or the valid words when none is near."""
    from difflib import get_close_matches

    close = get_close_matches(word, valid, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else "valid: " + ", ".join(sorted(valid))
