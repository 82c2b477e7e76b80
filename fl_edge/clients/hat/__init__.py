"""HAT's client: a device that generates text together with a cloud.

``python -m fl_edge.clients.hat`` serves a model, or chats with one that is served.
"""

from fl_edge.clients.hat.client import HatClient, HatWorkload

__all__ = ["HatClient", "HatWorkload"]
