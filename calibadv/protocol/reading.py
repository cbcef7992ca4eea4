"""Reading of a protocol from the settings of a config."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, lazy_instance  # type: ignore[attr-defined]

from calibadv.interfaces import Protocol
from calibadv.protocol.search import SearchProtocol


def read_protocol(settings: Any) -> Protocol:
    """Build the protocol of ``model.protocol``: a class with its arguments, or the arguments of the default one."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--protocol", type=Protocol, default=lazy_instance(SearchProtocol))
    parsed = parser.parse_object({"protocol": settings} if settings else {})
    protocol: Protocol = parser.instantiate(parsed).protocol
    return protocol
