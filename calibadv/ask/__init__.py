"""Asking a trained agent, on the terminal or in a browser."""

from calibadv.ask.session import Event, Session

__all__ = ["Event", "Session"]
