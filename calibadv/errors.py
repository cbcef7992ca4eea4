"""Errors whose message is for the user: the command line prints it in one line, and no traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave; the message names the value, the limit and the remedy."""


class ServiceError(RuntimeError):
    """A service that the run depends on does not answer, or not as it should."""


class StopRequestedError(Exception):
    """A signal asked the run to stop while it waited for something: the rollout step in progress is given up."""
